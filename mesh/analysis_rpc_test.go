package mesh

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "google.golang.org/grpc/interop/grpc_testing"
	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/plan"
)

// gadget is an object of a class that runs when it is read, in the dialect of SOFA.
const gadget = "O\xad" + "com.sun.rowset.JdbcRowSetImpl" + "\x91\x01a" + "o\x91" + "\x01x"

func TestInspectBolt(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("ledger", []plan.Port{{Port: 12200, Protocol: "bolt"}}, anyone(), nil)
	w.service("ledger").Inspect = &plan.Inspect{Observe: 30, Shed: 50, RetryAfter: plan.Duration(time.Minute)}
	w.apply()
	server := &rpcServer{}
	go server.listen(b.listen(t, 12200), server.bolt)
	c := web.mustDial(t, "10.99.0.2:12200")
	c.Write(slices.Concat(boltCall(1, sofaService, "get", true, "\x05hello"), boltCall(2, sofaService, "get", false, "\x11x' or '1'='1' or x"),
		boltCall(3, sofaService, "get", true, gadget), boltCall(4, sofaService, "get", false, "")))
	want := map[uint32]bolt.Status{1: bolt.OK, 2: bolt.OK, 3: bolt.Busy, 4: bolt.Busy}
	for range 4 {
		f, err := readBolt(c)
		if err != nil {
			t.Fatal(err)
		}
		if f.Status != want[f.ID] {
			t.Errorf("request %d: status %d, want %d: %q", f.ID, f.Status, want[f.ID], f.Content)
		}
	}
	if n := len(server.all()); n != 2 {
		t.Errorf("the server has seen %q", server.all())
	}
	w.awaitEvent(api.EventFinding, "observe at score 40: sql 40")
	w.awaitEvent(api.EventFinding, "gadget")
}

func TestInspectDubbo(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("ledger", []plan.Port{{Port: 20880, Protocol: "dubbo"}}, anyone(), nil)
	w.service("ledger").Inspect = &plan.Inspect{Shed: 40, RetryAfter: plan.Duration(time.Minute)}
	w.apply()
	server := &rpcServer{}
	go server.listen(b.listen(t, 20880), server.dubbo)
	c := web.mustDial(t, "10.99.0.2:20880")
	c.Write(slices.Concat(dubboCall(1, "com.test.S", "g", "get"), dubboCall(2, "com.test.S", "${jndi:ldap://x/a}", "get")))
	want := map[uint64]dubbo.Status{1: dubbo.OK, 2: dubbo.Exhausted}
	for range 2 {
		f, err := readDubbo(c)
		if err != nil {
			t.Fatal(err)
		}
		if f.Status != want[f.ID] {
			t.Errorf("request %d: status %d, want %d", f.ID, f.Status, want[f.ID])
		}
	}
	w.awaitEvent(api.EventFinding, "template")
}

func TestInspectGRPC(t *testing.T) {
	w := newWorld(t)
	web, bank := w.add("web", nil, nil, nil), w.add("bank", grpcPort, anyone(), nil)
	w.service("bank").Inspect = &plan.Inspect{Shed: 40, RetryAfter: plan.Duration(time.Millisecond)}
	w.apply()
	bank.serveGRPC(t)
	client := web.grpcClient(t, w.service("bank").Address.String()+":9090")
	if _, err := client.UnaryCall(t.Context(), &pb.SimpleRequest{Payload: &pb.Payload{Body: []byte("the union of all")}}); err != nil {
		t.Fatal(err)
	}
	_, err := client.UnaryCall(t.Context(), &pb.SimpleRequest{Payload: &pb.Payload{Body: []byte("1' union select a, b from c")}})
	if s := status.Convert(err); s.Code() != codes.Unavailable || !strings.Contains(s.Message(), "hauberk why") {
		t.Errorf("an attack: %v", err)
	}
	ev := w.awaitEvent(api.EventFinding, "sql")
	if !strings.Contains(ev.Reason, "/grpc.testing.TestService/UnaryCall") {
		t.Errorf("event %+v", ev)
	}
	time.Sleep(10 * time.Millisecond)
	if _, err := client.EmptyCall(t.Context(), &pb.Empty{}); err != nil {
		t.Errorf("after it: %v", err)
	}
}

func TestInspectHTTP2(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, anyone(), nil)
	w.service("api").Inspect = &plan.Inspect{Observe: 10, Shed: 40, RetryAfter: plan.Duration(time.Millisecond)}
	w.apply()
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if b, err := io.ReadAll(r.Body); err == nil && strings.Contains(string(b), "'1'='1") {
			t.Error("the attack has reached the server whole")
		}
		if strings.HasPrefix(r.URL.Path, "/none") {
			rw.WriteHeader(404)
		}
	})}
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()
	client := web.http2Client(t)
	ask := func(method, target, body string, trailers ...string) (int, string) {
		t.Helper()
		r, err := http.NewRequest(method, "http://10.99.0.2:8080"+target, io.MultiReader(strings.NewReader(body))) // of unknown length
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		for _, name := range trailers {
			r.Trailer = http.Header{name: {"1"}}
		}
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode, resp.Header.Get("Retry-After")
	}
	if got, _ := ask("POST", "/items", `{"a":1}`); got != 200 {
		t.Errorf("ordinary: %d", got)
	}
	if got, retry := ask("POST", "/items", `{"a":"x' or '1'='1"}`); got != 503 || retry == "" {
		t.Errorf("body: %d, Retry-After %q", got, retry)
	}
	time.Sleep(10 * time.Millisecond)
	if got, _ := ask("POST", "/items", `{"a":"x' or '1'='1"}`, "X-Sum"); got != 503 {
		t.Errorf("body that ends with a trailer: %d", got)
	}
	time.Sleep(10 * time.Millisecond)
	if got, _ := ask("POST", "/items", `{"a":1}`, "X-Sum"); got != 200 {
		t.Errorf("ordinary body that ends with a trailer: %d", got)
	}
	if got, _ := ask("GET", sqlQuery, ""); got != 503 {
		t.Errorf("target: %d", got)
	}
	for i := range 60 {
		time.Sleep(2 * time.Millisecond)
		ask("GET", fmt.Sprintf("/none/%d", i), "")
	}
	w.awaitEvent(api.EventFinding, "scan")
}
