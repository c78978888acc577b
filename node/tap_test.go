package node

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	api "hauberk.dev/api/mesh"
)

// fakeTap answers what it holds, then ends the person's patience.
type fakeTap struct {
	answers []api.Tapped
	ids     map[uint64]bool
	gone    context.CancelFunc
}

func (f *fakeTap) Tap(_ context.Context, _ string, tap uint64) (api.Tapped, error) {
	f.ids[tap] = true
	if len(f.answers) == 0 {
		f.gone()
		return api.Tapped{}, nil
	}
	a := f.answers[0]
	f.answers = f.answers[1:]
	return a, nil
}

func TestFollow(t *testing.T) {
	ctx, gone := context.WithCancel(t.Context())
	f := &fakeTap{ids: map[uint64]bool{}, gone: gone, answers: []api.Tapped{{}, {Requests: []api.Request{{Path: "/a"}, {Path: "/b"}}}, {Lost: 3}}}
	var out bytes.Buffer
	if err := follow(ctx, f, "i", &out, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || !strings.Contains(lines[0], `"path":"/a"`) || !strings.Contains(lines[2], `"lost":3`) || len(f.ids) != 1 {
		t.Errorf("%q, taps %v", lines, f.ids)
	}
	broken := errors.New("gone")
	if err := follow(t.Context(), &fakeTap{ids: map[uint64]bool{}, answers: []api.Tapped{{}}}, "i", &out, func() error { return broken }); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}
