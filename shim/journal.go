package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/netns"
	"hauberk.dev/internal/strictjson"
	"hauberk.dev/vm"
)

const (
	journalName    = "hauberk.json"
	journalVersion = 1
	maxJournal     = 64 << 10
)

// journal is what a container's bundle says of its pod. That of the pod is
// written before the machine is, so that nothing is ever started and forgotten.
type journal struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Pod     string `json:"pod,omitempty"`
	Machine string `json:"machine"`
	Run     string `json:"run"`               // directory of the machines
	Socket  string `json:"socket,omitempty"`  // of the pod's shim
	Network string `json:"network,omitempty"` // namespace that the pod joined
}

func (j journal) write(bundle string) error {
	j.Version = journalVersion
	raw, err := json.MarshalIndent(j, "", "\t")
	if err == nil {
		err = atomicfile.Write(filepath.Join(bundle, journalName), append(raw, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
}

func readJournal(bundle string) (journal, error) {
	raw, err := readFile(filepath.Join(bundle, journalName), maxJournal)
	if err != nil {
		return journal{}, fmt.Errorf("read journal: %w", err)
	}
	return parseJournal(raw)
}

func parseJournal(raw []byte) (journal, error) {
	var j journal
	if err := strictjson.Decode(raw, maxJournal, &j); err != nil {
		return journal{}, fmt.Errorf("read journal: %w", err)
	}
	switch {
	case j.Version != journalVersion:
		return journal{}, fmt.Errorf("read journal: version %d: want %d", j.Version, journalVersion)
	case !filepath.IsAbs(j.Run) || !identifier.MatchString(j.Machine):
		return journal{}, fmt.Errorf("read journal: machine %.64q in %.256q: want a name in a directory", j.Machine, j.Run)
	case j.Network != "" && !filepath.IsAbs(j.Network) || j.Socket != "" && !filepath.IsAbs(j.Socket):
		return journal{}, fmt.Errorf("read journal: network %.256q, socket %.256q: want absolute paths", j.Network, j.Socket)
	}
	return j, nil
}

func removeJournal(bundle string) error {
	if err := os.Remove(filepath.Join(bundle, journalName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove journal: %w", err)
	}
	return nil
}

// remove ends what is left of a container that containerd gives up. If its shim
// died, that is the pod: machine, run directory and socket. If it lives, which
// containerd need not have noticed, the shim is told; one that hangs is killed if
// all of its pod is given up. It can be called again.
func remove(ctx context.Context, a arguments, c config) (*task.DeleteResponse, error) {
	r := &task.DeleteResponse{ExitStatus: 128 + 9, ExitedAt: timestamppb.Now()}
	j, err := journalOf(a, c)
	if err == nil {
		err = removeBy(ctx, a, c, j, r)
	}
	if err == nil {
		err = removeJournal(a.bundle)
	}
	if err != nil {
		return nil, fmt.Errorf("delete %s: %w", a.id, err)
	}
	return r, nil
}

func removeBy(ctx context.Context, a arguments, c config, j journal, r *task.DeleteResponse) error {
	k, err := c.take(j.Machine, true)
	if err != nil {
		return err
	}
	if k != nil && k.said == (entry{}) && j.Socket != "" && served(j.Socket) {
		err, k = k.drop(), nil // a shim of a version that made no claims
		if err != nil {
			return err
		}
	}
	if k == nil {
		if k, err = removeLiving(ctx, a, c, j, r); k == nil || err != nil {
			return err
		}
	}
	if j.Socket == "" {
		j.Socket = k.said.Socket
	}
	if j.Network == "" {
		j.Network = k.said.Network
	}
	pid, err := removePod(ctx, j)
	if err != nil {
		return errors.Join(err, k.leave())
	}
	r.Pid = pid
	return k.drop()
}

// removeLiving has a living shim end a container. If it dies meanwhile, or had
// begun to, its claim is returned.
func removeLiving(ctx context.Context, a arguments, c config, j journal, r *task.DeleteResponse) (*claim, error) {
	if j.Socket == "" {
		j.Socket = c.peek(j.Machine).Socket
	}
	if a.id == j.Pod || j.Pod == "" {
		if k, err := c.killHung(ctx, j.Machine); k != nil || err != nil {
			return k, err
		}
	}
	failed := dismiss(ctx, a, j, r)
	if failed == nil {
		return nil, nil
	}
	k, err := c.await(ctx, j.Machine, true)
	if k == nil && err == nil {
		err = failed
	}
	return k, err
}

// journalOf reads a container's journal. If its shim died before there was one,
// or all of it is removed, names are known all the same.
func journalOf(a arguments, c config) (journal, error) {
	socket, err := readAddress(a.bundle)
	if err != nil {
		return journal{}, err
	}
	j, err := readJournal(a.bundle)
	if errors.Is(err, fs.ErrNotExist) {
		b, err := readBundle(a.bundle, a.id)
		shim := a
		shim.id = b.pod
		return journal{ID: a.id, Pod: b.pod, Machine: machineID(shim), Run: c.machines(), Socket: socket}, err
	}
	if j.Socket == "" {
		j.Socket = socket
	}
	return j, err
}

// removePod ends the machine of a pod whose shim is dead, and removes the socket
// if nobody serves it. It returns the process that the machine was.
func removePod(ctx context.Context, j journal) (pid uint32, err error) {
	found, err := vm.Orphans(j.Run)
	if err != nil {
		return 0, err
	}
	for _, o := range found {
		if o.ID != j.Machine {
			continue
		}
		pid = uint32(o.Journal.PID)
		if err := o.End(ctx); err != nil {
			return pid, err
		}
	}
	if j.Network != "" {
		if err := netns.Leave(j.Network); err != nil {
			return pid, err
		}
	}
	return pid, removeSocket(j.Socket)
}

// dismissTime is how long a living shim may take to end a container.
const dismissTime = mercy + 5*time.Second

// dismiss has a living shim end one container. One that does not is killed.
func dismiss(ctx context.Context, a arguments, j journal, r *task.DeleteResponse) error {
	bounded, cancel := context.WithTimeout(ctx, dismissTime)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(bounded, "unix", j.Socket)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	shim := task.NewTTRPCTaskClient(client)
	_, err = shim.Kill(bounded, &task.KillRequest{ID: a.id, Signal: uint32(syscall.SIGKILL), All: true})
	if err == nil {
		_, err = shim.Wait(bounded, &task.WaitRequest{ID: a.id})
	}
	if err == nil || status.Code(err) == codes.NotFound { // not here, or ended
		var d *task.DeleteResponse
		if d, err = shim.Delete(bounded, &task.DeleteRequest{ID: a.id}); err == nil {
			r.Pid, r.ExitStatus, r.ExitedAt = d.Pid, d.ExitStatus, d.ExitedAt
		}
	}
	if err == nil || status.Code(err) == codes.NotFound {
		// If that was its last, it ends.
		_, _ = shim.Shutdown(bounded, &task.ShutdownRequest{ID: a.id})
		return nil
	}
	return err
}
