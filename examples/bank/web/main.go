// Command web is the bank's front: a page, and payments as JSON.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"html/template"
	"io"
	"mime"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"example.com/bank/run"
	"example.com/bank/transferpb"
)

func main() { run.Main("web", serve) }

func serve(ctx context.Context) error {
	ln, err := run.Listen(":8080")
	if err != nil {
		return err
	}
	// passthrough: one lookup of one name, none of gRPC's own records.
	conn, err := grpc.NewClient("passthrough:///"+run.Setting("TRANSFER", "transfer:9090"),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableServiceConfig())
	if err != nil {
		return err
	}
	defer conn.Close()
	return run.HTTP(ctx, ln, handler(transferpb.NewTransferClient(conn)))
}

// Payment is the body of POST /pay.
type Payment struct {
	ID     string `json:"id"`
	From   string `json:"from"`
	To     string `json:"to"`
	Amount int64  `json:"amount"`
}

// Paid is the answer to it.
type Paid struct {
	ID      string   `json:"id"`
	Status  string   `json:"status"` // booked or refused
	Reason  string   `json:"reason,omitempty"`
	Receipt *Receipt `json:"receipt,omitempty"`
}

// Receipt is the bank's signature over a booked payment.
type Receipt struct {
	Payload   string `json:"payload"`
	Signature []byte `json:"signature"`
	KeyID     string `json:"keyId"`
}

type front struct{ transfer transferpb.TransferClient }

func handler(t transferpb.TransferClient) http.Handler {
	f := front{t}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", f.page)
	mux.HandleFunc("POST /pay", f.pay)
	mux.HandleFunc("GET /balance/{account}", f.balance)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	return mux
}

// pay makes a payment: JSON in, JSON out; a form is sent back to the page.
func (f front) pay(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 4<<10)
	form, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	isForm := form == "application/x-www-form-urlencoded"
	p, err := readPayment(r, isForm)
	if err != nil {
		http.Error(w, "payment: "+err.Error(), http.StatusBadRequest)
		return
	}
	reply, err := f.ask(r.Context(), p)
	if err != nil {
		fail(w, err)
		return
	}
	code := http.StatusOK
	if reply.Status != "booked" {
		code = http.StatusUnprocessableEntity
	}
	if isForm && code == http.StatusOK {
		http.Redirect(w, r, "/", http.StatusSeeOther)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(reply)
}

func readPayment(r *http.Request, form bool) (Payment, error) {
	var p Payment
	if form {
		amount, err := strconv.ParseInt(r.PostFormValue("amount"), 10, 64)
		if err != nil {
			return p, errors.New("amount is not a whole number")
		}
		p = Payment{ID: r.PostFormValue("id"), From: r.PostFormValue("from"), To: r.PostFormValue("to"), Amount: amount}
	} else {
		d := json.NewDecoder(r.Body)
		d.DisallowUnknownFields()
		if err := d.Decode(&p); err != nil {
			return p, err
		}
	}
	if p.ID == "" || p.From == "" || p.To == "" {
		return p, errors.New("id, from and to must be set")
	}
	return p, nil
}

// ask asks transfer, again while it is away: the id makes that safe.
func (f front) ask(ctx context.Context, p Payment) (Paid, error) {
	ctx, cancel := context.WithTimeout(ctx, 25*time.Second)
	defer cancel()
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		reply, err := f.transfer.Pay(ctx, &transferpb.PayRequest{Id: p.ID, From: p.From, To: p.To, Amount: p.Amount}, grpc.WaitForReady(true))
		if err == nil {
			return paid(p.ID, reply), nil
		}
		if status.Code(err) != codes.Unavailable {
			return Paid{}, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return Paid{}, err
		}
	}
}

func paid(id string, reply *transferpb.PayReply) Paid {
	if !reply.GetBooked() {
		return Paid{ID: id, Status: "refused", Reason: reply.GetReason()}
	}
	r := reply.GetReceipt()
	return Paid{ID: id, Status: "booked", Receipt: &Receipt{Payload: string(r.GetPayload()), Signature: r.GetSignature(), KeyID: r.GetKeyId()}}
}

// balance answers {"account":…,"amount":…}.
func (f front) balance(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 15*time.Second)
	defer cancel()
	account := r.PathValue("account")
	reply, err := f.transfer.Balance(ctx, &transferpb.BalanceRequest{Account: account}, grpc.WaitForReady(true))
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(struct {
		Account string `json:"account"`
		Amount  int64  `json:"amount"`
	}{account, reply.GetAmount()})
}

// fail answers with what went wrong behind the front.
func fail(w http.ResponseWriter, err error) {
	code := http.StatusBadGateway
	switch status.Code(err) {
	case codes.NotFound:
		code = http.StatusNotFound
	case codes.Unavailable:
		code = http.StatusServiceUnavailable
	case codes.DeadlineExceeded, codes.Canceled:
		code = http.StatusGatewayTimeout
	}
	http.Error(w, status.Convert(err).Message(), code)
}

// page shows the accounts and a form.
func (f front) page(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 15*time.Second)
	defer cancel()
	reply, err := f.transfer.Accounts(ctx, &transferpb.AccountsRequest{}, grpc.WaitForReady(true))
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'")
	page.Execute(w, struct {
		Accounts []*transferpb.Account
		ID       string
	}{reply.GetAccounts(), rand.Text()})
}

var page = template.Must(template.New("page").Funcs(template.FuncMap{"money": money}).Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Bank</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:3rem auto;padding:0 1rem;color:#1c2430}
table{border-collapse:collapse;width:100%;margin:1rem 0 2rem}td,th{padding:.4rem .2rem;border-bottom:1px solid #d8dee6;text-align:left}
td:last-child,th:last-child{text-align:right;font-variant-numeric:tabular-nums}label{display:block;margin:.6rem 0}
input,select,button{font:inherit;padding:.3rem .5rem}button{margin-top:.8rem}</style>
<h1>Bank</h1>
<table><tr><th>Account</th><th>Balance</th></tr>
{{range .Accounts}}<tr><td>{{.Name}}</td><td>{{money .Amount}}</td></tr>
{{end}}</table>
<form method="post" action="/pay"><input type="hidden" name="id" value="{{.ID}}">
<label>From <select name="from">{{range .Accounts}}<option>{{.Name}}</option>{{end}}</select></label>
<label>To <select name="to">{{range .Accounts}}<option>{{.Name}}</option>{{end}}</select></label>
<label>Amount in cents <input name="amount" type="number" min="1" value="100" required></label>
<button>Pay</button></form></html>
`))

// money writes cents as people read them.
func money(cents int64) string {
	text := strconv.FormatInt(cents%100, 10)
	if len(text) < 2 {
		text = "0" + text
	}
	return strconv.FormatInt(cents/100, 10) + "." + text
}
