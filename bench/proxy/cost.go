package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"hauberk.dev/bench/stages"
	"hauberk.dev/mesh/alone"
)

// profiled is the first argument of this program when it is the proxy itself, whose
// time is taken down: hauberk-mesh can do no such thing, as what it does with keys is
// nobody's business.
const profiled = "profiled"

// beProxy serves a file as hauberk-mesh -c does, until it is asked to end.
func beProxy(args []string) error {
	if len(args) < 2 {
		return errors.New("profiled takes a configuration and where the profile goes")
	}
	c, err := alone.Load(args[0])
	if err != nil {
		return err
	}
	p, err := alone.Open(c, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return stages.Profile(ctx, args[1], p.Run)
}

// costly is how many times longer than a comparison a profile is: it has a sample
// every 10 ms of processor time.
const costly = 4

// costs takes, for each thing spoken, what a request of 1 KiB costs when as many
// go through as can, and where that goes. Each has a proxy of its own.
func (b *bench) costs(ctx context.Context) (out []stages.Cost, err error) {
	if err := certify(b.dir); err != nil {
		return nil, err
	}
	origins, err := openOrigins()
	defer func() {
		for _, o := range origins {
			err = errors.Join(err, o.Close())
		}
	}()
	if err != nil {
		return nil, err
	}
	for _, spoken := range b.spoken {
		c, err := b.cost(ctx, spoken, origins)
		if err != nil {
			return out, fmt.Errorf("%s: %w", spoken, err)
		}
		out = append(out, c)
	}
	return out, nil
}

func (b *bench) cost(ctx context.Context, spoken string, origins map[string]*origin) (c stages.Cost, err error) {
	self, err := os.Executable()
	if err != nil {
		return c, err
	}
	to := b.path("cpu." + spoken)
	p := &proxy{name: "hauberk-mesh", words: []string{self, profiled, b.path("mesh.yaml"), to}, told: map[string]string{"mesh.yaml": meshConfig}}
	if err := b.tell(p, origins); err != nil {
		return c, err
	}
	if p.ports[spoken] == "" {
		return c, errors.New("the proxy does not speak it")
	}
	defer p.close()
	if err := b.begin(ctx, p, origins); err != nil {
		return c, err
	}
	shown, err := tls.LoadX509KeyPair(b.path("chain.pem"), b.path("key.pem"))
	if err != nil {
		return c, err
	}
	w := &way{name: p.name, address: p.ports[spoken], spoken: spoken, kib: 1, shown: &shown, proxy: p}
	defer w.close()
	if err := w.open(ctx); err != nil {
		return c, err
	}
	if err := w.turn(ctx, costly*b.turn*time.Duration(b.turns), 0); err != nil {
		return c, err
	}
	w.close()
	p.end()
	c = stages.Cost{What: fmt.Sprintf("hauberk-mesh alone, %s, 1 KiB, all that goes through, %d processors", spoken, b.cores), Requests: len(w.times)}
	c.Each = w.spent / time.Duration(max(1, len(w.times)))
	if c.Shares, err = stages.Read(to); err != nil {
		err = fmt.Errorf("%w: %s", err, p.said.Bytes())
	}
	return c, err
}
