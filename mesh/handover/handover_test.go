package handover

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/unixsock"
)

// ends are both ends of a socket as it is in /run.
func ends(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	ln, path := listen(t)
	c, err := net.Dial("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	d, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.UnixConn), d
}

func listen(t testing.TB) (*net.UnixListener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ho")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	ln, err := unixsock.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln, path
}

// file is an open file that says what it is.
func file(t testing.TB, text string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "f")
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// All that is given arrives: items of every size, with and without descriptors,
// more of both than one message holds.
func TestLoad(t *testing.T) {
	var want Load
	want.Version = Version
	for i := range 300 {
		body, _ := json.Marshal(strings.Repeat("b", i%7*i))
		item := Item{Kind: fmt.Sprint("kind", i%3), Body: body}
		for k := range i % 4 {
			item.Files = append(item.Files, file(t, fmt.Sprintf("file %d of %d", k, i)))
		}
		want.Items = append(want.Items, item)
	}
	big, _ := json.Marshal(strings.Repeat("x", 5<<20))
	many := Item{Kind: "many", Body: json.RawMessage("{}")}
	for range MaxFiles {
		many.Files = append(many.Files, file(t, ""))
	}
	want.Items = append(want.Items, Item{Kind: "big", Body: big}, many, Item{Kind: "empty"}, Item{Kind: "big", Body: big})
	kept := make([]json.RawMessage, len(want.Items))
	for i, item := range want.Items {
		kept[i] = bytes.Clone(item.Body)
	}

	ln, path := listen(t)
	given := make(chan error, 1)
	gone := 0
	go func() {
		c, err := ln.AcceptUnix()
		if err != nil {
			given <- err
			return
		}
		given <- Give(t.Context(), c, func(int) (*Load, error) { return &want, nil },
			func(*Load) error { return errors.New("went back") }, func(*Load) { gone++ })
	}()
	started := 0
	var taken *Load
	err := Take(t.Context(), path, func(l *Load) (func(), error) {
		taken = l
		if l.Version != Version || len(l.Items) != len(kept) {
			t.Fatalf("version %d, %d items", l.Version, len(l.Items))
		}
		for i, item := range l.Items {
			if item.Kind != want.Items[i].Kind || !bytes.Equal(item.Body, kept[i]) || len(item.Files) != len(want.Items[i].Files) {
				t.Fatalf("item %d is %v", i, item)
			}
			for k, f := range item.Files {
				if text, err := io.ReadAll(io.NewSectionReader(f, 0, 99)); err != nil || i < 300 && string(text) != fmt.Sprintf("file %d of %d", k, i) {
					t.Fatalf("file %d of %d is %q, %v", k, i, text, err)
				}
			}
		}
		return func() { started++ }, nil
	})
	if err := errors.Join(err, <-given); err != nil || started != 1 || gone != 1 {
		t.Fatalf("%v; started %d times, gone %d times", err, started, gone)
	}
	for _, l := range []*Load{taken, &want} {
		for i, item := range l.Items {
			if len(bytes.Trim(item.Body, "\x00")) > 0 {
				t.Fatalf("the body of item %d is still there", i)
			}
		}
	}
	taken.close()
}

// What the two say when it goes wrong, and what becomes of the load then.
func TestRefused(t *testing.T) {
	small := func() (*Load, error) {
		return &Load{Version: Version, Items: []Item{{Kind: "k", Body: json.RawMessage("1")}}}, nil
	}
	for _, c := range []struct {
		name         string
		hold         func() (*Load, error)
		build        func(*Load) (func(), error)
		give, take   string
		held, backed int
	}{
		{"hold", func() (*Load, error) { return nil, errors.New("one does not stop") }, nil, "one does not stop", "one does not stop", 1, 0},
		{"build", small, func(*Load) (func(), error) { return nil, errors.New("no such thing") }, "no such thing", "no such thing", 1, 1},
		{"version", func() (*Load, error) { return &Load{Version: Version + 1}, nil }, nil, fmt.Sprintf("of version %d, and %d was agreed", Version+1, Version), "refused", 1, 1},
		{"kind", func() (*Load, error) { return &Load{Version: Version, Items: []Item{{}}}, nil }, nil, "out of bounds", "refused", 1, 1},
		{"files", func() (*Load, error) {
			return &Load{Version: Version, Items: []Item{{Kind: "k", Files: make([]*os.File, MaxFiles+1)}}}, nil
		}, nil, "out of bounds", "refused", 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := ends(t)
			held, backed, started := 0, 0, 0
			given := make(chan error, 1)
			go func() {
				given <- Give(t.Context(), b, func(int) (*Load, error) { held++; return c.hold() },
					func(*Load) error { backed++; return nil }, func(*Load) { t.Error("gone") })
			}()
			taker := &taker{conn: newConn(t.Context(), a), patience: patience, build: c.build}
			if c.build == nil {
				taker.build = func(*Load) (func(), error) { return func() { started++ }, nil }
			}
			terr, gerr := taker.take(), <-given
			if gerr == nil || !strings.Contains(gerr.Error(), c.give) || terr == nil || !strings.Contains(terr.Error(), c.take) {
				t.Errorf("give: %v\ntake: %v", gerr, terr)
			}
			if held != c.held || backed != c.backed || started != 0 {
				t.Errorf("held %d, back %d, started %d times", held, backed, started)
			}
		})
	}
}

// Nothing is held for who does not speak as one of ours does.
func TestStrangers(t *testing.T) {
	for name, hello := range map[string]string{
		"newer":   fmt.Sprintf(`{"version":%d,"word":"hello","oldest":%[1]d,"newest":%d}`, Version+1, Version+2),
		"older":   fmt.Sprintf(`{"version":%d,"word":"hello","oldest":1,"newest":%[1]d}`, least-1),
		"word":    `{"version":1,"word":"go"}`,
		"field":   `{"version":1,"word":"hello","oldest":1,"newest":1,"more":1}`,
		"nothing": ``,
		"garbage": "\x00\xff",
		"long":    strings.Repeat(" ", maxMessage+1),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := ends(t)
			if hello == "" {
				a.Close()
			} else if _, err := a.Write([]byte(hello)); err != nil {
				t.Fatal(err)
			}
			err := Give(t.Context(), b, func(int) (*Load, error) { t.Error("held"); return nil, errors.New("held") }, nil, nil)
			if err == nil {
				t.Error("taken")
			}
		})
	}
	t.Run("silent", func(t *testing.T) {
		_, b := ends(t)
		g := &giver{conn: newConn(t.Context(), b), patience: 20 * time.Millisecond, hold: func(int) (*Load, error) { t.Error("held"); return nil, nil }}
		if err := g.give(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	})
	t.Run("over", func(t *testing.T) {
		_, b := ends(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := Give(ctx, b, nil, nil, nil); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	for _, c := range []struct {
		peer, own int
		ok        bool
	}{{0, 0, true}, {0, 7, true}, {7, 7, true}, {8, 7, false}, {7, 0, false}} {
		if err := admit(c.peer, c.own); (err == nil) != c.ok {
			t.Errorf("user %d at the socket of %d: %v", c.peer, c.own, err)
		}
	}
}

// The last word decides, also when it comes late, when the other process is gone
// right after it, or when nobody wants to wait any more.
func TestLastWord(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(t *testing.T, a *conn, cancel context.CancelFunc)
		gone bool
	}{
		{"said and dead", func(t *testing.T, a *conn, _ context.CancelFunc) {
			say(t, a, wordGoing)
			a.socket.Close()
		}, true},
		{"said and cancelled", func(t *testing.T, a *conn, cancel context.CancelFunc) {
			say(t, a, wordGoing)
			cancel()
		}, true},
		{"dead", func(t *testing.T, a *conn, _ context.CancelFunc) { a.socket.Close() }, false},
		{"cancelled", func(t *testing.T, a *conn, cancel context.CancelFunc) { cancel() }, false},
		{"another word", func(t *testing.T, a *conn, _ context.CancelFunc) { say(t, a, wordReady) }, false},
		{"refused", func(t *testing.T, a *conn, _ context.CancelFunc) { say(t, a, wordRefused) }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			x, y := ends(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			verdict := ""
			g := &giver{conn: newConn(ctx, y), patience: patience, hold: func(int) (*Load, error) { return &Load{Version: Version}, nil },
				back: func(*Load) error { verdict += "back"; return nil }, gone: func(*Load) { verdict += "gone" }}
			// The giver hears nothing before all has been said.
			said := make(chan struct{})
			g.met = func(w word) {
				if w == wordGo {
					close(said)
				}
			}
			done := make(chan error, 1)
			go func() { done <- g.give() }()
			a := newConn(t.Context(), x)
			say(t, a, wordHello)
			hear(t, a, wordWelcome)
			hear(t, a, wordEnd)
			say(t, a, wordReady)
			hear(t, a, wordGo)
			<-said
			c.end(t, a, cancel)
			err := <-done
			if want := map[bool]string{true: "gone", false: "back"}[c.gone]; verdict != want || (err == nil) != c.gone {
				t.Errorf("%q, %v; want %q", verdict, err, want)
			}
			if !c.gone { // and from now on it cannot be said
				if err := a.send(patience, &message{Word: wordGoing}); err == nil {
					t.Error("who was not waited for goes")
				}
			}
		})
	}
}

// Who takes older versions only is given the newest of them, and told so.
func TestOlderVersion(t *testing.T) {
	x, y := ends(t)
	var held, gave int
	g := &giver{conn: newConn(t.Context(), y), patience: patience, hold: func(version int) (*Load, error) { held = version; return &Load{Version: version}, nil },
		back: func(*Load) error { return nil }, gone: func(l *Load) { gave = l.Version }}
	done := make(chan error, 1)
	go func() { done <- g.give() }()
	a := newConn(t.Context(), x)
	a.agreed = least
	if err := a.send(patience, &message{Word: wordHello, Oldest: least - 1, Newest: least}); err != nil {
		t.Fatal(err)
	}
	for _, w := range []word{wordWelcome, wordEnd, wordGo} {
		m, err := a.expect(patience, w)
		if err != nil {
			t.Fatal(err)
		}
		if m.Version != least {
			t.Errorf("%q is of version %d; want %d", w, m.Version, least)
		}
		if answer := map[word]word{wordEnd: wordReady, wordGo: wordGoing}[w]; answer != "" {
			if err := a.send(patience, &message{Word: answer}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := <-done; err != nil || held != least || gave != least {
		t.Errorf("held version %d, gave %d, %v; want %d", held, gave, err, least)
	}
}

func say(t *testing.T, c *conn, w word) {
	t.Helper()
	if err := c.send(patience, &message{Word: w, Oldest: Version, Newest: Version}); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, c *conn, w word) {
	t.Helper()
	if _, err := c.expect(patience, w); err != nil {
		t.Fatal(err)
	}
}

// An item is not shown by whoever prints it.
func TestItemsAreNotShown(t *testing.T) {
	item := Item{Kind: "flow", Body: json.RawMessage(`"the secret"`)}
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("x", "item", item, "load", Load{Items: []Item{item}}, "to", &Load{Items: []Item{item}})
	}
	for _, v := range []any{item, &item, Load{Items: []Item{item}}, &Load{Items: []Item{item}}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&log, verb+"\n", v)
		}
	}
	shown := log.String()
	for _, form := range []string{"the secret", "116 104 101", "746865", "dGhl", "0x74"} {
		if strings.Contains(shown, form) {
			t.Errorf("shown as %s in\n%s", form, shown)
		}
	}
	if strings.Count(shown, "flow") < 20 {
		t.Errorf("it was not printed:\n%s", shown)
	}
}

// Bodies are read from sealed memory only, and only as many as were announced.
func TestSealed(t *testing.T) {
	items := []Item{{Kind: "a", Body: json.RawMessage("12")}, {Kind: "b"}, {Kind: "c", Body: json.RawMessage("345")}}
	f, err := sealedIn(items)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := sealedOut(f, []size{{"a", 2, 0}, {"b", 0, 0}, {"c", 3, 0}}); err != nil || !reflect.DeepEqual(got, []json.RawMessage{[]byte("12"), {}, []byte("345")}) {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("sealed memory can be written")
	}
	for _, n := range []int{4, 6} {
		if _, err := sealedOut(f, []size{{"a", n, 0}}); err == nil {
			t.Errorf("%d bytes were read out of 5", n)
		}
	}
	if _, err := sealedOut(file(t, "12"), []size{{"a", 2, 0}}); err == nil {
		t.Error("a file was read")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := sealedOut(r, []size{{"a", 2, 0}}); err == nil {
		t.Error("a pipe was read")
	}
	fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	open := os.NewFile(uintptr(fd), "x")
	defer open.Close()
	open.WriteString("12")
	if _, err := sealedOut(open, []size{{"a", 2, 0}}); err == nil {
		t.Error("memory that can change was read")
	}
}

// FuzzMessage reads whatever a stranger says.
func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"version":1,"word":"hello","oldest":1,"newest":1}`), 0)
	f.Add([]byte(`{"version":1,"word":"items","items":[{"kind":"k","bytes":3,"files":2}]}`), 3)
	f.Add([]byte(`{"version":1,"word":"items","items":[{"kind":"k","bytes":9223372036854775807,"files":2}]}`), 3)
	f.Add([]byte(`{"version":1,"word":"end","count":-1}`), 0)
	f.Add([]byte(`{"version":1,"word":"refused","reason":"no"} `), 0)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		m, err := parse(b, files)
		if err != nil {
			return
		}
		want, total := 0, 0
		for _, i := range m.Items {
			want += i.Files
			total += i.Bytes
		}
		if m.Word == wordItems {
			want++
		}
		if files != want || total > 2*maxItem || m.Count > maxItems {
			t.Errorf("%d files, %d bytes, %+v", files, total, m)
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := parse(again, files); err != nil || !reflect.DeepEqual(n, m) && len(m.Items) > 0 {
			t.Errorf("%+v is read as %+v, %v", m, n, err)
		}
	})
}
