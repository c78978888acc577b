package installation

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Accounts of the bank.
var Accounts = []string{"alice", "bob", "carol", "dave"}

// Payment is one movement of money.
type Payment struct {
	ID     string `json:"id"`
	From   string `json:"from"`
	To     string `json:"to"`
	Amount int64  `json:"amount"`
}

// Teller is a customer's way to the bank: HTTP, from outside of every sandbox.
type Teller struct {
	url  string
	http *http.Client
}

// Teller of the bank of this installation.
func (i *Installation) Teller(patience time.Duration) *Teller {
	return &Teller{"http://" + i.Web, &http.Client{Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: 4}}}
}

// Close lets go of idle connections.
func (t *Teller) Close() { t.http.CloseIdleConnections() }

// Do sends a request and returns status and body.
func (t *Teller) Do(ctx context.Context, method, path string, body any) (int, []byte, error) {
	var sent bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&sent).Encode(body); err != nil {
			return 0, nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, t.url+path, &sent)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := t.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, data, err
}

// Pay makes a payment. It is acknowledged if and only if there is no error.
func (t *Teller) Pay(ctx context.Context, p Payment) error {
	code, body, err := t.Do(ctx, http.MethodPost, "/pay", p)
	if err == nil && (code != http.StatusOK || !bytes.Contains(body, []byte(`"signature"`))) {
		err = &AnswerError{code, fmt.Sprintf("%.300s", body)}
	}
	if err != nil {
		return fmt.Errorf("pay %s: %w", p.ID, err)
	}
	return nil
}

// AnswerError is an answer other than the one that was hoped for.
type AnswerError struct {
	Code int
	Body string
}

func (e *AnswerError) Error() string { return fmt.Sprintf("status %d: %q", e.Code, e.Body) }

// Balances of all accounts.
func (t *Teller) Balances(ctx context.Context) (map[string]int64, error) {
	all := map[string]int64{}
	for _, a := range Accounts {
		code, body, err := t.Do(ctx, http.MethodGet, "/balance/"+a, nil)
		if err != nil {
			return nil, err
		}
		var answer struct{ Amount int64 }
		if err := json.Unmarshal(body, &answer); err != nil || code != http.StatusOK {
			return nil, fmt.Errorf("balance of %s: status %d: %.200q", a, code, body)
		}
		all[a] = answer.Amount
	}
	return all, nil
}
