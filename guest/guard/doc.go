// Package guard attaches the Guard's programs to the kernel it runs in and
// keeps them fed with policy, by raw bpf(2) calls: it is the half of Hauberk's
// room guard that runs in PID 1 of a guest.
//
// It decides nothing. What may happen is in the policy that the host compiled;
// paths in it become objects here, for only here do they mean anything. It
// must stay free of fmt, os and net, as all of PID 1.
package guard
