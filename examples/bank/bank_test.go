package bank_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// bank is all services, as programs, on this machine.
type bank struct {
	t    *testing.T
	bin  string
	addr map[string]string
	env  []string
	run  map[string]*exec.Cmd
}

// start builds and starts everything.
func start(t *testing.T) *bank {
	t.Helper()
	b := &bank{t: t, bin: t.TempDir(), addr: map[string]string{}, run: map[string]*exec.Cmd{}}
	build := exec.Command("go", "build", "-o", b.bin+"/", "./...")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	for _, name := range []string{"ledger", "risk", "vault", "transfer", "web"} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		b.addr[name] = ln.Addr().String()
		b.env = append(b.env, strings.ToUpper(name)+"="+b.addr[name])
		ln.Close()
	}
	b.env = append(b.env, "LEDGER_JOURNAL="+filepath.Join(t.TempDir(), "journal"), "LEDGER_ACCOUNTS=alice=1000000,bob=1000000,carol=1000000")
	for _, name := range []string{"ledger", "risk", "vault", "transfer", "web"} {
		b.start(name)
	}
	t.Cleanup(func() {
		for name := range b.run {
			b.stop(name, syscall.SIGTERM)
		}
	})
	return b
}

func (b *bank) start(name string) {
	b.t.Helper()
	cmd := exec.Command(filepath.Join(b.bin, name))
	cmd.Env = append(append(os.Environ(), b.env...), "LISTEN="+b.addr[name])
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.run[name] = cmd
	for range 200 {
		c, err := net.Dial("tcp", b.addr[name])
		if err == nil {
			c.Close()
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	b.t.Fatalf("%s does not listen", name)
}

// stop ends a program; asked to, it ends well and soon.
func (b *bank) stop(name string, sig syscall.Signal) {
	b.t.Helper()
	cmd := b.run[name]
	delete(b.run, name)
	cmd.Process.Signal(sig)
	kill := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Wait(); err != nil && sig != syscall.SIGKILL {
		b.t.Errorf("%s: %v", name, err)
	}
}

type paid struct {
	ID, Status, Reason string
	Receipt            struct {
		Payload   string
		Signature []byte
	}
}

func (b *bank) pay(id, from, to string, amount int64) (paid, int, error) {
	body, _ := json.Marshal(map[string]any{"id": id, "from": from, "to": to, "amount": amount})
	resp, err := http.Post("http://"+b.addr["web"]+"/pay", "application/json", bytes.NewReader(body))
	if err != nil {
		return paid{}, 0, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	var p paid
	json.Unmarshal(raw, &p)
	return p, resp.StatusCode, err
}

func (b *bank) balance(account string) int64 {
	b.t.Helper()
	resp, err := http.Get("http://" + b.addr["web"] + "/balance/" + account)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	var v struct{ Amount int64 }
	if err := json.NewDecoder(resp.Body).Decode(&v); err != nil || resp.StatusCode != http.StatusOK {
		b.t.Fatalf("balance of %s: %s, %v", account, resp.Status, err)
	}
	return v.Amount
}

// TestMoney makes payments while transfer, and then ledger, are killed and
// come back; every payment is asked for until it is answered, some twice.
func TestMoney(t *testing.T) {
	b := start(t)
	const payments = 200
	accounts := []string{"alice", "bob", "carol"}
	want := map[string]int64{"alice": 1000000, "bob": 1000000, "carol": 1000000}
	for i := range payments {
		want[accounts[i%3]] -= int64(i + 1)
		want[accounts[(i+1)%3]] += int64(i + 1)
	}
	var wg sync.WaitGroup
	work := make(chan int)
	for range 32 {
		wg.Go(func() {
			for i := range work {
				b.until(fmt.Sprintf("pay-%d", i), accounts[i%3], accounts[(i+1)%3], int64(i+1))
				if i%5 == 0 { // an impatient client
					b.until(fmt.Sprintf("pay-%d", i), accounts[i%3], accounts[(i+1)%3], int64(i+1))
				}
			}
		})
	}
	for i := range payments {
		switch i {
		case 60, 120:
			b.stop("transfer", syscall.SIGKILL)
			b.start("transfer")
		case 90, 150:
			b.stop("ledger", syscall.SIGKILL)
			b.start("ledger")
		}
		work <- i
	}
	close(work)
	wg.Wait()
	for account, amount := range want {
		if got := b.balance(account); got != amount {
			t.Errorf("%s has %d, want %d", account, got, amount)
		}
	}
}

// until asks for a payment until there is an answer.
func (b *bank) until(id, from, to string, amount int64) {
	for try := range 60 {
		p, code, err := b.pay(id, from, to, amount)
		if err == nil && code == http.StatusOK && p.Status == "booked" {
			return
		}
		if code == http.StatusUnprocessableEntity || try == 59 {
			b.t.Errorf("%s: %d %+v %v", id, code, p, err)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func TestAnswers(t *testing.T) {
	b := start(t)
	p, code, err := b.pay("good", "alice", "bob", 500)
	if err != nil || code != http.StatusOK {
		t.Fatalf("%d %+v %v", code, p, err)
	}
	b.checkReceipt(p)
	for name, test := range map[string]struct {
		id, from, to string
		amount       int64
		code         int
		reason       string
	}{
		"risk limit":      {"1", "alice", "bob", 50001, 422, "risk: deny: more than 50000"},
		"blocked account": {"2", "alice", "mallory", 1, 422, "risk: deny: account is blocked"},
		"negative":        {"3", "alice", "bob", -5, 422, "ledger: refused: amount"},
		"zero":            {"4", "alice", "bob", 0, 422, "ledger: refused: amount"},
		"unknown":         {"5", "alice", "eve", 5, 422, "ledger: refused: unknown account"},
		"used id":         {"good", "alice", "bob", 501, 422, "ledger: refused: id was used"},
		"no id":           {"", "alice", "bob", 5, 400, ""},
	} {
		p, code, err := b.pay(test.id, test.from, test.to, test.amount)
		if err != nil || code != test.code || !strings.HasPrefix(p.Reason, test.reason) {
			t.Errorf("%s: %d %+v %v", name, code, p, err)
		}
	}
	resp, err := http.Get("http://" + b.addr["web"] + "/")
	if err != nil {
		t.Fatal(err)
	}
	page, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if !bytes.Contains(page, []byte("<td>alice</td><td>9995.00</td>")) {
		t.Errorf("page is %s", page)
	}
	for path, want := range map[string]int{"/balance/eve": 404, "/nothing": 404, "/healthz": 200} {
		resp, err := http.Get("http://" + b.addr["web"] + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
}

func (b *bank) checkReceipt(p paid) {
	b.t.Helper()
	resp, err := http.Get("http://" + b.addr["vault"] + "/key")
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(resp.Body)
	block, _ := pem.Decode(raw)
	if block == nil {
		b.t.Fatalf("key is %q", raw)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		b.t.Fatal(err)
	}
	if !ed25519.Verify(key.(ed25519.PublicKey), []byte(p.Receipt.Payload), p.Receipt.Signature) {
		b.t.Error("the receipt's signature is wrong")
	}
	if want := `{"id":"good","from":"alice","to":"bob","amount":500}`; p.Receipt.Payload != want {
		b.t.Errorf("the receipt says %s", p.Receipt.Payload)
	}
}
