package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"time"

	"hauberk.dev/plan"
)

// trouble does things to the world, one after the other.
type trouble struct {
	*world
	journal *journal
	random  *rand.Rand
	epoch   uint64
	loose   []net.Conn // slow and half-open clients
}

func nobody(*client) bool { return false }

func (t *trouble) run(ctx context.Context) error {
	kinds := []func(context.Context) error{t.burst, t.deny, t.death, t.leave, t.revoke, t.hang, t.aloneDeath, t.aloneReload}
	for {
		for _, i := range t.random.Perm(len(kinds)) {
			if pause(ctx, time.Duration(1+t.random.IntN(4))*time.Second) != nil {
				for _, c := range t.loose {
					c.Close()
				}
				return nil
			}
			if err := kinds[i](ctx); err != nil {
				return err
			}
		}
	}
}

// pause waits, but not beyond the end.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

func (t *trouble) moment(ctx context.Context) {
	pause(ctx, time.Duration(500+t.random.IntN(1500))*time.Millisecond)
}

// burst changes the plan a hundred times within a second, in ways that forbid
// nobody anything: nobody may notice.
func (t *trouble) burst(ctx context.Context) error {
	a := t.journal.begin("plan changed 100 times in a second", nobody)
	defer t.journal.end(a)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for i := range 100 {
		if err := t.apply(func(p *plan.Mesh) {
			for j := range p.Services {
				p.Services[j].Allow = []plan.Rule{{Name: "soak/all", From: []string{"*"}}, {Name: fmt.Sprintf("soak/%d", i), From: []string{spiffe("nobody")}}}
			}
		}); err != nil {
			return err
		}
		<-tick.C
	}
	return nil
}

// deny forbids the guest the shop for a moment.
func (t *trouble) deny(ctx context.Context) error {
	a := t.journal.begin("caller denied", func(c *client) bool { return c.caller == "guest" && c.service == "shop" })
	defer t.journal.end(a)
	deny := func(rules []plan.Rule) error {
		return t.apply(func(p *plan.Mesh) { t.service("shop").Deny = rules })
	}
	if err := deny([]plan.Rule{{Name: "soak/never", From: []string{spiffe("guest")}}}); err != nil {
		return err
	}
	t.moment(ctx)
	return deny(nil)
}

// death ends a server of the shop with all it has open, and starts it again.
func (t *trouble) death(ctx context.Context) error {
	instance := []string{"shop-1", "shop-2"}[t.random.IntN(2)]
	s := t.boxes[instance].servers[served[t.random.IntN(len(served))]]
	a := t.journal.begin("server died: "+s.protocol, func(c *client) bool {
		return c.service == "shop" && ports[c.protocol] == ports[s.protocol]
	})
	defer t.journal.end(a)
	s.stop()
	t.moment(ctx)
	return s.start()
}

// leave takes an instance out of the plan and back: its connections go on, new
// ones go to the other, and nobody may notice.
func (t *trouble) leave(ctx context.Context) error {
	a := t.journal.begin("instance out of the plan and back", nobody)
	defer t.journal.end(a)
	gone := []string{"shop-1", "shop-2"}[t.random.IntN(2)]
	if err := t.apply(func(p *plan.Mesh) {
		s := t.service("shop")
		s.Endpoints = slices.DeleteFunc(slices.Clone(s.Endpoints), func(e plan.Endpoint) bool { return e.Instance == gone })
	}); err != nil {
		return err
	}
	t.moment(ctx)
	return t.apply(func(p *plan.Mesh) {
		s := t.service("shop")
		s.Endpoints = append(slices.Clone(s.Endpoints), t.boxes[gone].endpoint())
	})
}

// revoke cuts the guest off, and takes it back.
func (t *trouble) revoke(ctx context.Context) error {
	a := t.journal.begin("caller revoked", func(c *client) bool { return c.caller == "guest" })
	defer t.journal.end(a)
	cut := func(instances []string) error {
		t.epoch++
		for _, n := range t.nodes {
			if _, err := n.link.Cut(context.Background(), plan.Epoch{Number: t.epoch, Instances: instances}); err != nil {
				return err
			}
		}
		return nil
	}
	if err := cut([]string{"guest-1"}); err != nil {
		return err
	}
	t.moment(ctx)
	return cut(nil)
}

// hang leaves clients about that say half of something, or nothing: up to 40 at a
// time. The proxies are to bear and end them.
func (t *trouble) hang(context.Context) error {
	a := t.journal.begin("five slow or half-open clients", nobody)
	defer t.journal.end(a)
	for len(t.loose) > 35 {
		t.loose[0].Close()
		t.loose = t.loose[1:]
	}
	for range 5 {
		protocol := served[t.random.IntN(len(served))]
		c, err := t.boxes["web-1"].dial(fmt.Sprintf("%s:%d", t.service("still").Address, ports[protocol].Port))
		if err != nil {
			return fmt.Errorf("a slow client: %w", err)
		}
		half := map[string]string{"http1": "POST / HTTP/1.1\r\nHost: x\r\nContent-Le", "grpc": "PRI * HTTP/2.0\r\n", "bolt": "\x01\x01\x00\x01", "dubbo": "\xda\xbb\xc2", "tcp": "\x00\x00"}
		c.Write([]byte(half[protocol][:t.random.IntN(len(half[protocol])+1)]))
		if t.random.IntN(2) == 0 {
			c.(*net.TCPConn).CloseWrite()
		}
		t.loose = append(t.loose, c)
	}
	return nil
}

func (t *trouble) aloneDeath(ctx context.Context) error {
	s := t.alone.servers[t.random.IntN(len(t.alone.servers))]
	a := t.journal.begin("server died, alone: "+s.protocol, func(c *client) bool {
		return c.service == "alone" && (c.protocol == s.protocol || c.protocol == "http2" && s.protocol == "http1")
	})
	defer t.journal.end(a)
	s.stop()
	t.moment(ctx)
	return s.start()
}

func (t *trouble) aloneReload(ctx context.Context) error {
	a := t.journal.begin("reloaded ten times, alone", nobody)
	defer t.journal.end(a)
	for range 10 {
		if err := t.alone.reload(); err != nil {
			return err
		}
		pause(ctx, 50*time.Millisecond)
	}
	return nil
}
