package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/flock"
	"hauberk.dev/internal/strictjson"
	"hauberk.dev/shim/client"
)

const (
	recordVersion = 1
	maxRecord     = 4 << 20
)

// record is what lies on the disk of a sandbox. It is written before what it
// speaks of is done, so nothing is ever made and forgotten.
type record struct {
	Version int     `json:"version"`
	Options Options `json:"options"`
	Info    Info    `json:"info"`
	// Made says that the shim has made it; before, it can only be removed.
	Made bool  `json:"made"`
	Exit *Exit `json:"exit,omitempty"`
	// Process that Exec's take after: environment, directory and user.
	Process process `json:"process"`
	// Image is the packed one that its root is on.
	Image Image `json:"image,omitzero"`
}

// Exit is how a sandbox or a process in it ended.
type Exit struct {
	Code   int       `json:"code"`
	At     time.Time `json:"at"`
	Reason string    `json:"reason,omitempty"`
}

func (b *Sandbox) write(r record) error {
	r.Version = recordVersion
	raw, err := json.MarshalIndent(r, "", "\t")
	if err == nil {
		err = atomicfile.Write(b.recordFile(), append(raw, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write record of %s: %w", b.id, err)
	}
	return nil
}

func (b *Sandbox) read() (record, error) {
	raw, err := os.ReadFile(b.recordFile())
	if errors.Is(err, fs.ErrNotExist) {
		if !b.exists() {
			return record{}, fmt.Errorf("%s: %w", b.id, ErrNotFound)
		}
		return record{}, fmt.Errorf("read record of %s: what made it was killed: remove it", b.id)
	}
	if err != nil {
		return record{}, fmt.Errorf("read record of %s: %w", b.id, err)
	}
	var r record
	if err := strictjson.Decode(raw, maxRecord, &r); err != nil {
		return record{}, fmt.Errorf("read record of %s: %w", b.id, err)
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("read record of %s: version %d: want %d", b.id, r.Version, recordVersion)
	}
	return r, nil
}

// lost is the exit of a sandbox whose shim or machine is no more.
const lost = 137

// Info says how a sandbox is. If it has ended since somebody last looked, that
// is noted.
func (b *Sandbox) Info(ctx context.Context) (Info, error) {
	r, err := b.read()
	if err != nil {
		return Info{}, err
	}
	if r.Exit != nil {
		return r.info(), nil
	}
	st, err := b.ask(ctx)
	switch {
	case errors.Is(err, client.ErrGone), errors.Is(err, client.ErrNotFound):
		return b.unanswered(ctx)
	case err != nil:
		return Info{}, fmt.Errorf("ask for %s: %w", b.id, err)
	case st.Phase == client.Stopped:
		return b.settled(ctx, r)
	}
	i := r.info()
	i.Phase, i.PID = Phase(st.Phase), st.PID
	return i, nil
}

// ask asks the shim for the container's state.
func (b *Sandbox) ask(ctx context.Context) (client.State, error) {
	s, err := client.Dial(ctx, b.bundle())
	if err != nil {
		return client.State{}, err
	}
	defer s.Close()
	return s.State(ctx, b.id, "")
}

// unanswered tells a sandbox that is being made from one that is lost.
func (b *Sandbox) unanswered(ctx context.Context) (Info, error) {
	unlock, err := b.tryLock()
	if err != nil {
		return Info{}, err
	}
	if unlock == nil { // somebody is at it
		r, err := b.read()
		i := r.info()
		if err == nil && !r.Made {
			i.Phase = Creating
		}
		return i, err
	}
	defer unlock()
	r, err := b.read() // it may have changed
	if err != nil {
		return Info{}, err
	}
	if r.Exit != nil || !r.Made {
		return r.info(), nil
	}
	if _, err := b.settle(ctx, r); err != nil {
		return Info{}, err
	}
	return b.Info(ctx)
}

// settled notes an end that nobody waits for.
func (b *Sandbox) settled(ctx context.Context, r record) (Info, error) {
	if unlock, err := b.flock(flock.Try, ".watch"); err != nil {
		return Info{}, err
	} else if unlock == nil {
		i := r.info() // who waits for it will settle it
		i.Phase = Exited
		return i, nil
	} else {
		defer unlock()
	}
	unlock, err := b.lock(ctx)
	if err != nil {
		return Info{}, err
	}
	if r, err = b.read(); err == nil && r.Exit == nil {
		r, err = b.settle(ctx, r)
	}
	unlock()
	return r.info(), err
}

func (r record) info() Info {
	i := r.Info
	switch {
	case r.Exit != nil:
		code := r.Exit.Code
		i.Phase, i.Ended, i.ExitCode, i.Reason = Exited, r.Exit.At, &code, r.Exit.Reason
	case !r.Made:
		i.Phase, i.Reason = Broken, "what made it was killed"
	case i.Started.IsZero():
		i.Phase = Created
	default:
		i.Phase = Running
	}
	return i
}
