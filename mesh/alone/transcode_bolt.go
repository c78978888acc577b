package alone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/transcode"
)

// BoltService is a service of SOFARPC, with what its methods take.
type BoltService struct {
	Service string                 `yaml:"service"` // interface:version
	Methods []BoltMethod           `yaml:"methods"`
	Classes map[string][]BoltField `yaml:"classes"` // of Java, with their fields in order
}

// BoltMethod is a method and the types of its arguments.
type BoltMethod struct {
	Name    string   `yaml:"name"`
	Args    []string `yaml:"args"`
	Returns string   `yaml:"returns"` // void; none: what the JSON of the answer tells
}

// BoltField is a field of a class.
type BoltField struct {
	Name string `yaml:"name"`
	Type string `yaml:"type"`
}

func (b *BoltService) service() *transcode.Service {
	s := &transcode.Service{Name: b.Service, Classes: map[string][]transcode.Member{}}
	for _, m := range b.Methods {
		s.Methods = append(s.Methods, transcode.Signature{Name: m.Name, Args: m.Args, Returns: m.Returns})
	}
	for name, fields := range b.Classes {
		s.Classes[name] = nil
		for _, f := range fields {
			s.Classes[name] = append(s.Classes[name], transcode.Member{Name: f.Name, Type: f.Type})
		}
	}
	return s
}

// callBolt makes a call of bolt of the request, and the answer of the call's. The
// last part of the path is the method, and the body lists its arguments.
func (s *session) callBolt(a *action) {
	path := s.route.Path
	name := path[lastSlash(path)+1:]
	m := a.bolt.Method(string(name))
	if m == nil || string(s.req.Method) != "POST" {
		s.refuse(404, fmt.Sprintf("the service has no method %.64q, or it is not asked by POST", name), "POST .../METHOD with a list of arguments calls it")
		return
	}
	defer s.giveBytes()
	body, ok := s.whole(a)
	if !ok {
		return
	}
	if kind, _ := s.req.Field("Content-Type"); !isJSON(kind) {
		s.refuse(415, "the body is not application/json", "")
		return
	}
	timeout := time.Duration(a.route.Timeout)
	frame, err := a.bolt.AppendRequest(nil, m, 1, int32(min(timeout.Milliseconds(), 1<<31-1)), body)
	if err != nil {
		s.refuse(400, err.Error(), "")
		return
	}
	if !s.takeBytes(len(frame)) {
		s.refuseHeld()
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	answer, err := s.boltAnswer(ctx, a, frame)
	var out []byte
	if err == nil {
		out, err = transcode.AppendResponse(nil, answer, maxAnswerJ)
	}
	if err == nil && !s.takeBytes(len(out)) { // until the client has read it
		err = errHeld
	}
	if err == nil {
		s.short(200, "application/json", out, "", "")
		return
	}
	var remote *transcode.RemoteError
	if !errors.As(err, &remote) {
		s.callFailed(err)
		return
	}
	status, there := map[bolt.Status]int{4: 503, 7: 504, 16: 502}[remote.Status]
	if !there {
		status = 500
	}
	s.refuse(status, remote.Error(), "")
}

func lastSlash(path []byte) int {
	i := len(path) - 1
	for i >= 0 && path[i] != '/' {
		i--
	}
	return i
}

// boltAnswer sends a frame to an endpoint, and to another only if that could not be
// reached.
func (s *session) boltAnswer(ctx context.Context, a *action, frame []byte) (f *bolt.Frame, err error) {
	err = s.ask(ctx, a, func(srv *server) error {
		var left bool
		if f, left, err = srv.exchangeBolt(ctx, frame); err != nil || left {
			srv.close()
		} else {
			s.putAway(srv)
		}
		return err
	})
	return f, err
}

// exchangeBolt sends a frame and reads its answer, on a connection that carries one
// call at a time. left says that the server has said more.
func (srv *server) exchangeBolt(ctx context.Context, frame []byte) (answer *bolt.Frame, left bool, err error) {
	if until, ok := ctx.Deadline(); ok {
		srv.conn.SetDeadline(until)
	}
	if _, err := srv.conn.Write(frame); err != nil {
		return nil, false, err
	}
	b := make([]byte, 0, 4<<10)
	for {
		x, err := bolt.Size(b)
		switch {
		case err != nil:
			return nil, false, err
		case x.Len > maxCall || x.CRC:
			return nil, false, fmt.Errorf("an answer of %d bytes, or with a sum: at most %d are read, and none was asked for", x.Len, maxCall)
		case x.Len > 0 && len(b) >= x.Len:
			f := bolt.Parse(b[:x.Len], x)
			if f.Type == bolt.Response && f.ID == 1 {
				srv.conn.SetDeadline(time.Time{})
				return &f, len(b) > x.Len, nil
			}
			b = b[x.Len:] // a sign of life
			continue
		}
		if len(b) == cap(b) {
			b = append(make([]byte, 0, max(2*cap(b), x.Len, 4<<10)), b...) // cap is 0 after a frame that filled it
		}
		n, err := srv.conn.Read(b[len(b):cap(b)])
		if b = b[:len(b)+n]; n == 0 && err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, false, fmt.Errorf("read the answer: %w", err)
		}
	}
}
