// Package keep is the keeper: one process for each set of programs that holds
// the templates and a pool of machines made ahead, for all shims of a host.
//
// Who needs a machine asks over a socket that only root may use, and gets one
// that is nobody else's: a run directory to adopt, and the tap of its network.
// What is kept is nobody's, lies in the keeper's own directory, and is ended by
// whoever finds the keeper gone; what was given away is not the keeper's any
// more. A keeper that is not there is started, and ends after idling. Whoever
// gets no machine from it boots one, and is told why.
package keep

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
)

// Users of machines: the first makes templates and probes.
const (
	FirstUser  uint32 = 0x48480000
	CountUsers uint32 = 1 << 16
)

// Place is where a keeper and those who ask it keep things.
type Place struct {
	State string // kernel artefacts
	Run   string // run directories; holds the keepers' own
	// Agent and Kernel are what guests boot, as for boot.Config.
	Agent, Kernel string
}

// Machines is the directory of machines that are somebody's.
func (p Place) Machines() string { return filepath.Join(p.Run, "vm") }

// keepers are the directories of all keepers, whether they live or not.
func (p Place) keepers() ([]string, error) {
	return filepath.Glob(filepath.Join(p.Run, keeperPrefix+"*"))
}

const (
	keeperPrefix = "keep-"
	lockName     = "lock"
	socketName   = "keep.sock"
	logName      = "log"
	pidName      = "pid"
)

// userLock is held from the choice of a user until a journal names it.
func (p Place) userLock() string { return filepath.Join(p.Run, ".lock") }

// parents are all directories that machines are in, in the order in which they
// move.
func (p Place) parents() ([]string, error) {
	all, err := p.keepers()
	return append(all, p.Machines()), err
}

// keeper is the directory of the keeper for the programs that are installed now:
// after an update another keeper serves, and the old one idles until it ends.
func (p Place) keeper() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find keeper: %w", err)
	}
	installed, err := boot.Find(p.Kernel)
	if err != nil {
		return "", fmt.Errorf("find keeper: %w", err)
	}
	agent := p.Agent
	if agent == "" {
		agent = filepath.Join(filepath.Dir(self), "hauberk-guest")
	}
	h := sha256.New()
	for _, name := range []string{self, agent, installed.Image, "/usr/bin/qemu-system-x86_64"} {
		fi, err := os.Stat(name)
		if err != nil {
			return "", fmt.Errorf("find keeper: %w", err)
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		if !ok {
			return "", fmt.Errorf("find keeper: what stat says of %s is not known", name)
		}
		fmt.Fprintln(h, name, st.Dev, st.Ino, st.Size, st.Ctim.Nano())
	}
	fmt.Fprintln(h, p.State)
	return filepath.Join(p.Run, keeperPrefix+hex.EncodeToString(h.Sum(nil)[:6])), nil
}

// Request asks for a machine. It is one line of JSON.
type Request struct {
	Version int `json:"version"`
	// ID will be the machine's name.
	ID string `json:"id"`
	// Size is rounded up to a class.
	MemoryMiB int `json:"memoryMiB"`
	CPUs      int `json:"cpus"`
	// TrustDomain is shared by those who may share pages.
	TrustDomain string `json:"trustDomain"`
	// Shared machines can be given file systems of the host.
	Shared bool `json:"shared,omitempty"`
}

const (
	version    = 1
	maxLine    = 16 << 10
	maxAnswers = 256 // lines of progress, and the last
	maxLog     = 1 << 20
)

// How a machine came about.
const (
	FromPool     = "pool"
	FromTemplate = "clone"
	FromKernel   = "boot"
)

// answer is what a keeper says: lines of progress, and then a machine or an
// error. The machine's tap goes along with its line.
type answer struct {
	Progress string `json:"progress,omitempty"`
	Dir      string `json:"dir,omitempty"`
	How      string `json:"how,omitempty"`
	Error    string `json:"error,omitempty"`
}

// taken is what the asker says when the machine is its own. Without it the
// keeper ends the machine.
const taken = "taken\n"

// parseRequest reads a request and says what is wrong with it.
func parseRequest(line []byte) (Request, error) {
	var r Request
	d := json.NewDecoder(strings.NewReader(string(line)))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return Request{}, fmt.Errorf("read request: %w", err)
	}
	switch {
	case r.Version != version:
		return Request{}, fmt.Errorf("read request: version %d, this keeper speaks %d", r.Version, version)
	case r.MemoryMiB < 0 || r.MemoryMiB > vm.MaxMemoryMiB || r.CPUs < 0 || r.CPUs > vm.MaxCPUs:
		return Request{}, fmt.Errorf("read request: no machine has %d MiB and %d CPUs", r.MemoryMiB, r.CPUs)
	case r.TrustDomain == "" || len(r.TrustDomain) > 255:
		return Request{}, errors.New("read request: it names no trust domain")
	}
	return r, nil
}

// parseAnswer reads what should be an answer.
func parseAnswer(line []byte) (answer, error) {
	var a answer
	d := json.NewDecoder(strings.NewReader(string(line)))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil {
		return answer{}, fmt.Errorf("read answer: %w", err)
	}
	kinds := 0
	for _, is := range []bool{a.Progress != "", a.Dir != "", a.Error != ""} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return answer{}, errors.New("read answer: it is none")
	}
	return a, nil
}

// Deadlines.
const (
	patience  = 5 * time.Second  // for what a peer has to say
	workTime  = 90 * time.Second // for a machine, a template before it included
	lookTime  = 2 * time.Second  // between looks at what is still there
	tidyTime  = 10 * time.Second // between looks at what others left
	startTime = 30 * time.Second // for a keeper that was started, on a machine that is busy
)
