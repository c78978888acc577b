package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"example.com/bank/bolt"
)

func open(t *testing.T, journal string) *Book {
	t.Helper()
	opening, err := parseOpening("alice=100,bob=0")
	if err != nil {
		t.Fatal(err)
	}
	b, err := OpenBook(journal, opening)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func audit(t *testing.T, b *Book, alice int64) {
	t.Helper()
	if total, err := b.Audit(); total != 100 || err != nil {
		t.Errorf("audit: %d, %v", total, err)
	}
	if have, err := b.Balance("alice"); have != alice || err != nil {
		t.Errorf("alice has %d, %v, want %d", have, err, alice)
	}
}

func TestPay(t *testing.T) {
	b := open(t, filepath.Join(t.TempDir(), "journal"))
	for _, test := range []struct {
		p    Payment
		want error
	}{
		{Payment{"1", "alice", "bob", 30}, nil},
		{Payment{"1", "alice", "bob", 30}, nil}, // again: not booked twice
		{Payment{"1", "alice", "bob", 31}, errReused},
		{Payment{"2", "alice", "bob", 0}, errAmount},
		{Payment{"2", "alice", "bob", -5}, errAmount},
		{Payment{"2", "alice", "bob", 1<<63 - 1}, errAmount},
		{Payment{"2", "alice", "bob", 71}, errOverdraft},
		{Payment{"2", "alice", "alice", 1}, errSame},
		{Payment{"2", "alice", "eve", 1}, errUnknown},
		{Payment{"2", "eve", "alice", 1}, errUnknown},
		{Payment{"", "alice", "bob", 1}, errID},
		{Payment{"a b", "alice", "bob", 1}, errID},
		{Payment{strings.Repeat("x", 65), "alice", "bob", 1}, errID},
		{Payment{"3", "alice", "bob", 70}, nil},
	} {
		if err := b.Pay(test.p); !errors.Is(err, test.want) {
			t.Errorf("%+v: got %v, want %v", test.p, err, test.want)
		}
	}
	audit(t, b, 0)
}

// TestJournal cuts the journal at every byte: what was whole is booked, what
// was not is dropped, and the book goes on from there.
func TestJournal(t *testing.T) {
	name := filepath.Join(t.TempDir(), "journal")
	b := open(t, name)
	for _, id := range []string{"1", "2"} {
		if err := b.Pay(Payment{id, "alice", "bob", 10}); err != nil {
			t.Fatal(err)
		}
	}
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(whole) + 1 {
		part := filepath.Join(t.TempDir(), "journal")
		os.WriteFile(part, whole[:cut], 0o600)
		b := open(t, part)
		audit(t, b, 100-10*int64(strings.Count(string(whole[:cut]), "\n")))
		if err := b.Pay(Payment{"3", "alice", "bob", 1}); err != nil {
			t.Fatal(err)
		}
		audit(t, open(t, part), 99-10*int64(strings.Count(string(whole[:cut]), "\n")))
	}
	for i := range whole[:len(whole)-1] {
		bad := []byte(string(whole))
		bad[i] ^= 1
		os.WriteFile(name, bad, 0o600)
		if b, err := OpenBook(name, map[string]int64{"alice": 100, "bob": 0}); err == nil {
			b.Close()
			t.Fatalf("byte %d changed and nobody noticed", i)
		}
	}
}

func TestAnswer(t *testing.T) {
	b := open(t, filepath.Join(t.TempDir(), "journal"))
	for _, test := range []struct {
		r    bolt.Request
		want any // nil: an error
	}{
		{bolt.Request{Service: service, Method: "pay", Args: []any{"1", "alice", "bob", int64(5)}}, "booked"},
		{bolt.Request{Service: service, Method: "pay", Args: []any{"2", "alice", "bob", int64(500)}}, "refused: not enough money"},
		{bolt.Request{Service: service, Method: "pay", Args: []any{"2", "alice", "bob", "5"}}, nil},
		{bolt.Request{Service: service, Method: "pay"}, nil},
		{bolt.Request{Service: service, Method: "balance", Args: []any{"bob"}}, int64(5)},
		{bolt.Request{Service: service, Method: "balance", Args: []any{"eve"}}, nil},
		{bolt.Request{Service: service, Method: "balance", Args: []any{int64(1)}}, nil},
		{bolt.Request{Service: service, Method: "accounts"}, "alice=95\nbob=5\n"},
		{bolt.Request{Service: service, Method: "audit"}, int64(100)},
		{bolt.Request{Service: service, Method: "print"}, nil},
		{bolt.Request{Service: "other", Method: "audit"}, nil},
	} {
		got, err := answer(b, test.r)
		if (err != nil) != (test.want == nil) || err == nil && got != test.want {
			t.Errorf("%+v: got %v, %v", test.r, got, err)
		}
	}
}

func TestOpening(t *testing.T) {
	for _, bad := range []string{"", "alice", "alice=-1", "=5", "alice=1,alice=2", "al ice=1", "alice=x"} {
		if _, err := parseOpening(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
