package qemu

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/vm"
)

// seals keep a template from ever changing: a machine that broke out of its
// QEMU holds the file that all later clones start from.
const seals = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL

// Template boots a guest up to its agent and freezes it, or returns the
// template of the same key made before. Templates beyond the driver's number
// are closed, the least recently used first.
func (d *Driver) Template(ctx context.Context, spec vm.TemplateSpec, progress func(string)) (*vm.Template, error) {
	if err := spec.Check(); err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	if progress == nil {
		progress = func(string) {}
	}
	d.making.Lock()
	defer d.making.Unlock()
	k := d.key(spec)
	if t := d.known(k); t != nil {
		return t, nil
	}
	ctx, cancel := context.WithTimeout(ctx, templateDeadline)
	defer cancel()
	began := time.Now()
	progress(fmt.Sprintf("boot template %.12s with %d MiB (%s)", k, spec.MemoryMiB, d.config.Accelerator))
	t, err := d.freeze(ctx, k, spec)
	if err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	progress(fmt.Sprintf("template %.12s is ready after %.1f s", k, time.Since(began).Seconds()))
	d.keep(t)
	return t, nil
}

func (d *Driver) key(spec vm.TemplateSpec) string { return key(d.version, d.shape(spec), spec) }

func (d *Driver) origin(spec vm.TemplateSpec) vm.Origin {
	return origin(d.version, d.shape(spec), spec)
}

// known returns a template made before and notes its use.
func (d *Driver) known(k string) *vm.Template {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := slices.IndexFunc(d.templates, func(t *vm.Template) bool { return t.Key == k })
	if i < 0 {
		return nil
	}
	t := d.templates[i]
	d.templates = append(slices.Delete(d.templates, i, i+1), t)
	return t
}

func (d *Driver) keep(t *vm.Template) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.templates) >= d.config.MaxTemplates {
		d.templates[0].Close()
		d.templates = slices.Delete(d.templates, 0, 1)
	}
	d.templates = append(d.templates, t)
}

// freeze makes a template: memory in a file of its own, the devices' state in
// another, both sealed once QEMU has let go of them.
func (d *Driver) freeze(ctx context.Context, k string, spec vm.TemplateSpec) (_ *vm.Template, err error) {
	memory, err := memfd("template", int64(spec.MemoryMiB)<<20)
	if err != nil {
		return nil, err
	}
	state, err := memfd("state", 0)
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, memory.Close(), state.Close())
		}
	}()
	machine := vm.Spec{
		ID:  "template-" + strings.ToLower(rand.Text()[:10]),
		UID: d.config.UID, GID: d.config.GID, Template: spec,
	}
	m, mon, err := d.boot(ctx, machine, roleTemplate, memory)
	if err != nil {
		return nil, err
	}
	err = d.config.Ready(ctx, m)
	if err == nil {
		err = save(ctx, mon, state)
	}
	if err != nil {
		if m.Err() != nil {
			err = fmt.Errorf("%w: %w", err, m.Err())
		}
		if said := m.Console(); said != "" {
			err = fmt.Errorf("%w: guest says %s", err, said)
		}
	}
	// QEMU has nothing left to do. It must be gone before the seals, which
	// refuse memory that anyone maps to write.
	if err := errors.Join(err, m.Kill(context.WithoutCancel(ctx))); err != nil {
		return nil, err
	}
	for _, f := range []*os.File{memory, state} {
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			return nil, fmt.Errorf("seal template: %w", err)
		}
	}
	return vm.NewTemplate(k, d.commandLine, memory, state), nil
}

// save stops the guest and writes its devices' state, memory left out.
func save(ctx context.Context, mon *monitor, state *os.File) error {
	if err := ignoreShared(ctx, mon, true); err != nil {
		return err
	}
	if err := mon.Pause(ctx); err != nil {
		return err
	}
	return migrate(ctx, mon, state)
}

// migrate writes the state of a guest that stands still.
func migrate(ctx context.Context, mon *monitor, state *os.File) error {
	if err := mon.execute(ctx, "getfd", map[string]string{"fdname": "state"}, nil, state); err != nil {
		return err
	}
	if err := mon.execute(ctx, "migrate", map[string]string{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	return await(ctx, func() (bool, error) {
		var s struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		if err := mon.execute(ctx, "query-migrate", nil, &s); err != nil {
			return false, err
		}
		if s.Status == "failed" || s.Status == "cancelled" {
			return false, fmt.Errorf("save state: %s: %q", s.Status, clip(s.Error))
		}
		return s.Status == "completed", nil
	})
}

// ignoreShared keeps the memory out of the state, where it is in its file.
func ignoreShared(ctx context.Context, mon *monitor, ignore bool) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	return mon.execute(ctx, "migrate-set-capabilities",
		map[string][]capability{"capabilities": {{"x-ignore-shared", ignore}}}, nil)
}

// Clone starts a machine from a template.
func (d *Driver) Clone(ctx context.Context, t *vm.Template, spec vm.Spec) (*vm.Machine, error) {
	if err := spec.Check(); err != nil {
		return nil, fmt.Errorf("clone machine %q: %w", spec.ID, err)
	}
	if want := d.key(spec.Template); t.Key != want {
		return nil, fmt.Errorf("clone machine %s: %w: its key is %.12s, the machine needs %.12s",
			spec.ID, vm.ErrWrongTemplate, t.Key, want)
	}
	var m *vm.Machine
	err := t.Use(func(memory, state *os.File) error {
		// A file position of its own for every clone.
		own, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", state.Fd()))
		if err != nil {
			return err
		}
		defer own.Close()
		if spec.Shared {
			if memory, err = copyMemory(memory); err != nil {
				return err
			}
			defer memory.Close()
		}
		m, _, err = d.launch(ctx, launch{
			spec: spec, role: roleClone, memory: memory, template: t.Key,
			begin: func(ctx context.Context, mon *monitor) error { return restore(ctx, mon, own, true) },
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("clone machine %s: %w", spec.ID, err)
	}
	return m, nil
}

// restore reads the devices' state, and the memory unless that is there.
func restore(ctx context.Context, mon *monitor, state *os.File, ignoreMemory bool) error {
	if err := ignoreShared(ctx, mon, ignoreMemory); err != nil {
		return err
	}
	// QEMU would announce the devices' hardware addresses, as if the template
	// had moved here; the guest uses others, and to a fence it looks like lying.
	if err := mon.execute(ctx, "migrate-set-parameters", map[string]int{"announce-rounds": 0}, nil); err != nil {
		return err
	}
	if err := mon.execute(ctx, "getfd", map[string]string{"fdname": "state"}, nil, state); err != nil {
		return err
	}
	if err := mon.execute(ctx, "migrate-incoming", map[string]string{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	err := await(ctx, func() (bool, error) {
		s, err := mon.status(ctx)
		return s != "inmigrate", err
	})
	if err != nil {
		return fmt.Errorf("restore state: %w", err)
	}
	return nil
}

// openBlob opens a file to boot from and checks that it is the right one.
func openBlob(what string, b vm.Blob) (*os.File, error) {
	f, err := os.Open(b.Path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", what, err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", what, err), f.Close())
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != b.Digest {
		return nil, errors.Join(fmt.Errorf("open %s: %s has digest %s, not %s", what, b.Path, got, b.Digest), f.Close())
	}
	return f, nil
}
