// Command transfer makes payments: it asks risk, books with ledger, and has
// vault sign a receipt. It keeps nothing, so it can be killed at any moment;
// a payment asked for again with the same id is made once.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"example.com/bank/bolt"
	"example.com/bank/call"
	"example.com/bank/dubbo"
	"example.com/bank/run"
	"example.com/bank/transferpb"
)

const (
	ledgerService = "com.example.bank.Ledger:1.0"
	riskService   = "com.example.bank.Risk"
)

func main() { run.Main("transfer", serve) }

func serve(ctx context.Context) error {
	ln, err := run.Listen(":9090")
	if err != nil {
		return err
	}
	s := newService(run.Setting("LEDGER", "ledger:12200"), run.Setting("RISK", "risk:20880"), run.Setting("VAULT", "vault:8200"))
	defer s.close()
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(64<<10), grpc.MaxConcurrentStreams(256))
	transferpb.RegisterTransferServer(srv, s)
	stop := context.AfterFunc(ctx, func() {
		// Clients that keep a stream open do not keep the program alive.
		end := time.AfterFunc(5*time.Second, srv.Stop)
		defer end.Stop()
		srv.GracefulStop()
	})
	defer stop()
	return srv.Serve(ln)
}

// service answers gRPC calls.
type service struct {
	transferpb.UnimplementedTransferServer
	ledger *bolt.Client
	risk   *dubbo.Client
	vault  string // URL
	http   *http.Client
}

func newService(ledger, risk, vault string) *service {
	return &service{
		ledger: bolt.NewClient(ledger), risk: dubbo.NewClient(risk), vault: "http://" + vault,
		http: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxConnsPerHost: 8, MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute}},
	}
}

func (s *service) close() {
	s.ledger.Close()
	s.risk.Close()
	s.http.CloseIdleConnections()
}

// Pay makes a payment.
func (s *service) Pay(ctx context.Context, p *transferpb.PayRequest) (*transferpb.PayReply, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	verdict, err := s.risk.Call(ctx, dubbo.Request{Service: riskService, Version: "1.0", Method: "judge", Args: []any{p.From, p.To, p.Amount}})
	if err != nil {
		return nil, unavailable("risk", err)
	}
	if verdict != "allow" {
		return &transferpb.PayReply{Reason: "risk: " + verdict}, nil
	}
	answer, err := s.ledger.Call(ctx, bolt.Request{Service: ledgerService, Method: "pay", Args: []any{p.Id, p.From, p.To, p.Amount}})
	if err != nil {
		return nil, unavailable("ledger", err)
	}
	if answer != "booked" {
		return &transferpb.PayReply{Reason: fmt.Sprintf("ledger: %v", answer)}, nil
	}
	receipt, err := s.sign(ctx, p)
	if err != nil {
		return nil, unavailable("payment is booked, its receipt is not signed, ask again with the same id: vault", err)
	}
	return &transferpb.PayReply{Booked: true, Receipt: receipt}, nil
}

// unavailable says that a payment can be asked for again.
func unavailable(who string, err error) error {
	var refused *call.Refusal
	if errors.As(err, &refused) {
		return status.Errorf(codes.Internal, "%s: %v", who, err)
	}
	return status.Errorf(codes.Unavailable, "%s: %v", who, err)
}

// statement is what a receipt says.
type statement struct {
	ID     string `json:"id"`
	From   string `json:"from"`
	To     string `json:"to"`
	Amount int64  `json:"amount"`
}

// sign has the vault sign a receipt. Signing again does no harm.
func (s *service) sign(ctx context.Context, p *transferpb.PayRequest) (*transferpb.Receipt, error) {
	payload, err := json.Marshal(statement{p.Id, p.From, p.To, p.Amount})
	if err != nil {
		return nil, err
	}
	for pause := 50 * time.Millisecond; ; pause *= 2 {
		r, err := s.signOnce(ctx, payload)
		if err == nil || pause > 2*time.Second {
			return r, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

func (s *service) signOnce(ctx context.Context, payload []byte) (*transferpb.Receipt, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.vault+"/sign", bytes.NewReader(payload))
	if err != nil {
		return nil, err
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %.200q", resp.Status, raw)
	}
	var sig struct {
		Signature []byte
		KeyID     string
	}
	if err := json.Unmarshal(raw, &sig); err != nil {
		return nil, err
	}
	return &transferpb.Receipt{Payload: payload, Signature: sig.Signature, KeyId: sig.KeyID}, nil
}

// Balance tells what is in an account.
func (s *service) Balance(ctx context.Context, r *transferpb.BalanceRequest) (*transferpb.BalanceReply, error) {
	v, err := s.ledger.Call(ctx, bolt.Request{Service: ledgerService, Method: "balance", Args: []any{r.Account}})
	var refused *call.Refusal
	if errors.As(err, &refused) {
		return nil, status.Error(codes.NotFound, refused.Reason)
	}
	if err != nil {
		return nil, unavailable("ledger", err)
	}
	amount, ok := v.(int64)
	if !ok {
		return nil, status.Errorf(codes.Internal, "ledger: balance is a %T", v)
	}
	return &transferpb.BalanceReply{Amount: amount}, nil
}

// Accounts lists all accounts.
func (s *service) Accounts(ctx context.Context, _ *transferpb.AccountsRequest) (*transferpb.AccountsReply, error) {
	v, err := s.ledger.Call(ctx, bolt.Request{Service: ledgerService, Method: "accounts"})
	if err != nil {
		return nil, unavailable("ledger", err)
	}
	text, _ := v.(string)
	out := &transferpb.AccountsReply{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		amount, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return nil, status.Errorf(codes.Internal, "ledger: account list holds %.100q", line)
		}
		out.Accounts = append(out.Accounts, &transferpb.Account{Name: name, Amount: amount})
	}
	return out, nil
}
