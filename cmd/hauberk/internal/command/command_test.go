package command

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/pflag"

	"hauberk.dev/api/admin"
	"hauberk.dev/ledger"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"hauberk": func() {
			os.Exit(Run(context.Background(), os.Args[1:], Stdio{os.Stdin, os.Stdout, os.Stderr}))
		},
	})
}

// TestScripts runs the command as people type it, against a control plane that
// answers from a script.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("%d scripts: %v", len(scripts), err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Condition: func(cond string) (bool, error) {
			if cond != "root" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return os.Getuid() == 0, nil
		},
		Setup: func(env *testscript.Env) error {
			env.Setenv("TZ", "UTC")
			copyOf := filepath.Join(env.WorkDir, "copy")
			key, err := writeLedger(filepath.Join(env.WorkDir, "ledger.key"), copyOf)
			if err != nil {
				return err
			}
			if err := os.WriteFile(copyOf+".key", []byte(key+"\n"), 0o600); err != nil {
				return err
			}
			stop, err := controlPlane(filepath.Join(env.WorkDir, "run", "control", "admin.sock"), copyOf, key)
			if err == nil {
				env.Defer(stop)
			}
			return err
		},
	})
}

func writeLedger(key, dir string) (verifierKey string, err error) {
	signer, err := ledger.LoadOrCreateSigner(key, "hauberk.test")
	if err != nil {
		return "", err
	}
	log, err := ledger.Open(dir, "hauberk.test", signer)
	if err != nil {
		return "", err
	}
	defer log.Close()
	for i := range 3 {
		e := ledger.Entry{Time: time.Date(2026, 11, 1, 10, 0, i, 0, time.UTC), Kind: "test.fact", Text: fmt.Sprint("fact ", i)}
		if _, err := log.Append(context.Background(), e); err != nil {
			return "", err
		}
	}
	return signer.VerifierKey(), nil
}

// controlPlane answers what the scripts ask.
func controlPlane(socket, ledgerDir, key string) (stop func(), err error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, err
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	at := time.Date(2026, 11, 1, 10, 0, 0, 0, time.UTC)
	mux := http.NewServeMux()
	tell := func(path string, v any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { json.NewEncoder(w).Encode(v) })
	}
	tell(admin.PathStatus, admin.Status{Version: "v1", TrustDomain: "hauberk.test", API: "https://127.0.0.1:7443", StartedAt: at,
		Links: []admin.Link{{Name: "own", State: "ok", Detail: "2 applications"}, {Name: "break", State: "broken", Detail: "ledger full"}}})
	tell(admin.PathInstances, []admin.Instance{{Name: "web-1", Namespace: "bank", Workload: "web", Phase: "Running", Address: "10.88.0.2", Digest: "sha256:0123456789abcdef0123", StartedAt: at},
		{Name: "bad-1", Namespace: "bank", Workload: "bad", Phase: "Refused", Reason: "NotReleased", Message: "evil\x1b]0;pwned\a\nline"}})
	tell(admin.PathIncidents, []admin.Incident{{Name: "inc-1", Namespace: "bank", Workload: "web", Cause: "guard", Rule: "exec from image", State: "Contained", ContainedMillis: 42, Observed: at,
		Receipts: []admin.Receipt{{Point: "mesh"}, {Point: "sandbox"}}}})
	tell(admin.PathApply, []admin.Applied{{Kind: "Workload", Namespace: "bank", Name: "web", Result: "created"}})
	tell(admin.PathDelete, []admin.Applied{{Kind: "Namespace", Name: "bank", Result: "deleted"}})
	tell(admin.PathRelease, admin.Released{Image: "bank/web:1", Digest: "sha256:00", Application: "pay", Index: 9, Checks: []string{"provenance", "review"}})
	mux.HandleFunc(admin.PathWhy, func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("subject") != "web" || r.FormValue("namespace") != "bank" {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnprocessableEntity)
			json.NewEncoder(w).Encode(admin.Error{Reason: "NotFound", Message: "nothing is called " + r.FormValue("subject"), Fix: "list workloads with hauberk ps"})
			return
		}
		json.NewEncoder(w).Encode(admin.Story{Subject: "bank/web", Answer: "It runs.", Chapter: []admin.Chapter{{At: at, Link: "own", Text: "alice owns it", Index: 4}, {Link: "boot", Text: "it booted", Index: -1}}})
	})
	mux.HandleFunc(admin.PathLogs, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "log of %s/%s\n", r.FormValue("namespace"), r.FormValue("workload"))
	})
	mux.HandleFunc(admin.PathRestart, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") })
	mux.HandleFunc(admin.PathLedger, func(w http.ResponseWriter, r *http.Request) {
		page := []admin.LedgerEntry{}
		var from, limit uint64
		fmt.Sscan(r.FormValue("from"), &from)
		fmt.Sscan(r.FormValue("limit"), &limit)
		for i := from; i < 3 && i < from+limit; i++ {
			raw, _ := json.Marshal(ledger.Entry{Time: at, Kind: "test.fact", Text: fmt.Sprint("fact ", i)})
			page = append(page, admin.LedgerEntry{Index: i, Entry: raw})
		}
		json.NewEncoder(w).Encode(page)
	})
	mux.HandleFunc(admin.PathLedgerTar, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Hauberk-Verifier-Key", key)
		signer, err := ledger.LoadOrCreateSigner(ledgerDir+"/../ledger.key", "hauberk.test")
		if err != nil {
			return
		}
		log, err := ledger.Open(ledgerDir, "hauberk.test", signer)
		if err != nil {
			return
		}
		defer log.Close()
		log.Archive(w)
	})
	mux.HandleFunc(admin.PathExec, answerExec)
	srv := httptest.NewUnstartedServer(mux)
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	return srv.Close, nil
}

// answerExec echoes its arguments and standard input and exits with 7.
func answerExec(w http.ResponseWriter, r *http.Request) {
	var ask admin.Exec
	json.NewDecoder(r.Body).Decode(&ask)
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+admin.StreamProtocol+"\r\n\r\n")
	var in bytes.Buffer
	for {
		_, payload, err := admin.ReadFrame(buf)
		if err != nil || len(payload) == 0 {
			break
		}
		in.Write(payload)
	}
	admin.WriteFrame(conn, admin.FrameStdout, fmt.Appendf(nil, "%s/%s %q\n%s", ask.Namespace, ask.Workload, ask.Args, &in))
	admin.WriteFrame(conn, admin.FrameExit, binary.BigEndian.AppendUint32(nil, 7))
}

// TestSupervisorGetsTheSameFlags proves that up hands on every flag.
func TestSupervisorGetsTheSameFlags(t *testing.T) {
	given := installation{programs: "/p", api: "a", nodeListen: "b", door: "c", gateway: "d", trustDomain: "e",
		node: "f", controlUser: "1:1", meshUser: "2:2", withoutGuard: true}
	want := given
	var got installation
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	got.flags(f)
	if err := f.Parse(given.arguments()); err != nil {
		t.Fatal(err)
	}
	if got != want || given != want {
		t.Errorf("the supervisor got %+v, want %+v", got, want)
	}
}

func TestDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := directory(filepath.Join(dir, "link"), 0o700, nil); err == nil {
		t.Error("a link was taken for a directory")
	}
	path := filepath.Join(dir, "a", "b")
	for range 2 { // made, then taken
		if err := directory(path, 0o710, nil); err != nil {
			t.Fatal(err)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o710 {
		t.Errorf("%v, %v", fi, err)
	}
}
