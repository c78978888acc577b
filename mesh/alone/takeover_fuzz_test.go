package alone

import (
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"testing"
	"time"

	"hauberk.dev/mesh/handover"
)

// FuzzParcel reads what is handed on: what is read is written as it was, and within
// its bounds.
func FuzzParcel(f *testing.F) {
	a := netip.MustParseAddrPort("192.0.2.1:1")
	for _, m := range []parcel{
		{Session: &sessionState{Listener: ":1", Client: a, Local: a, Used: true, Unread: []byte("GET /")}},
		{Stream: &streamState{Listener: ":1", Source: a, Upstream: "u", Endpoint: "h:1", Idle: time.Hour, FromClient: true}},
		{Calls: &callsState{Listener: ":1", Protocol: "bolt", Client: a, Unread: []byte{1}}},
		{Tally: tallies{"own": {1, 2}}},
		{Limit: "route a 1", Spent: []spent{{a.Addr(), 3}, {netip.Addr{}, 1}}},
	} {
		b, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, 1)
	}
	f.Add([]byte(`{"session":{},"calls":{}}`), 2)
	f.Add([]byte(`{} {}`), 0)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		m, err := parseParcel(b, files)
		if err != nil {
			return
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		n, err := parseParcel(again, files)
		if err != nil || !reflect.DeepEqual(m, n) {
			t.Errorf("%s and then %s: %v", b, again, err)
		}
	})
}

// FuzzTaken reads items and has a proxy take on what is no socket: whatever comes, it
// serves after.
func FuzzTaken(f *testing.F) {
	f.Add(itemLimit, []byte(`{"key":"route few 1","buckets":[{"client":"","left":-1e300},{"client":"192.0.2.1","left":1e300}]}`))
	f.Add(itemAlone, []byte(`{"generation":1,"tally":{"own":[1],"route ":[1,2,3],"route few":[18446744073709551615],"listener x":[1],"endpoint y":[]}}`))
	f.Add(itemSession, []byte(`{"listener":"udp :1","from":"192.0.2.1:1","to":"","control":"AAAA","upstream":"u","endpoint":"e","asked":1,"answered":1,"quiet":1}`))
	f.Add(itemListener, []byte(`{"key":":1"}`))
	f.Add(itemAdmin, []byte(`{"path":"x"}`))
	f.Add("link", []byte(`{}`))
	c, err := Parse("proxy.yaml", f.TempDir(), []byte("version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}]\nhosts: [{names: ['*'], routes: [{name: few, rate: {requests: 3, per: 1h}, respond: {status: 200}}]}]\n"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, kind string, body []byte) {
		p, err := prepare(c, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		taken := &taken{sockets: map[string]*os.File{}}
		taken.item(&handover.Item{Kind: kind, Body: body}) // an error is right; then nothing is taken on, here it is all the same
		if taken.state != nil {
			p.add(taken.state.Tally)
		}
		for key, l := range p.world.Load().limiters() {
			for _, s := range taken.limits {
				l.resume(s.Buckets)
			}
			for range 10 {
				l.allow(netip.MustParseAddr("192.0.2.1"), time.Now())
			}
			if ok, _ := l.allow(netip.MustParseAddr("192.0.2.1"), time.Now()); ok {
				t.Errorf("%s: more than its burst", key)
			}
		}
		p.metrics()
	})
}
