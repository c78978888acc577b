package run_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"hauberk.dev/internal/run"
)

var errBroken = errors.New("broken")

func untilDone(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func TestAllFirstEndEndsTheRest(t *testing.T) {
	for _, c := range []struct {
		name  string
		first func(context.Context) error
		want  string // "" means no error
	}{
		{"error", func(context.Context) error { return errBroken }, "first: broken"},
		{"early end", func(context.Context) error { return nil }, "first: ended before it was asked to"},
		{"panic", func(context.Context) error { panic("oh") }, "first: panic: oh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended := 0
				other := func(ctx context.Context) error { err := untilDone(ctx); ended++; return err }
				err := run.All(t.Context(), run.Task{Name: "second", Run: other}, run.Task{Name: "first", Run: c.first})
				if ended != 1 {
					t.Error("All returned before the second task had ended")
				}
				if err == nil || !strings.HasPrefix(err.Error(), c.want) {
					t.Errorf("error is %v, want %q", err, c.want)
				}
			})
		})
	}
}

func TestAllCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		late := func(ctx context.Context) error { <-ctx.Done(); time.Sleep(time.Minute); return errBroken }
		time.AfterFunc(time.Hour, cancel)
		began := time.Now()
		err := run.All(ctx, run.Task{Name: "good", Run: untilDone}, run.Task{Name: "bad", Run: late})
		if got := time.Since(began); got != time.Hour+time.Minute {
			t.Errorf("All took %v", got)
		}
		if !errors.Is(err, errBroken) || strings.Contains(err.Error(), "good") {
			t.Errorf("error is %v, want only that of task bad", err)
		}
	})
}

func TestAllOfNothing(t *testing.T) {
	if err := run.All(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestHTTPFinishesRequestsUnderWay(t *testing.T) {
	began, release := make(chan struct{}), make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(began)
		<-release
		io.WriteString(w, "done")
	})}
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- run.All(ctx, run.HTTP("web", srv, ln, time.Minute)) }()
	answer := make(chan string, 1)
	go func() {
		resp, err := http.Get("http://" + ln.Addr().String())
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		answer <- string(b)
	}()
	<-began
	cancel()
	close(release)
	if got := <-answer; got != "done" {
		t.Errorf("the request under way got %q", got)
	}
	if err := <-over; err != nil {
		t.Error(err)
	}
}

func TestHTTPCutsAfterGrace(t *testing.T) {
	began := make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(began)
		<-r.Context().Done()
	})}
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- run.All(ctx, run.HTTP("web", srv, ln, 10*time.Millisecond)) }()
	go func() {
		if resp, err := http.Get("http://" + ln.Addr().String()); err == nil {
			resp.Body.Close()
		}
	}()
	<-began
	cancel()
	select {
	case err := <-over:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("a request without end held the server past its grace")
	}
}

func TestHTTPSaysWhyItStopped(t *testing.T) {
	ln := listen(t)
	ln.Close()
	err := run.All(t.Context(), run.HTTP("web", &http.Server{}, ln, time.Second))
	if err == nil || !errors.Is(err, net.ErrClosed) || !strings.HasPrefix(err.Error(), "web: serve ") {
		t.Errorf("error is %v", err)
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}
