package kube

import (
	"context"
	"log/slog"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
	"sigs.k8s.io/controller-runtime/pkg/log"
)

// SetLog tells the Kubernetes libraries, which log process-wide, where to.
// What they call information is of interest to their authors only and becomes
// debugging. A program calls it once, before anything else of this package;
// nil silences them.
func SetLog(l *slog.Logger) {
	if l == nil {
		l = slog.New(slog.DiscardHandler)
	}
	quiet := slog.New(demoting{l.Handler()})
	klog.SetSlogLogger(quiet)
	log.SetLogger(logr.FromSlogHandler(quiet.Handler()))
}

// demoting turns information into debugging.
type demoting struct{ slog.Handler }

func (d demoting) Enabled(ctx context.Context, level slog.Level) bool {
	return d.Handler.Enabled(ctx, demote(level))
}

func (d demoting) Handle(ctx context.Context, r slog.Record) error {
	r.Level = demote(r.Level)
	return d.Handler.Handle(ctx, r)
}

func (d demoting) WithAttrs(a []slog.Attr) slog.Handler { return demoting{d.Handler.WithAttrs(a)} }
func (d demoting) WithGroup(g string) slog.Handler      { return demoting{d.Handler.WithGroup(g)} }

func demote(l slog.Level) slog.Level {
	if l == slog.LevelInfo {
		return slog.LevelDebug
	}
	return l
}
