package tls13

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"testing"

	"hauberk.dev/mesh/wire"
)

// FuzzRead gives the record reader whatever: bytes of the network, or records
// that a hostile peer has sealed.
func FuzzRead(f *testing.F) {
	f.Add([]byte("\x17\x03\x03\x00\x20abc"), false)
	f.Add([]byte{2, 'a', kindData, 6, messageKeyUpdate, 0, 0, 1, 1, kindHandshake, 3, 1, 0, kindAlert}, true)
	f.Add([]byte{6, messageTicket, 0, 0, 1, 1, kindHandshake, 4, 'a', kindData, 0, 0, 1, kindData}, true)
	f.Add([]byte{4, messageTicket, 0, 0, kindHandshake, 3, 2, 9, kindHandshake}, true)
	secret := bytes.Repeat([]byte{'c'}, 32)
	su, err := suiteOf(tls.TLS_AES_128_GCM_SHA256)
	if err != nil {
		f.Fatal(err)
	}
	far, near := sockets(f)
	far.CloseWrite() // every stream ends so
	go io.Copy(io.Discard, far)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		for _, client := range []bool{false, true} {
			in := b
			if seal {
				in = sealedBy(t, su, secret, b)
			}
			w := wire.Resume(near, wire.State{Unread: in})
			w.Thaw()
			c := &Conn{client: client, rekeyed: 3, wire: w}
			c.facts.CipherSuite = tls.TLS_AES_128_GCM_SHA256
			if err := c.key(secret, secret); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c)
			if len(got) > len(in) {
				t.Fatalf("%d bytes out of %d", len(got), len(in))
			}
			if !seal && err == nil {
				t.Fatal("an orderly end that nobody has sealed")
			}
			whole, err := json.Marshal(c.State())
			var s State
			if err := errors.Join(err, json.Unmarshal(whole, &s)); err != nil {
				t.Fatal(err)
			}
			if _, err := Resume(w, s, client); err != nil {
				t.Fatalf("what was put down cannot be taken up: %v", err)
			}
		}
	})
}

// sealedBy seals the pieces of b, each behind its length.
func sealedBy(t *testing.T, su *suite, secret, b []byte) (out []byte) {
	var h half
	if err := h.key(su, secret); err != nil {
		t.Fatal(err)
	}
	for len(b) > 1 {
		n := min(int(b[0]), len(b)-1)
		inner := b[1 : 1+n]
		if b = b[1+n:]; n == 0 {
			continue
		}
		record, err := h.seal(make([]byte, 0, 512), inner[n-1], inner[:n-1])
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, record...)
		if bytes.HasSuffix(inner, []byte{messageKeyUpdate, 0, 0, 1, 0, kindHandshake}) || bytes.HasSuffix(inner, []byte{messageKeyUpdate, 0, 0, 1, 1, kindHandshake}) {
			h.update()
		}
	}
	return out
}

// FuzzState gives Resume a hostile state, and uses what it takes.
func FuzzState(f *testing.F) {
	far, near := sockets(f)
	far.CloseWrite()
	go io.Copy(io.Discard, far)
	good, err := json.Marshal(made(f, near, tls.TLS_AES_128_GCM_SHA256, 's', 'c', true).State())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	for _, more := range []string{`"message":"BAA="`, `"message":"BAAABQ=="`, `"message":"GAAAAQ==","raw":"FwMDABE="`, `"owed":2,"useless":32`,
		`"plain":"YWJj","ended":true,"peerEnded":true`, `"skip":16777215`, `"fault":"x"`, `"peer":["AA=="]`} {
		f.Add(append(append([]byte(nil), good[:len(good)-1]...), ","+more+"}"...))
	}
	f.Add([]byte(`{}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s State
		if json.Unmarshal(b, &s) != nil {
			return
		}
		w := wire.Resume(near, wire.State{})
		c, err := Resume(w, s, true)
		if err != nil {
			return
		}
		w.Thaw()
		if _, err := io.ReadAll(c); err == nil && !c.State().out().PeerEnded {
			t.Fatal("an orderly end that nobody has sent")
		}
		c.Write([]byte("x"))
		c.CloseWrite()
	})
}
