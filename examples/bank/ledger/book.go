package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Payment is one movement of money, as asked for.
type Payment struct {
	ID     string `json:"id"`
	From   string `json:"from"`
	To     string `json:"to"`
	Amount int64  `json:"amount"`
}

// Posting is one side of a payment.
type Posting struct {
	Account string `json:"account"`
	Amount  int64  `json:"amount"` // negative: taken out
}

// Entry is a payment as booked: its postings come to nothing.
type Entry struct {
	Sequence uint64    `json:"sequence"`
	ID       string    `json:"id"`
	Postings []Posting `json:"postings"`
}

// Bounds of a payment.
const (
	maxAmount = 1_000_000_000_000
	maxName   = 64
)

// Refusals. Each is an answer, not a fault.
var (
	errUnknown   = errors.New("unknown account")
	errAmount    = errors.New("amount is not between 1 and 1000000000000")
	errOverdraft = errors.New("not enough money")
	errSame      = errors.New("an account cannot pay itself")
	errID        = errors.New("id is empty, too long, or has characters other than letters, digits, - and _")
	errReused    = errors.New("id was used for another payment")
)

// Book holds all accounts. Every payment is in the journal before it is in an
// account.
type Book struct {
	mu       sync.Mutex
	accounts map[string]int64
	done     map[string]Payment
	sequence uint64
	total    int64 // of all accounts; it never changes
	journal  *os.File
	broken   error // the journal could not be written; nothing is booked any more
}

// OpenBook reads the journal and books what is in it on the opening balances.
// A last line that was cut off by a crash is dropped: it was never answered.
func OpenBook(journal string, opening map[string]int64) (*Book, error) {
	f, err := os.OpenFile(journal, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	b := &Book{accounts: maps.Clone(opening), done: map[string]Payment{}, journal: f}
	for _, amount := range opening {
		b.total += amount
	}
	if err := b.replay(); err != nil {
		f.Close()
		return nil, fmt.Errorf("read journal %s: %w", journal, err)
	}
	return b, nil
}

// replay books every whole line of the journal and cuts off a partial one.
func (b *Book) replay() error {
	r := bufio.NewReader(b.journal)
	good := int64(0)
	for {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := b.replayLine(strings.TrimSuffix(line, "\n")); err != nil {
			return fmt.Errorf("at byte %d: %w", good, err)
		}
		good += int64(len(line))
	}
	if err := b.journal.Truncate(good); err != nil {
		return err
	}
	_, err := b.journal.Seek(good, io.SeekStart)
	return err
}

func (b *Book) replayLine(line string) error {
	sum, text, ok := strings.Cut(line, " ")
	want, err := strconv.ParseUint(sum, 16, 32)
	if !ok || err != nil || uint32(want) != crc32.ChecksumIEEE([]byte(text)) {
		return errors.New("checksum is wrong")
	}
	var e Entry
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		return err
	}
	p, err := e.payment()
	if err != nil {
		return err
	}
	if e.Sequence != b.sequence+1 {
		return fmt.Errorf("sequence %d after %d", e.Sequence, b.sequence)
	}
	if err := b.check(p); err != nil {
		return err
	}
	b.apply(p)
	return nil
}

// payment returns the payment an entry books.
func (e Entry) payment() (Payment, error) {
	if len(e.Postings) != 2 || e.Postings[0].Amount+e.Postings[1].Amount != 0 {
		return Payment{}, errors.New("postings do not come to nothing")
	}
	return Payment{ID: e.ID, From: e.Postings[0].Account, To: e.Postings[1].Account, Amount: e.Postings[1].Amount}, nil
}

// check says whether a new payment may be booked.
func (b *Book) check(p Payment) error {
	switch {
	case p.ID == "" || len(p.ID) > maxName || strings.Trim(p.ID, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "":
		return errID
	case p.Amount < 1 || p.Amount > maxAmount:
		return errAmount
	case p.From == p.To:
		return errSame
	}
	have, ok := b.accounts[p.From]
	if _, there := b.accounts[p.To]; !ok || !there {
		return errUnknown
	}
	if have < p.Amount {
		return errOverdraft
	}
	return nil
}

func (b *Book) apply(p Payment) {
	b.sequence++
	b.accounts[p.From] -= p.Amount
	b.accounts[p.To] += p.Amount
	b.done[p.ID] = p
}

// Pay books a payment once, however often it is asked to.
func (b *Book) Pay(p Payment) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.broken != nil {
		return b.broken
	}
	if old, ok := b.done[p.ID]; ok {
		if old != p {
			return errReused
		}
		return nil
	}
	if err := b.check(p); err != nil {
		return err
	}
	if err := b.write(p); err != nil {
		// How much of the line is on the disk is unknown; only a restart reads
		// it back.
		b.broken = fmt.Errorf("journal: %w", err)
		return b.broken
	}
	b.apply(p)
	return nil
}

func (b *Book) write(p Payment) error {
	text, err := json.Marshal(Entry{
		Sequence: b.sequence + 1, ID: p.ID,
		Postings: []Posting{{Account: p.From, Amount: -p.Amount}, {Account: p.To, Amount: p.Amount}},
	})
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(b.journal, "%08x %s\n", crc32.ChecksumIEEE(text), text); err != nil {
		return err
	}
	return b.journal.Sync()
}

// Balance tells what is in an account.
func (b *Book) Balance(account string) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	amount, ok := b.accounts[account]
	if !ok {
		return 0, errUnknown
	}
	return amount, nil
}

// Accounts lists all accounts as "name=amount" lines, sorted.
func (b *Book) Accounts() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out strings.Builder
	for _, name := range slices.Sorted(maps.Keys(b.accounts)) {
		fmt.Fprintf(&out, "%s=%d\n", name, b.accounts[name])
	}
	return out.String()
}

// Audit counts the money and says whether it is what it was at the opening.
func (b *Book) Audit() (total int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, amount := range b.accounts {
		total += amount
	}
	if total != b.total {
		err = fmt.Errorf("the accounts hold %d, opened with %d", total, b.total)
	}
	return total, err
}

// Close closes the journal.
func (b *Book) Close() error { return b.journal.Close() }

// parseOpening reads "alice=1000,bob=0".
func parseOpening(s string) (map[string]int64, error) {
	out := map[string]int64{}
	for item := range strings.SplitSeq(s, ",") {
		name, value, _ := strings.Cut(item, "=")
		amount, err := strconv.ParseInt(value, 10, 64)
		if err != nil || amount < 0 || amount > maxAmount || name == "" || len(name) > maxName || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return nil, fmt.Errorf("account %q is not name=amount", item)
		}
		if _, twice := out[name]; twice {
			return nil, fmt.Errorf("account %q is there twice", name)
		}
		out[name] = amount
	}
	return out, nil
}
