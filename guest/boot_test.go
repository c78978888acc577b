package guest_test

import (
	"context"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
)

func TestSmoke(t *testing.T) {
	m := boot(t, nil)
	c := m.dial(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	s, err := c.Stats(ctx)
	t.Logf("%+v %v", s, err)
	r, err := c.MountRoot(ctx, guestproto.MountRoot{Root: 0, Serial: "root0", UpperBytes: 16 << 20})
	t.Logf("%+v %v", r, err)
	start := time.Now()
	p, err := c.Create(ctx, guestproto.Create{Root: 0, Hostname: "box", PidsMax: 50, Program: guestproto.Program{Args: []string{"sh", "-c", "id; echo err >&2; mount; cat; exit 7"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("create", time.Since(start))
	start = time.Now()
	if err := p.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Log("start", time.Since(start))
	go func() {
		p.Write([]byte("hello\n"))
		p.CloseStdin(ctx)
	}()
	b := make([]byte, 4096)
	for {
		n, err := p.Stdout().Read(b)
		t.Logf("%s %v", b[:n], err)
		if err != nil {
			break
		}
	}
	t.Log(p.Wait(ctx))
	t.Log(c.Shutdown(ctx))
	<-m.ended
}
