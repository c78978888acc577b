package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// How much is read, written, made and run inside, and for how long bytes flow.
const (
	insideBytes = 64 << 20
	insideFiles = 1000
	insideExecs = 100
	flow        = 3 * time.Second
	pings       = 2000
	insidePort  = "5201"
)

// rates is what a program sees inside a container.
type insideRates struct {
	WriteMBs, RereadMBs    float64
	CreatesPerS, ExecsPerS float64
}

// inside is this program as a workload.
func inside(args []string) error {
	if len(args) != 1 {
		return errors.New("inside: want files or serve")
	}
	switch args[0] {
	case "files":
		r, err := files("/work")
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	case "serve":
		return serve()
	}
	return fmt.Errorf("inside: %q: want files or serve", args[0])
}

// perSecond times f and says how many of n that is in a second.
func perSecond(n float64, f func() error) (float64, error) {
	began := time.Now()
	err := f()
	return n / time.Since(began).Seconds(), err
}

func files(dir string) (r insideRates, err error) {
	block := make([]byte, 1<<20)
	path := filepath.Join(dir, "data")
	const mb = insideBytes / 1e6
	r.WriteMBs, err = perSecond(mb, func() error {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		for range insideBytes / len(block) {
			if _, err := f.Write(block); err != nil {
				return err
			}
		}
		return errors.Join(f.Sync(), f.Close())
	})
	if err != nil {
		return r, err
	}
	r.RereadMBs, err = perSecond(mb, func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, f, block)
		return err
	})
	if err != nil {
		return r, err
	}
	r.CreatesPerS, err = perSecond(insideFiles, func() error {
		for i := range insideFiles {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), block[:4096], 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	r.ExecsPerS, err = perSecond(insideExecs, func() error {
		for range insideExecs {
			if err := exec.Command("/bin/busybox", "true").Run(); err != nil {
				return err
			}
		}
		return nil
	})
	return r, err
}

// serve answers on one port what the first byte of a connection asks for: in,
// out or echo.
func serve() error {
	ln, err := net.Listen("tcp", ":"+insidePort)
	if err != nil {
		return err
	}
	fmt.Println("up")
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go answer(c)
	}
}

func answer(c net.Conn) {
	defer c.Close()
	var ask [1]byte
	if _, err := io.ReadFull(c, ask[:]); err != nil {
		return
	}
	block := make([]byte, 256<<10)
	switch ask[0] {
	case 'i':
		io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, block)
	case 'o':
		for end := time.Now().Add(flow); time.Now().Before(end); {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	case 'e':
		io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, block[:64])
	}
}

// traffic is what a peer outside sees.
type traffic struct {
	InMBs, OutMBs float64
	RoundTripUs   []float64
}

// outside is this program as the peer.
func outside(address string) error {
	var t traffic
	var err error
	if t.InMBs, err = pour(address, 'i'); err == nil {
		t.OutMBs, err = pour(address, 'o')
	}
	if err == nil {
		t.RoundTripUs, err = pingPong(address)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(t)
}

// dial waits until the port is served.
func dial(address string, ask byte) (net.Conn, error) {
	for try := 0; ; try++ {
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			if err = c.SetDeadline(time.Now().Add(flow + 30*time.Second)); err == nil {
				_, err = c.Write([]byte{ask})
			}
			return c, err
		}
		if try == 50 {
			return nil, err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func pour(address string, ask byte) (float64, error) {
	c, err := dial(address, ask)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	block, moved := make([]byte, 256<<10), 0
	began := time.Now()
	for ask == 'o' || time.Since(began) < flow {
		var n int
		if ask == 'i' {
			n, err = c.Write(block)
		} else {
			n, err = c.Read(block)
		}
		moved += n
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	return float64(moved) / 1e6 / time.Since(began).Seconds(), nil
}

func pingPong(address string) (samples []float64, err error) {
	c, err := dial(address, 'e')
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var b [1]byte
	for range pings {
		began := time.Now()
		if _, err := c.Write(b[:]); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return nil, err
		}
		samples = append(samples, us(time.Since(began)))
	}
	return samples, nil
}
