package control

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/contain"
	"hauberk.dev/id"
)

// pick chooses the instance a person means: the named one, or the first
// running one of the workload.
func (c *Control) pick(namespace, workload, name string) (key, instance, error) {
	c.mu.Lock()
	w := c.world
	c.mu.Unlock()
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		if k.Namespace != namespace || name != "" && k.Name != name || workload != "" && i.workload != workload && k.Name != workload {
			continue
		}
		if i.status.Phase == wire.PhaseRunning || name != "" || k.Name == workload {
			return k, i, nil
		}
	}
	return key{}, instance{}, &admin.Error{Reason: "NotRunning",
		Message: fmt.Sprintf("no instance of %q runs in namespace %q", orElse(name, workload), namespace),
		Fix:     "`hauberk ps -n " + namespace + "` lists what runs; `hauberk why " + orElse(workload, name) + "` says why something does not"}
}

// dialNode opens a connection to the door of a node.
func (c *Control) dialNode(ctx context.Context, node string) (net.Conn, error) {
	nodes, _, _ := c.hub.snapshot()
	n, ok := nodes[node]
	if !ok || !n.ready {
		return nil, &admin.Error{Reason: "NodeNotReady", Message: fmt.Sprintf("node %s is not ready", node), Fix: "`hauberk status` says when it was last seen"}
	}
	want, err := id.Node(c.conf.TrustDomain, node)
	if err != nil {
		return nil, err
	}
	conn, err := (&tls.Dialer{Config: id.ClientTLS(c.self, id.Only(want))}).DialContext(ctx, "tcp", n.hello.Door)
	if err != nil {
		return nil, fmt.Errorf("dial node %s: %w", node, err)
	}
	return conn, nil
}

// exec records who runs what where, then joins the person's connection with
// the node's.
func (d *desk) exec(w http.ResponseWriter, r *http.Request) {
	var in admin.Exec
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&in); err != nil {
		refuseDesk(w, fmt.Errorf("decode exec: %w", err))
		return
	}
	node, leftover, err := d.openExec(r.Context(), in)
	if err != nil {
		refuseDesk(w, err)
		return
	}
	defer node.Close()
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		refuseDesk(w, fmt.Errorf("upgrade: %w", err))
		return
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Time{}); err != nil {
		d.c.note(fmt.Errorf("exec: %w", err))
		return
	}
	fmt.Fprintf(buf, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: %s\r\nConnection: Upgrade\r\n\r\n", admin.StreamProtocol)
	if err := buf.Flush(); err != nil {
		return
	}
	join(conn, buf.Reader, node, leftover)
}

// openExec records the exec and asks the node for it.
func (d *desk) openExec(ctx context.Context, in admin.Exec) (net.Conn, *bufio.Reader, error) {
	if len(in.Args) == 0 {
		return nil, nil, &admin.Error{Reason: "NoCommand", Message: "exec: no command is given", Fix: "hauberk exec WORKLOAD -- COMMAND"}
	}
	k, i, err := d.c.pick(orElse(in.Namespace, "default"), in.Workload, in.Instance)
	if err != nil {
		return nil, nil, err
	}
	body, err := json.Marshal(in)
	if err != nil {
		return nil, nil, fmt.Errorf("record exec: %w", err)
	}
	err = d.c.record(ctx, contain.Record{Kind: kindExec, Namespace: k.Namespace, Application: i.application, Workload: i.workload,
		Instance: k.Name, Node: i.node, Body: body, Text: fmt.Sprintf("the administrator runs %q in %s", strings.Join(in.Args, " "), k.Name)})
	if err != nil {
		return nil, nil, err
	}
	ask, err := json.Marshal(wire.Exec{Instance: k.Name, Args: in.Args, TTY: in.TTY, Rows: in.Rows, Cols: in.Cols})
	if err != nil {
		return nil, nil, fmt.Errorf("encode exec: %w", err)
	}
	conn, err := d.c.dialNode(ctx, i.node)
	if err != nil {
		return nil, nil, err
	}
	r, err := upgrade(conn, ask)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, r, nil
}

// upgrade asks a node to turn a connection into an exec stream.
func upgrade(conn net.Conn, ask []byte) (*bufio.Reader, error) {
	req, err := http.NewRequest(http.MethodPost, "https://node"+wire.PathExec, bytes.NewReader(ask))
	if err != nil {
		return nil, fmt.Errorf("ask node: %w", err)
	}
	req.Header.Set("Upgrade", admin.StreamProtocol)
	req.Header.Set("Connection", "Upgrade")
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, fmt.Errorf("ask node: %w", err)
	}
	if err := req.Write(conn); err != nil {
		return nil, fmt.Errorf("ask node: %w", err)
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, fmt.Errorf("ask node: %w", err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return nil, nodeRefusal(resp)
	}
	return r, conn.SetDeadline(time.Time{})
}

func nodeRefusal(resp *http.Response) error {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var e wire.Error
	if err == nil && json.Unmarshal(raw, &e) == nil && e.Message != "" {
		return &admin.Error{Reason: e.Reason, Message: e.Message, Fix: "`hauberk ps` says how the instance stands"}
	}
	return errors.Join(fmt.Errorf("ask node: status %d", resp.StatusCode), err)
}

// join copies both ways until one side ends.
func join(a net.Conn, fromA io.Reader, b net.Conn, fromB io.Reader) {
	done := make(chan struct{}, 2)
	for _, way := range []struct {
		to   net.Conn
		from io.Reader
	}{{b, fromA}, {a, fromB}} {
		go func() {
			io.Copy(way.to, way.from) // an end of either side ends both
			done <- struct{}{}
		}()
	}
	<-done
	a.Close()
	b.Close()
	<-done
}

// logs passes on what a workload wrote, and events what its Guard told.
func (d *desk) logs(w http.ResponseWriter, r *http.Request) { d.relay(w, r, wire.PathLogs) }

func (d *desk) events(w http.ResponseWriter, r *http.Request) { d.relay(w, r, wire.PathEvents) }

// tap records that somebody looks at the requests of an instance, and shows them
// as they pass.
func (d *desk) tap(w http.ResponseWriter, r *http.Request) {
	k, i, err := d.c.pick(namespaceOf(r), r.FormValue("workload"), r.FormValue("instance"))
	if err == nil {
		err = d.c.record(r.Context(), contain.Record{Kind: kindTap, Namespace: k.Namespace, Application: i.application, Workload: i.workload,
			Instance: k.Name, Node: i.node, Text: fmt.Sprintf("the administrator looks at the requests of %s", k.Name)})
	}
	if err != nil {
		refuseDesk(w, err)
		return
	}
	d.relayFrom(w, r, wire.PathTap, k, i)
}

// relay passes on what the node of the instance that is meant answers.
func (d *desk) relay(w http.ResponseWriter, r *http.Request, path string) {
	k, i, err := d.c.pick(namespaceOf(r), r.FormValue("workload"), r.FormValue("instance"))
	if err != nil {
		refuseDesk(w, err)
		return
	}
	d.relayFrom(w, r, path, k, i)
}

// relayFrom passes on what the node of one instance answers: what is recorded of
// an instance is about the one that is then looked at.
func (d *desk) relayFrom(w http.ResponseWriter, r *http.Request, path string, k key, i instance) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.c.dialNode(ctx, i.node) }}}
	q := url.Values{"instance": {k.Name}, "follow": {r.FormValue("follow")}}
	req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, "https://node"+path+"?"+q.Encode(), nil)
	if err != nil {
		refuseDesk(w, fmt.Errorf("ask node %s: %w", i.node, err))
		return
	}
	resp, err := client.Do(req)
	if err != nil {
		refuseDesk(w, fmt.Errorf("ask node %s: %w", i.node, err))
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		refuseDesk(w, nodeRefusal(resp))
		return
	}
	w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
	rc := http.NewResponseController(w)
	buf := make([]byte, 32<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil || rc.Flush() != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// join admits a node over the socket.
func (d *desk) join(r *http.Request) (any, error) {
	if uid, _ := r.Context().Value(peerKey{}).(uint32); uid != 0 {
		return nil, &admin.Error{Reason: "NotRoot", Message: fmt.Sprintf("user %d may not join a node", uid), Fix: "hauberk-node runs as root"}
	}
	var in admin.Join
	dec := json.NewDecoder(io.LimitReader(r.Body, maxRequest))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&in); err != nil {
		return nil, fmt.Errorf("decode join: %w", err)
	}
	return d.c.join(r.Context(), in)
}
