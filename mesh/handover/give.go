package handover

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// giver is the old process.
type giver struct {
	*conn
	hold     func(version int) (*Load, error)
	back     func(*Load) error
	gone     func(*Load)
	patience time.Duration
}

func (g *giver) give() error {
	defer g.socket.Close()
	if err := trusted(g.socket); err != nil {
		return fmt.Errorf("hand over: %w", err)
	}
	stop := g.during()
	defer stop()
	if err := g.greet(); err != nil {
		return fmt.Errorf("hand over: %w", g.refuse(err))
	}
	load, err := g.hold(g.agreed)
	if err != nil {
		return fmt.Errorf("hand over: %w", g.refuse(err))
	}
	defer load.forget()
	if err := g.pass(load); err != nil {
		// Told first: what goes on here must not be built there any further.
		err = g.refuse(err)
		g.socket.Close()
		return fmt.Errorf("hand over: %w", errors.Join(err, g.back(load)))
	}
	g.gone(load)
	return nil
}

func (g *giver) refuse(err error) error {
	g.send(parting, &message{Word: wordRefused, Reason: err.Error()})
	return err
}

// greet finds out whether the two understand each other, while everything still
// runs.
func (g *giver) greet() error {
	m, err := g.expect(g.patience, wordHello)
	if err != nil {
		return err
	}
	if m.Oldest > Version || m.Newest < least {
		return fmt.Errorf("versions %d to %d are given, %d to %d are taken", least, Version, m.Oldest, m.Newest)
	}
	g.agreed = min(Version, m.Newest)
	return g.send(g.patience, &message{Word: wordWelcome})
}

// pass returns nil if, and only if, the load is the other process's.
func (g *giver) pass(load *Load) error {
	if load.Version != g.agreed {
		return fmt.Errorf("the load is of version %d, and %d was agreed", load.Version, g.agreed)
	}
	for rest := load.Items; len(rest) > 0; {
		n, err := g.batch(rest)
		if err != nil {
			return err
		}
		rest = rest[n:]
	}
	if err := g.send(g.patience, &message{Word: wordEnd, Count: len(load.Items)}); err != nil {
		return err
	}
	if _, err := g.expect(g.patience, wordReady); err != nil {
		return err
	}
	if err := g.send(g.patience, &message{Word: wordGo}); err != nil {
		return err
	}
	_, err := g.expect(g.patience, wordGoing)
	if err != nil && g.isGoing() {
		return nil
	}
	return err
}

// isGoing finds out what the other process has decided when nothing was heard
// in time. Once this end takes no more messages, "going" is there or can never
// be said, and who cannot say it does not go.
func (g *giver) isGoing() bool {
	g.socket.CloseRead()
	g.ctx = context.Background() // what has been decided is known, whoever still wants to
	for range 3 {                // once an end may be told before what came ahead of it, and once a deadline
		if _, err := g.expect(g.patience, wordGoing); err == nil {
			return true
		}
	}
	return false
}

// batch sends the next items, and waits until they have been taken: descriptors
// on their way are counted by the kernel, and bounded.
func (g *giver) batch(items []Item) (n int, err error) {
	m := &message{Word: wordItems}
	var files []*os.File
	for total := 0; n < len(items) && n < maxBatch && total < wantBatch; n++ {
		i := items[n]
		if i.Kind == "" || len(i.Kind) > maxKind || len(i.Files) > MaxFiles || len(i.Body) > maxItem {
			return 0, fmt.Errorf("item %v is out of bounds", i)
		}
		if n > 0 && (len(files)+len(i.Files) > MaxFiles || total+len(i.Body) > maxItem) {
			break
		}
		m.Items = append(m.Items, size{i.Kind, len(i.Body), len(i.Files)})
		files = append(files, i.Files...)
		total += len(i.Body)
	}
	bodies, err := sealedIn(items[:n])
	if err != nil {
		return 0, err
	}
	defer bodies.Close()
	if err := g.send(g.patience, m, append(files, bodies)...); err != nil {
		return 0, err
	}
	_, err = g.expect(g.patience, wordMore)
	return n, err
}
