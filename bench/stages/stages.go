// Package stages says where a proxy's processor time goes: it groups the samples of
// a CPU profile by what was being done. It reads profiles of Go programs of this
// tree and knows their functions by name; it judges nothing.
package stages

import (
	"cmp"
	"context"
	"errors"
	"os"
	"runtime/pprof"
	"slices"
	"strings"
	"time"
)

// Share is what one stage took.
type Share struct {
	Stage   string        `json:"stage"`
	Time    time.Duration `json:"nanoseconds"`
	Samples int           `json:"samples"`
}

// Other is what no rule knows.
const Other = "other"

// rules are looked at in order for each frame, innermost frame first: a read that
// TLS asks for is a read, bytes that a parser copies are copying.
var rules = []struct {
	stage    string
	prefixes []string
}{
	{"system call: read", []string{"syscall.read", "syscall.Read", "syscall.recv", "syscall.Recv", "golang.org/x/sys/unix.Recv", "golang.org/x/sys/unix.Read", "internal/poll.(*FD).RawRead"}},
	{"system call: write", []string{"syscall.write", "syscall.Write", "syscall.send", "syscall.Send", "syscall.writev", "internal/poll.writev", "golang.org/x/sys/unix.Send", "golang.org/x/sys/unix.Write", "internal/poll.(*FD).RawWrite"}},
	{"system call: splice", []string{"internal/syscall/unix.Splice", "syscall.Splice", "golang.org/x/sys/unix.Splice", "internal/poll.splice"}},
	{"system call: epoll", []string{"internal/runtime/syscall.Epoll", "internal/runtime/syscall/linux.Epoll", "runtime.netpoll"}},
	{"system call: other", []string{"syscall.connect", "syscall.accept", "syscall.Close", "syscall.close", "syscall.setsockopt", "syscall.Setsockopt", "syscall.getsockopt", "syscall.socket", "syscall.shutdown", "golang.org/x/sys/unix."}},
	{"memory and collector", []string{"runtime.gc", "runtime.mallocgc", "runtime.newobject", "runtime.makeslice", "runtime.growslice", "runtime.bgsweep", "runtime.bgscavenge",
		"runtime.memclr", "runtime.scanobject", "runtime.greyobject", "runtime.wbBuf", "runtime.(*mcache)", "runtime.(*mheap)", "runtime.(*sweep", "runtime.(*gc"}},
	{"copying", []string{"runtime.memmove", "runtime.typedmemmove", "runtime.slicecopy"}},
	{"timers and deadlines", []string{"internal/poll.setDeadline", "internal/poll.runtime_pollSetDeadline", "runtime.(*timer", "runtime.resettimer", "runtime.modtimer", "time.", "runtime.nanotime", "runtime.walltime"}},
	{"scheduler", []string{"runtime.futex", "runtime.mcall", "runtime.park_m", "runtime.schedule", "runtime.findRunnable", "runtime.goready", "runtime.ready", "runtime.wakep", "runtime.startm",
		"runtime.stopm", "runtime.gopark", "runtime.semrelease", "runtime.semacquire", "runtime.sysmon", "runtime.mstart", "runtime.goexit0", "runtime.newproc", "runtime.usleep",
		"runtime.chansend", "runtime.chanrecv", "runtime.selectgo", "runtime.lock", "runtime.unlock", "runtime.exitsyscall", "runtime.entersyscall", "runtime.reentersyscall", "runtime.casgstatus", "internal/sync.", "sync."}},
	{"TLS", []string{"hauberk.dev/mesh/tls13.", "crypto/", "golang.org/x/crypto/", "vendor/golang.org/x/crypto/"}},
	{"parsing and writing of protocols", []string{"hauberk.dev/mesh/http1.", "hauberk.dev/mesh/http2.", "hauberk.dev/mesh/h2frame.", "hauberk.dev/mesh/hbone.", "hauberk.dev/mesh/bolt.", "hauberk.dev/mesh/dubbo.",
		"hauberk.dev/mesh/hessian.", "hauberk.dev/mesh/wire.", "hauberk.dev/mesh/sni.", "hauberk.dev/mesh/proxyproto.", "hauberk.dev/mesh/dns."}},
	{"routing and policy", []string{"hauberk.dev/mesh/route.", "hauberk.dev/mesh/balance.", "hauberk.dev/mesh/inspect.", "hauberk.dev/mesh/ratelimit.", "hauberk.dev/mesh/cache.", "hauberk.dev/policy", "hauberk.dev/plan",
		"regexp.", "hauberk.dev/mesh/alone.(*route", "hauberk.dev/mesh/alone.(*upstream", "hauberk.dev/mesh/alone.(*table"}},
	{"metrics, logs and traces", []string{"hauberk.dev/mesh/trace.", "hauberk.dev/mesh.(*observer", "hauberk.dev/mesh.(*counts", "log/slog."}},
	{"the proxy's own glue", []string{"hauberk.dev/"}},
	{"net and poll, outside the kernel", []string{"net.", "internal/poll."}},
}

// Of names the stage of a sample by its functions, innermost first.
func Of(functions []string) string {
	for _, f := range functions {
		for _, r := range rules {
			for _, p := range r.prefixes {
				if strings.HasPrefix(f, p) {
					return r.stage
				}
			}
		}
	}
	return Other
}

// Read groups the samples of a profile, largest share first.
func Read(path string) ([]Share, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	samples, err := decode(raw)
	if err != nil {
		return nil, err
	}
	sums := map[string]*Share{}
	for _, s := range samples {
		stage := Of(s.functions)
		if sums[stage] == nil {
			sums[stage] = &Share{Stage: stage}
		}
		sums[stage].Samples += int(s.count)
		sums[stage].Time += time.Duration(s.nanoseconds)
	}
	var out []Share
	for _, s := range sums {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b Share) int {
		return cmp.Or(cmp.Compare(b.Time, a.Time), cmp.Compare(a.Stage, b.Stage))
	})
	return out, nil
}

// Sum is what all stages took.
func Sum(all []Share) (sum time.Duration, samples int) {
	for _, s := range all {
		sum += s.Time
		samples += s.Samples
	}
	return sum, samples
}

// Profile runs a program and writes where its time went to a file of its own.
func Profile(ctx context.Context, path string, run func(context.Context) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return errors.Join(err, f.Close())
	}
	err = run(ctx)
	pprof.StopCPUProfile()
	return errors.Join(err, f.Close())
}
