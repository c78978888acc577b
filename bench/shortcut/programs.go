package main

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// Offsets into what the kernel shows each program (linux/bpf.h: bpf_sock_ops and
// sk_msg_md), and the numbers of what it is called for.
const (
	opsOp, opsFamily                = 0, 20
	opsFarIP, opsIP                 = 24, 28
	opsFarPort, opsPort             = 64, 68
	msgFarIP, msgIP                 = 20, 24
	msgFarPort, msgPort             = 60, 64
	connected, accepted, familyIPv4 = 4, 5, 2
	ingress                         = 1 // BPF_F_INGRESS
	mostSockets, tuple              = 1 << 14, 16
)

// shortcuts puts both ends of every connection that a cgroup's processes make among
// themselves, over 127.0.0.0/8, past TCP: what one end sends is queued at the other.
//
// It is the design as it would be in a node, with what it needs to be careful: a
// message whose other end is not known goes through TCP. It is here to be measured.
type shortcuts struct {
	sockets *ebpf.Map
	all     []interface{ Close() error }
}

// openShortcuts loads and attaches them. port is that of a listener whose connections
// are meant; 0 means all.
func openShortcuts(cgroup string, port uint16) (_ *shortcuts, err error) {
	s := &shortcuts{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open shortcuts: %w", err), s.Close())
		}
	}()
	s.sockets, err = ebpf.NewMap(&ebpf.MapSpec{Name: "sockets", Type: ebpf.SockHash, KeySize: tuple, ValueSize: 8, MaxEntries: mostSockets})
	if err != nil {
		return nil, err
	}
	s.all = append(s.all, s.sockets)
	ops, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "established", Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps, License: "GPL", Instructions: established(s.sockets.FD(), port)})
	if err != nil {
		return nil, err
	}
	s.all = append(s.all, ops)
	msg, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "sent", Type: ebpf.SkMsg, AttachType: ebpf.AttachSkMsgVerdict, License: "GPL", Instructions: sent(s.sockets.FD())})
	if err != nil {
		return nil, err
	}
	s.all = append(s.all, msg)
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: s.sockets.FD(), Program: msg, Attach: ebpf.AttachSkMsgVerdict}); err != nil {
		return nil, err
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupSockOps, Program: ops})
	if err != nil {
		return nil, err
	}
	s.all = append(s.all, l)
	return s, nil
}

// Close takes them away, from connections that use them too.
func (s *shortcuts) Close() (err error) {
	for i := len(s.all) - 1; i >= 0; i-- {
		err = errors.Join(err, s.all[i].Close())
	}
	s.all = nil
	return err
}

// forget takes all sockets out.
func (s *shortcuts) forget() error {
	for {
		var key [tuple]byte
		if err := s.sockets.NextKey(nil, &key); errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if err := s.sockets.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
}

// The key is a socket's own view: its address, the far one, its port and the far
// one, all as they are on the wire. R6 is the context, and the key lies at R10-16.
func key(ip, farIP, port, farPort int16) asm.Instructions {
	const at = -tuple
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, ip, asm.Word), asm.StoreMem(asm.R10, at, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, farIP, asm.Word), asm.StoreMem(asm.R10, at+4, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, port, asm.Word), asm.HostTo(asm.BE, asm.R1, asm.Word), asm.StoreMem(asm.R10, at+8, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, farPort, asm.Word), asm.StoreMem(asm.R10, at+12, asm.R1, asm.Word),
	}
}

func established(sockets int, port uint16) asm.Instructions {
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, opsOp, asm.Word),
		asm.JEq.Imm(asm.R1, connected, "new"),
		asm.JNE.Imm(asm.R1, accepted, "out"),
		asm.LoadMem(asm.R1, asm.R6, opsFamily, asm.Word).WithSymbol("new"),
		asm.JNE.Imm(asm.R1, familyIPv4, "out"),
		asm.LoadMem(asm.R1, asm.R6, opsIP, asm.Word),
		asm.And.Imm(asm.R1, 0xff), // the first of four bytes, on this processor
		asm.JNE.Imm(asm.R1, 127, "out"),
		asm.LoadMem(asm.R1, asm.R6, opsFarIP, asm.Word),
		asm.And.Imm(asm.R1, 0xff),
		asm.JNE.Imm(asm.R1, 127, "out"),
	}
	if port != 0 {
		wire := int32(binary.LittleEndian.Uint32(binary.BigEndian.AppendUint16([]byte{0, 0}, port)))
		code = append(code,
			asm.LoadMem(asm.R1, asm.R6, opsPort, asm.Word),
			asm.JEq.Imm(asm.R1, int32(port), "meant"),
			asm.LoadMem(asm.R1, asm.R6, opsFarPort, asm.Word),
			asm.JNE.Imm32(asm.R1, wire, "out"),
			asm.Mov.Imm(asm.R1, 0).WithSymbol("meant"))
	}
	code = append(code, key(opsIP, opsFarIP, opsPort, opsFarPort)...)
	return append(code,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, sockets),
		asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -tuple),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSockHashUpdate.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
		asm.Return(),
	)
}

// sent looks for the socket whose view is this one's, the other way round.
func sent(sockets int) asm.Instructions {
	code := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	code = append(code,
		asm.LoadMem(asm.R1, asm.R6, msgFarIP, asm.Word), asm.StoreMem(asm.R10, -tuple, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, msgIP, asm.Word), asm.StoreMem(asm.R10, -tuple+4, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, msgFarPort, asm.Word), asm.StoreMem(asm.R10, -tuple+8, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R6, msgPort, asm.Word), asm.HostTo(asm.BE, asm.R1, asm.Word), asm.StoreMem(asm.R10, -tuple+12, asm.R1, asm.Word),
	)
	return append(code,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, sockets),
		asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -tuple),
		asm.Mov.Imm(asm.R4, ingress),
		asm.FnMsgRedirectHash.Call(),
		asm.Mov.Imm(asm.R0, 1), // pass: where nobody was found nothing is redirected
		asm.Return(),
	)
}
