// Package guest is PID 1 of a sandbox's virtual machine: it loads modules,
// attaches the Guard, and then does what the host asks over one virtio-serial
// port (package guestproto): mounts, network, processes, statistics.
//
// It is made to be small: raw system calls, one thread of control, one poll
// loop, buffers of fixed size, nothing allocated per frame or per byte of
// output. It decides nothing and keeps no secret; it must not import fmt, os,
// net or anything that brings them.
package guest
