// Package divert sends what the processes of a cgroup dial to the listener of a
// proxy: for processes that share a kernel with their node, what TPROXY does at
// the tap of a guest. The proxy asks each connection for SO_ORIGINAL_DST, as
// behind netfilter, and needs no right for it; the process sees the peer it
// asked for. Nothing else of the cgroup leaves the machine: datagrams, raw
// sockets and IPv6 are dropped and counted by destination.
//
// Loopback is left alone. It decides nothing about who may call whom, and it
// takes nothing in: what comes from elsewhere than loopback, the machine's other
// addresses too, is dropped before the processes' sockets have it. A
// socket belongs to the cgroup in which it was made, so who is put into one
// later, or is handed a socket, is not held for that.
package divert

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

//go:generate clang -O2 -g -Wall -Werror -target bpf -D__TARGET_ARCH_x86 -fdebug-prefix-map=$PWD=. -fdebug-compilation-dir=. -I/usr/include/x86_64-linux-gnu -c src/divert.bpf.c -o src/divert.o
//go:generate llvm-strip -g src/divert.o

//go:embed src/divert.o
var object []byte

// Options say what is sent where.
type Options struct {
	// Cgroup is the directory, of cgroup v2, of the processes; Opener that of who
	// opened the listener, to which its connections belong whoever accepts them.
	Cgroup, Opener string
	// Listener is where the proxy listens, at an address of 127.0.0.0/8.
	Listener netip.AddrPort
	// Source is the address of 127.0.0.0/8 that the proxy sees them call from.
	Source netip.Addr
	// Pins is a directory on a BPF file system, of this diversion alone, that
	// keeps it in force until Remove, whatever becomes of this process. A
	// diversion that is there already gives way without a gap, and stays if the
	// new one cannot be kept. Connections under way go on, but what is known of
	// them ends with the old one: their processes see the listener as their
	// peer, and one that the proxy has not asked about yet has no original
	// destination, which a proxy must refuse.
	Pins string
}

func (o Options) check() error {
	if o.Cgroup == "" || o.Opener == "" {
		return errors.New("want the cgroups of the processes and of who opened the listener")
	}
	for _, a := range []netip.Addr{o.Listener.Addr(), o.Source} {
		if !a.Is4() || !a.IsLoopback() {
			return fmt.Errorf("%q is not an address of 127.0.0.0/8", a)
		}
	}
	if o.Listener.Port() == 0 {
		return errors.New("want the port of the proxy's listener")
	}
	return nil
}

// Diversion is in force until Close, or until its process ends; where it is
// pinned, until Remove.
type Diversion struct {
	all   *ebpf.Collection
	links []link.Link
}

// Attach diverts. The fence is there before the first connection is diverted.
func Attach(o Options) (*Diversion, error) {
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("divert %s: %w", o.Cgroup, err)
	}
	all, err := load(o)
	if err != nil {
		return nil, fmt.Errorf("divert %s: %w", o.Cgroup, err)
	}
	d := &Diversion{all: all}
	var names []string
	for _, p := range []struct {
		program, cgroup string
		at              ebpf.AttachType
	}{
		{"fence", o.Cgroup, ebpf.AttachCGroupInetEgress},
		{"gate", o.Cgroup, ebpf.AttachCGroupInetIngress},
		{"original", o.Opener, ebpf.AttachCGroupGetsockopt},
		{"taken", o.Opener, ebpf.AttachCGroupSockOps},
		{"established", o.Cgroup, ebpf.AttachCGroupSockOps},
		{"peer4", o.Cgroup, ebpf.AttachCgroupInet4GetPeername},
		{"peer6", o.Cgroup, ebpf.AttachCgroupInet6GetPeername},
		{"divert4", o.Cgroup, ebpf.AttachCGroupInet4Connect},
		{"divert6", o.Cgroup, ebpf.AttachCGroupInet6Connect},
	} {
		l, err := link.AttachCgroup(link.CgroupOptions{Path: p.cgroup, Attach: p.at, Program: all.Programs[p.program]})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("divert %s: attach %s to %s: %w", o.Cgroup, p.program, p.cgroup, err), d.Close())
		}
		d.links = append(d.links, l)
		names = append(names, p.program)
	}
	if o.Pins == "" {
		return d, nil
	}
	if err := d.pin(o.Pins, names); err != nil {
		return nil, errors.Join(fmt.Errorf("divert %s: keep it: %w", o.Cgroup, err), d.Close())
	}
	return d, nil
}

// pin puts the links in place of those that are pinned there. Both are in force
// meanwhile, which diverts no more than once: the other finds an address of
// loopback.
func (d *Diversion) pin(dir string, names []string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// First all beside those that are there, which stay if it fails.
	for i, name := range names {
		path := filepath.Join(dir, fresh+name)
		err := os.Remove(path) // of one that was interrupted
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = d.links[i].Pin(path)
		}
		if err != nil {
			return errors.Join(err, unpin(dir, names[:i]))
		}
	}
	// Who diverts gives way before who tells the proxy where to, the fence last.
	for i, name := range slices.Backward(names) {
		if err := replace(filepath.Join(dir, name), filepath.Join(dir, fresh+name)); err != nil {
			return errors.Join(err, unpin(dir, names[:i+1]))
		}
	}
	return nil
}

// replace puts a pin in the place of another, and ends what was pinned there: left
// to itself the kernel does so in its own time, and in any order.
func replace(path, by string) error {
	old, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return os.Rename(by, path)
	}
	if err != nil {
		return err
	}
	defer old.Close()
	if err := os.Rename(by, path); err != nil {
		return err
	}
	return old.Detach()
}

// fresh begins the name of a pin that is not in its place yet.
const fresh = "new-"

func unpin(dir string, names []string) (err error) {
	for _, name := range names {
		err = errors.Join(err, os.Remove(filepath.Join(dir, fresh+name)))
	}
	return err
}

// Remove ends a diversion that was pinned, a moment later. One that is not there is no error.
func Remove(pins string) error {
	entries, err := os.ReadDir(pins)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("end diversion: %w", err)
	}
	last := func(e fs.DirEntry) int { // the fence and the gate
		switch strings.TrimPrefix(e.Name(), fresh) {
		case "fence", "gate":
			return 1
		}
		return 0
	}
	slices.SortStableFunc(entries, func(a, b fs.DirEntry) int { return last(a) - last(b) })
	for _, e := range entries {
		if err := os.Remove(filepath.Join(pins, e.Name())); err != nil {
			return fmt.Errorf("end diversion: %w", err)
		}
	}
	if err := os.Remove(pins); err != nil {
		return fmt.Errorf("end diversion: %w", err)
	}
	return nil
}

func load(o Options) (*ebpf.Collection, error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read object: %w", err)
	}
	listener, source := o.Listener.Addr().As4(), o.Source.As4()
	for name, bytes := range map[string][]byte{"listener_address": listener[:], "source_address": source[:],
		"listener_port": binary.BigEndian.AppendUint16(nil, o.Listener.Port())} {
		v := spec.Variables[name]
		if v == nil {
			return nil, fmt.Errorf("the object has no %s", name)
		}
		if err := v.Set(bytes); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	all, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	return all, nil
}

// Attempt is what tried to leave around the proxy.
type Attempt struct {
	Protocol    uint8          // IP protocol number
	Destination netip.AddrPort // invalid of IPv6
	Count       uint64         // of packets, or of calls refused
}

// attemptKey is struct attempt of the programs.
type attemptKey struct {
	Address           [4]byte
	Port              [2]byte
	Protocol, Version uint8
}

// Around tells what tried to leave around the proxy so far: up to 256
// destinations and protocols. For new ones the kernel forgets about the oldest,
// and may do so a little before there are as many.
func (d *Diversion) Around() ([]Attempt, error) {
	var out []Attempt
	var key attemptKey
	var count uint64
	all := d.all.Maps["around"].Iterate()
	for all.Next(&key, &count) {
		a := Attempt{Protocol: key.Protocol, Count: count}
		if key.Version == 4 {
			a.Destination = netip.AddrPortFrom(netip.AddrFrom4(key.Address), binary.BigEndian.Uint16(key.Port[:]))
		}
		out = append(out, a)
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, fmt.Errorf("read what went around the proxy: %w", err)
	}
	slices.SortFunc(out, func(a, b Attempt) int { return a.Destination.Compare(b.Destination) })
	return out, nil
}

// Close ends the diversion, if it is not pinned; the fence goes last.
func (d *Diversion) Close() error {
	var errs []error
	for _, l := range slices.Backward(d.links) {
		errs = append(errs, l.Close())
	}
	d.links = nil
	d.all.Close()
	return errors.Join(errs...)
}
