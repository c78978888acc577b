package share

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"

	"hauberk.dev/api/node"
	"hauberk.dev/internal/unixsock"
)

// What a hook, or a person, asks of the loader: one packet each way.
const (
	opBind   = "bind"
	opUnbind = "unbind"
	opPolicy = "policy"
	opStatus = "status"

	maxPacket = 128 << 10
	maxFiles  = 2 // the root and the cgroup
)

type request struct {
	Op string `json:"op"`
	// ID is the runtime's name of the container.
	ID string `json:"id"`
	// Policies all hold; none is the baseline.
	Policies []node.NamedGuardPolicy `json:"policies,omitempty"`
	// Devices are kind (S_IFCHR or S_IFBLK), major and minor.
	Devices [][3]uint32 `json:"devices,omitempty"`
}

// Answer says what became of it.
type Answer struct {
	Error string `json:"error,omitempty"`
	// Owner is the Guard's number of the container; events name it.
	Owner      uint32 `json:"owner,omitempty"`
	Generation uint32 `json:"generation,omitempty"`
	Digest     string `json:"digest,omitempty"`
	Programs   int    `json:"programs,omitempty"` // that are attached
	Denied     uint64 `json:"denied,omitempty"`   // records of denials so far, of all containers
	// Absent are rules of which a path was not there: they hold for what will be.
	Absent []string `json:"absent,omitempty"`
}

var containerID = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_+.-]{0,254}$`)

func (r *request) check() error {
	if !containerID.MatchString(r.ID) {
		return fmt.Errorf("container %q: want a name as runtimes give", r.ID)
	}
	return nil
}

// ask sends a request with its descriptors and gives the answer.
func ask(socket string, r request, files ...*os.File) (Answer, error) {
	var a Answer
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return a, fmt.Errorf("ask the loader: %w", err)
	}
	defer conn.Close()
	packet, err := json.Marshal(r)
	if err != nil {
		return a, err
	}
	if len(packet) > maxPacket {
		return a, fmt.Errorf("%s %s: the policies take %d bytes, at most %d are taken", r.Op, r.ID, len(packet), maxPacket)
	}
	if err := unixsock.Send(conn, packet, files...); err != nil {
		return a, fmt.Errorf("%s %s: %w", r.Op, r.ID, err)
	}
	buf := make([]byte, maxPacket)
	n, err := conn.Read(buf)
	if err != nil {
		return a, fmt.Errorf("%s %s: read answer: %w", r.Op, r.ID, err)
	}
	if err := json.Unmarshal(buf[:n], &a); err != nil {
		return a, fmt.Errorf("%s %s: read answer: %w", r.Op, r.ID, err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// heard reads one request and its descriptors.
func heard(conn *net.UnixConn) (r request, files []*os.File, err error) {
	packet, files, err := unixsock.NewInbox(maxPacket, maxFiles).Receive(conn)
	if err != nil {
		return r, nil, err
	}
	r, err = parseRequest(packet)
	return r, files, err
}

// parseRequest is strict: what is not understood is not done in part.
func parseRequest(b []byte) (r request, err error) {
	if err := strict(b, &r); err != nil {
		return r, fmt.Errorf("read request: %w", err)
	}
	return r, r.check()
}
