package meshload

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/hessian"
)

// Service and Method are what bolt and Dubbo clients ask for.
const (
	Service = "dev.hauberk.Load"
	Method  = "echo"
)

const (
	sofaRequest = "com.alipay.sofa.rpc.core.request.SofaRequest"
	frameHead   = 16 // of Dubbo
	maxFrame    = MaxSize + 4<<10
)

// mark is the number of a request as its body carries it: a proxy may give frames
// numbers of its own.
const mark = "mark-%020d"

func noteMark(l *Ledger, body []byte) error {
	at := bytes.LastIndex(body, []byte("mark-"))
	if at < 0 || len(body) < at+25 {
		return errors.New("a request without its number")
	}
	id, err := strconv.ParseUint(string(body[at+5:at+25]), 10, 64)
	if err == nil {
		l.note(id)
	}
	return err
}

// boltRequest is of version 1 if its number is even, else of version 2 with sum.
func boltRequest(b []byte, id uint64, size int) []byte {
	content := []byte("O\xbc" + sofaRequest + "\x92")
	for _, s := range []string{"methodName", "targetServiceUniqueName"} {
		content = hessian.AppendString(content, s)
	}
	content = hessian.AppendString(hessian.AppendString(append(content, "o\x90"...), Method), Service+":1.0")
	content = append(content, bytes.Repeat([]byte{0x90}, size)...)
	content = hessian.AppendString(content, fmt.Sprintf(mark, id))
	sum := id%2 == 1
	begin := len(b)
	if sum {
		b = append(b, 2, 2, byte(bolt.Request))
	} else {
		b = append(b, 1, byte(bolt.Request))
	}
	b = binary.BigEndian.AppendUint16(b, uint16(bolt.Call))
	b = binary.BigEndian.AppendUint32(append(b, 1), uint32(id))
	if b = append(b, bolt.Hessian2); sum {
		b = append(b, 1)
	}
	b = binary.BigEndian.AppendUint32(b, 3000)
	b = binary.BigEndian.AppendUint16(b, uint16(len(sofaRequest)))
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(content)))
	b = append(append(b, sofaRequest...), content...)
	if sum {
		b = append(b, 0, 0, 0, 0)
		x, err := bolt.Size(b[begin:])
		if err != nil {
			panic(err)
		}
		bolt.SetID(b[begin:], x, uint32(id))
	}
	return b
}

func readBolt(r *bufio.Reader) (bolt.Frame, error) {
	for n := 1; ; n++ {
		b, err := r.Peek(n)
		if err != nil {
			return bolt.Frame{}, err
		}
		x, err := bolt.Size(b)
		if err != nil {
			return bolt.Frame{}, err
		}
		if x.Len == 0 {
			continue
		}
		if x.Len > maxFrame {
			return bolt.Frame{}, fmt.Errorf("a frame of %d bytes", x.Len)
		}
		whole := make([]byte, x.Len)
		if _, err := io.ReadFull(r, whole); err != nil {
			return bolt.Frame{}, err
		}
		return bolt.Parse(whole, x), nil
	}
}

func boltAnswer(r *bufio.Reader, id uint64, _ int) error {
	f, err := readBolt(r)
	switch {
	case err != nil:
		return err
	case f.ID != uint32(id):
		return fmt.Errorf("asked %d, answered %d", id, f.ID)
	case f.Status != bolt.OK:
		return &Refused{fmt.Sprintf("status %d %.300q", f.Status, f.Content)}
	}
	return nil
}

func boltServe(r *bufio.Reader, w io.Writer, l *Ledger) error {
	f, err := readBolt(r)
	if err != nil {
		return err
	}
	if err := noteMark(l, f.Content); err != nil {
		return err
	}
	_, err = w.Write(bolt.AppendError(nil, &f, bolt.OK, "done"))
	return err
}

func dubboRequest(b []byte, id uint64, size int) []byte {
	var content []byte
	for _, s := range []string{"2.0.2", Service, "1.0", Method, "Ljava/lang/String;"} {
		content = hessian.AppendString(content, s)
	}
	text := make([]byte, size)
	for i := range text {
		text[i] = 'a' + byte(i%26)
	}
	content = hessian.AppendString(content, string(text))
	content = append(content, 'H')
	for _, s := range []string{"path", Service, "mark", fmt.Sprintf(mark, id)} {
		content = hessian.AppendString(content, s)
	}
	content = append(content, 'Z')
	b = binary.BigEndian.AppendUint64(append(b, 0xda, 0xbb, 0xc2, 0), id)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(content))), content...)
}

func readDubbo(r *bufio.Reader) (dubbo.Frame, error) {
	head, err := r.Peek(frameHead)
	if err != nil {
		return dubbo.Frame{}, err
	}
	n, err := dubbo.Size(head)
	if err != nil || n > maxFrame {
		return dubbo.Frame{}, fmt.Errorf("a frame of %d bytes: %w", n, err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return dubbo.Frame{}, err
	}
	return dubbo.Parse(b, n), nil
}

func dubboAnswer(r *bufio.Reader, id uint64, _ int) error {
	f, err := readDubbo(r)
	switch {
	case err != nil:
		return err
	case f.ID != id:
		return fmt.Errorf("asked %d, answered %d", id, f.ID)
	case f.Status != dubbo.OK:
		return &Refused{fmt.Sprintf("status %d", f.Status)}
	}
	return nil
}

func dubboServe(r *bufio.Reader, w io.Writer, l *Ledger) error {
	f, err := readDubbo(r)
	if err != nil {
		return err
	}
	if err := noteMark(l, f.Body); err != nil {
		return err
	}
	_, err = w.Write(dubbo.AppendError(nil, &f, dubbo.OK, "done"))
	return err
}

func tcpRequest(b []byte, id uint64, size int) []byte {
	b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, id), uint32(size))
	return append(b, body(id, size)...)
}

func readTCP(r *bufio.Reader) (id uint64, b []byte, err error) {
	var head [12]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[8:])
	if n > MaxSize {
		return 0, nil, fmt.Errorf("a message of %d bytes", n)
	}
	b = make([]byte, n)
	_, err = io.ReadFull(r, b)
	return binary.BigEndian.Uint64(head[:8]), b, err
}

func tcpAnswer(r *bufio.Reader, id uint64, size int) error {
	got, b, err := readTCP(r)
	if err == nil && (got != id || !bytes.Equal(b, body(id, size))) {
		err = fmt.Errorf("asked %d, answered %d, %d bytes of %d", id, got, len(b), size)
	}
	return err
}

func tcpServe(r *bufio.Reader, w io.Writer, l *Ledger) error {
	id, b, err := readTCP(r)
	if err != nil {
		return err
	}
	l.note(id)
	_, err = w.Write(append(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, id), uint32(len(b))), b...))
	return err
}

// serveFrames runs one for each request of each connection.
func serveFrames(ln net.Listener, l *Ledger, one func(*bufio.Reader, io.Writer, *Ledger) error) func() {
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			go func() {
				r := bufio.NewReaderSize(c, 4<<10)
				for one(r, c, l) == nil {
				}
				c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			}()
		}
	}()
	return func() {
		ln.Close()
		mu.Lock()
		defer mu.Unlock()
		for c := range open {
			c.Close()
		}
	}
}
