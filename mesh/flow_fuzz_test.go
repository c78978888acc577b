package mesh

import (
	"encoding/json"
	"io"
	"testing"
	"time"

	"hauberk.dev/mesh/http1"
)

// deadSide is a side at its end.
type deadSide struct{}

func (deadSide) Read([]byte) (int, error)    { return 0, io.EOF }
func (deadSide) Write(p []byte) (int, error) { return len(p), nil }
func (deadSide) CloseWrite() error           { return nil }
func (deadSide) abort()                      {}
func (deadSide) finish()                     {}

// FuzzFlowState gives what may come of another version of the proxy: a state is
// refused, or its engine ends in some order, without a panic and without waiting
// for ever.
func FuzzFlowState(f *testing.F) {
	for _, s := range []string{
		`{"kind":"in","link":1,"engine":{"http":{"asking":1,"request":{"framing":1,"left":5},"waiting":[{"method":"POST"}],"reply":2,"response":{"framing":2,"state":1,"left":3},"met":true,"server":"AAA="}},"server":{}}`,
		`{"kind":"published","client":{},"server":{},"engine":{"http":{"asking":2,"waiting":[{"method":"GET","upgrade":true}],"met":true,"request":{},"response":{}}}}`,
		`{"kind":"out","link":1,"client":{},"engine":{"splice":{"in":true}}}`,
		`{"kind":"out","link":1,"protocol":"bolt","client":{},"engine":{"splice":{},"callbacks":{"held":"AQEAAQ==","head":"AQ==","rest":3,"answers":"AQ=="}}}`,
		`{"kind":"out","link":1,"protocol":"dubbo","client":{},"engine":{"splice":{"out":true},"callbacks":{"left":7,"dropping":true,"lost":true}}}`,
		`{"kind":"in","link":2,"protocol":"bolt","server":{},"engine":{"rpc":{"met":true,"requests":{"left":7,"sum":[7,1,2]},"replies":{"unread":"AQI=","left":3}}}}`,
		`{"kind":"in","link":3,"protocol":"redis","server":{},"engine":{"rpc":{"met":true,"requests":{"left":7,"sum":[2,1,5]},"replies":{"left":3,"sum":[4,1,3]},"order":{"owed":2,"turns":[{"after":1,"text":"LQ=="},{"text":"LQ==","last":true}],"group":true,"closing":true}}}}`,
		`{"kind":"in","gone":true,"engine":{"http":{"asking":6,"reply":4,"last":true,"request":{},"response":{}}}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var s flowState
		if json.Unmarshal(b, &s) != nil || s.check() != nil {
			return
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			resumeAny(&s)
		}()
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Fatal("the engine waits for ever")
		}
	})
}

func resumeAny(s *flowState) {
	e := &entry{}
	switch {
	case s.Engine.HTTP != nil:
		x := &exchange{entry: e, client: &begunSide{deadSide{}, s.Engine.HTTP.Client}, judge: func(*http1.Head) (int, refusal) { return 403, refusal{} }, malformed: func(error) {},
			dial: func() (side, error) { return deadSide{}, nil }}
		x.start()
		if s.Engine.HTTP.Met {
			x.server = &begunSide{deadSide{}, s.Engine.HTTP.Server}
		}
		x.run(s.Engine.HTTP)
	case s.Engine.RPC != nil && newCodec(s.Protocol) != nil:
		x := &rpcExchange{entry: e, client: deadSide{}, protocol: s.Protocol, deep: func() bool { return false }, maybe: func() bool { return false },
			reserve: func(int) bool { return true }, judge: func(rpcCodec) (fault, string) { return faultDenied, "no" }, malformed: func(error) {}}
		if s.Engine.RPC.Met {
			x.server = deadSide{}
		}
		x.run(s.Engine.RPC)
	case s.Engine.Callbacks != nil && callbackCodec(s.Protocol) != nil:
		c := newCallbacks(s.Protocol, deadSide{}, deadSide{}, callbackRules{judge: func(rpcCodec) (fault, string) { return faultDenied, "no" },
			reserve: func(int) bool { return true }, malformed: func(error) {}}, *s.Engine.Callbacks, false)
		c.server.Write([]byte("\x01\x01\x00\x01"))
		c.client.Write([]byte("\x01\x01\x00\x01"))
		splice(e, c.client, c.server, halves{})
		c.stop()
	case s.Engine.Splice != nil:
		splice(e, deadSide{}, deadSide{}, *s.Engine.Splice)
	}
}
