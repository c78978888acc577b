// Command ledger keeps the bank's accounts and answers SOFARPC calls over
// bolt. Money moves only between accounts, so their sum never changes.
package main

import (
	"context"
	"errors"
	"fmt"

	"example.com/bank/bolt"
	"example.com/bank/run"
)

// Service is the name the ledger is called by.
const service = "com.example.bank.Ledger:1.0"

func main() { run.Main("ledger", serve) }

func serve(ctx context.Context) error {
	opening, err := parseOpening(run.Setting("LEDGER_ACCOUNTS", "alice=100000,bob=50000,carol=25000,dave=0"))
	if err != nil {
		return fmt.Errorf("LEDGER_ACCOUNTS: %w", err)
	}
	book, err := OpenBook(run.Setting("LEDGER_JOURNAL", "/var/lib/ledger/journal"), opening)
	if err != nil {
		return err
	}
	defer book.Close()
	if _, err := book.Audit(); err != nil {
		return err
	}
	ln, err := run.Listen(":12200")
	if err != nil {
		return err
	}
	return bolt.Serve(ctx, ln, func(_ context.Context, r bolt.Request) (any, error) { return answer(book, r) })
}

// answer answers one call. A refusal is a value, "refused: why", since the call
// itself went well; an error is for calls that make no sense.
func answer(book *Book, r bolt.Request) (any, error) {
	if r.Service != service {
		return nil, fmt.Errorf("no service %.100q here", r.Service)
	}
	switch r.Method {
	case "pay":
		p, ok := payment(r.Args)
		if !ok {
			return nil, errors.New("pay wants id, from, to, amount")
		}
		if err := book.Pay(p); err != nil {
			return "refused: " + err.Error(), nil
		}
		return "booked", nil
	case "balance":
		if len(r.Args) == 1 {
			if name, ok := r.Args[0].(string); ok {
				return book.Balance(name)
			}
		}
		return nil, errors.New("balance wants an account")
	case "accounts":
		return book.Accounts(), nil
	case "audit":
		return book.Audit()
	}
	return nil, fmt.Errorf("no method %.100q here", r.Method)
}

func payment(args []any) (p Payment, ok bool) {
	if len(args) != 4 {
		return p, false
	}
	texts := []*string{&p.ID, &p.From, &p.To}
	for i, to := range texts {
		if *to, ok = args[i].(string); !ok {
			return p, false
		}
	}
	p.Amount, ok = args[3].(int64)
	return p, ok
}
