// Command risk judges payments before they are made, and answers Dubbo calls.
// A judgement depends on the payment alone, so asking twice gives one answer.
package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"example.com/bank/dubbo"
	"example.com/bank/run"
)

// service is the interface risk is called by.
const service = "com.example.bank.Risk"

func main() { run.Main("risk", serve) }

func serve(ctx context.Context) error {
	limit, err := strconv.ParseInt(run.Setting("RISK_LIMIT", "50000"), 10, 64)
	if err != nil || limit < 1 {
		return fmt.Errorf("RISK_LIMIT is not a positive number")
	}
	r := rules{limit: limit, blocked: map[string]bool{}}
	for name := range strings.SplitSeq(run.Setting("RISK_BLOCKED", "mallory"), ",") {
		r.blocked[name] = true
	}
	ln, err := run.Listen(":20880")
	if err != nil {
		return err
	}
	return dubbo.Serve(ctx, ln, r.answer)
}

// rules are the limits of a payment.
type rules struct {
	limit   int64
	blocked map[string]bool
}

func (r rules) answer(_ context.Context, q dubbo.Request) (string, error) {
	if q.Service != service || q.Method != "judge" {
		return "", fmt.Errorf("no %.100q in %.100q here", q.Method, q.Service)
	}
	if len(q.Args) != 3 {
		return "", errors.New("judge wants from, to, amount")
	}
	from, ok1 := q.Args[0].(string)
	to, ok2 := q.Args[1].(string)
	amount, ok3 := q.Args[2].(int64)
	if !ok1 || !ok2 || !ok3 {
		return "", errors.New("judge wants from, to, amount")
	}
	return r.judge(from, to, amount), nil
}

// judge answers "allow" or "deny: why".
func (r rules) judge(from, to string, amount int64) string {
	switch {
	case amount > r.limit:
		return fmt.Sprintf("deny: more than %d in one payment", r.limit)
	case r.blocked[from] || r.blocked[to]:
		return "deny: account is blocked"
	}
	return "allow"
}
