package handover

import (
	"fmt"
	"time"
)

// taker is the new process.
type taker struct {
	*conn
	build    func(*Load) (start func(), err error)
	patience time.Duration
}

func (t *taker) take() error {
	defer t.socket.Close()
	stop := t.during()
	defer stop()
	load := &Load{Version: Version}
	start, err := t.conversation(load)
	load.forget()
	if err != nil {
		load.close()
		return fmt.Errorf("take over: %w", err)
	}
	start()
	return nil
}

func (t *taker) conversation(load *Load) (start func(), err error) {
	if err := trusted(t.socket); err != nil {
		return nil, err
	}
	if err := t.send(t.patience, &message{Word: wordHello, Oldest: Oldest, Newest: Version}); err != nil {
		return nil, err
	}
	m, err := t.expect(t.patience, wordWelcome)
	if err != nil {
		return nil, err
	}
	if m.Version < Oldest || m.Version > Version {
		return nil, fmt.Errorf("version %d is not taken, %d to %d are", m.Version, Oldest, Version)
	}
	t.agreed, load.Version = m.Version, m.Version
	if err := t.load(load); err != nil {
		return nil, t.refuse(err)
	}
	if start, err = t.build(load); err != nil {
		return nil, t.refuse(err)
	}
	if err := t.send(t.patience, &message{Word: wordReady}); err != nil {
		return nil, err
	}
	if _, err := t.expect(t.patience, wordGo); err != nil {
		return nil, err
	}
	// If this is said, the other lets go, whatever becomes of either; if it
	// cannot be said, the other goes on.
	if err := t.send(t.patience, &message{Word: wordGoing}); err != nil {
		return nil, err
	}
	return start, nil
}

func (t *taker) refuse(err error) error {
	t.send(parting, &message{Word: wordRefused, Reason: err.Error()})
	return err
}

// load receives all items.
func (t *taker) load(load *Load) error {
	total := 0
	for {
		m, files, err := t.receive(t.patience)
		if err != nil {
			return fmt.Errorf("wait for items: %w", err)
		}
		switch m.Word {
		case wordEnd:
			if m.Count != len(load.Items) {
				return fmt.Errorf("%d items have come of %d", len(load.Items), m.Count)
			}
			return nil
		case wordItems:
		default:
			closeAll(files)
			return fmt.Errorf("wait for items: it says %.32q", m.Word)
		}
		memory := files[len(files)-1]
		bodies, err := sealedOut(memory, m.Items)
		memory.Close()
		if err != nil {
			closeAll(files[:len(files)-1])
			return err
		}
		for i, s := range m.Items {
			load.Items = append(load.Items, Item{Kind: s.Kind, Body: bodies[i], Files: files[:s.Files:s.Files]})
			files = files[s.Files:]
			total += s.Bytes
		}
		if len(load.Items) > maxItems || total > maxLoad {
			return fmt.Errorf("%d items of %d bytes are too much", len(load.Items), total)
		}
		if err := t.send(t.patience, &message{Word: wordMore}); err != nil {
			return err
		}
	}
}
