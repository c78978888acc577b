package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// socketLimit is the longest path of a Unix socket that Linux takes.
const socketLimit = 107

// etcdStore is the running store behind the API.
type etcdStore struct {
	etcd *embed.Etcd
	lock *os.File
	// endpoint that clients in this process dial.
	endpoint string
}

// openEtcd starts a store of one member over Unix sockets in dir, a folder
// that only this user may enter. Two servers never share a folder.
func openEtcd(ctx context.Context, dir string, log *slog.Logger) (*etcdStore, error) {
	if err := privateDir(dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	if err := checkRoom(dir); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	e, err := startEtcd(ctx, dir, log)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	e.lock = lock
	return e, nil
}

func startEtcd(ctx context.Context, dir string, log *slog.Logger) (*etcdStore, error) {
	cfg := embed.NewConfig()
	cfg.Name = "hauberk"
	cfg.Dir = filepath.Join(dir, "etcd")
	// One member elects itself; the times only delay the start.
	cfg.TickMs, cfg.ElectionMs = 10, 100
	client, peer := etcdURL(dir, "client.sock"), etcdURL(dir, "peer.sock")
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(slogCore{log: log.With("part", "etcd")}))
	// The API server compacts; the store keeps what it needs until then.
	cfg.QuotaBackendBytes = 2 << 30
	e, err := tryEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start etcd in %s: %w", dir, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	select {
	case <-e.Server.ReadyNotify():
		return &etcdStore{etcd: e, endpoint: client.String()}, nil
	case err = <-e.Err():
	case <-ctx.Done():
		err = ctx.Err()
	}
	e.Close()
	return nil, fmt.Errorf("start etcd in %s: %w", dir, err)
}

// tryEtcd starts etcd, which panics where it can go no further.
func tryEtcd(cfg *embed.Config) (e *embed.Etcd, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("etcd gave up: %v", p)
		}
	}()
	return embed.StartEtcd(cfg)
}

// needed is what a new store takes of the disk at once: etcd writes its log
// into segments that it allocates ahead.
const needed = 160 << 20

// checkRoom refuses to start a store on a disk that it would fill.
func checkRoom(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, "etcd", "member", "wal")); err == nil {
		return nil // it has its segments
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(dir, &disk); err != nil {
		return fmt.Errorf("measure room in %s: %w", dir, err)
	}
	if free := int64(disk.Bavail) * disk.Bsize; free < needed {
		return fmt.Errorf("start store in %s: %d MiB are free, %d are needed: make room or choose another folder: %w", dir, free>>20, needed>>20, syscall.ENOSPC)
	}
	return nil
}

// Close ends the store and lets go of its folder.
func (e *etcdStore) Close() error {
	e.etcd.Close()
	return e.lock.Close()
}

// etcdURL is the address of a socket. etcd wants a port even there; it becomes
// part of the file's name.
func etcdURL(dir, name string) url.URL {
	return url.URL{Scheme: "unix", Path: filepath.Join(dir, name) + ":0"}
}

// privateDir makes sure that dir exists and that only its owner may enter.
func privateDir(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("open data folder %q: give an absolute path", dir)
	}
	if path := filepath.Join(dir, "client.sock:0"); len(path) > socketLimit {
		return fmt.Errorf("open data folder %q: its sockets would need %d bytes of path, %d are possible: choose a shorter folder", dir, len(path), socketLimit)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("open data folder: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("open data folder: %w", err)
	}
	return nil
}

// lockDir refuses a folder that another server uses. The kernel lets go of the
// lock when the process ends, however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data folder: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock data folder %s: another API server uses it: stop that one first: %w", dir, err), f.Close())
	}
	return f, nil
}

// slogCore hands what etcd logs, from warnings up, to a slog logger.
type slogCore struct{ log *slog.Logger }

func (slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }
func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	return slogCore{c.log.With(attributes(fields)...)}
}
func (slogCore) Sync() error { return nil }

func (c slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	c.log.Log(context.Background(), level, e.Message, attributes(fields)...)
	return nil
}

func attributes(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	out := make([]any, 0, 2*len(enc.Fields))
	for k, v := range enc.Fields {
		out = append(out, k, v)
	}
	return out
}
