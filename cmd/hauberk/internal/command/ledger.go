package command

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/layout"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/ledger"
)

// keyFile is the public key in an exported ledger.
const keyFile = "verifier.key"

func (s *session) ledger() *cobra.Command {
	c := &cobra.Command{
		Use: "ledger", Short: "Read, export and verify the evidence ledger",
		Example: "  hauberk ledger show --from 10\n  hauberk ledger export ledger.tar\n  hauberk ledger verify ledger.tar",
	}
	c.AddCommand(s.ledgerShow(), s.ledgerExport(), s.ledgerVerify())
	return c
}

func (s *session) ledgerShow() *cobra.Command {
	var from uint64
	var limit int
	c := &cobra.Command{
		Use: "show", Short: "Print entries in order",
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			if limit < 1 || limit > 10_000 {
				return usage(c, fmt.Errorf("--limit %d: must be 1 to 10000", limit))
			}
			list, err := s.client().Ledger(c.Context(), from, limit)
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error { return ledgerTable(w, list) })
		},
	}
	c.Flags().Uint64Var(&from, "from", 0, "first entry")
	c.Flags().IntVar(&limit, "limit", 100, "most entries to print")
	return c
}

func ledgerTable(w io.Writer, list []admin.LedgerEntry) error {
	var rows [][]string
	for _, l := range list {
		var e ledger.Entry
		if err := json.Unmarshal(l.Entry, &e); err != nil {
			return fmt.Errorf("read entry %d: %w", l.Index, err)
		}
		about := e.Subject
		if about == "" {
			about = strings.Trim(e.Namespace+"/"+e.Workload, "/")
		}
		rows = append(rows, []string{strconv.FormatUint(l.Index, 10), e.Time.Local().Format("15:04:05.000"), e.Kind, e.Actor, about, e.Text})
	}
	return show.Rows(w, []string{"ENTRY", "TIME", "KIND", "ACTOR", "ABOUT", "TEXT"}, rows)
}

func (s *session) ledgerExport() *cobra.Command {
	return &cobra.Command{
		Use: "export FILE", Short: "Write the whole ledger and its public key to a tar",
		Args: args(1, 1, "the FILE to write, or - for standard output"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			r, err := s.client().LedgerTar(c.Context())
			if err != nil {
				return err
			}
			defer r.Close()
			if args[0] == "-" {
				_, err := io.Copy(s.Out, r)
				return err
			}
			f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("%s is there already: name another file", args[0])
			}
			if err != nil {
				return err
			}
			defer func() {
				if err = errors.Join(err, f.Close()); err != nil {
					os.Remove(args[0])
				}
			}()
			_, err = io.Copy(f, r)
			return err
		},
	}
}

func (s *session) ledgerVerify() *cobra.Command {
	var key string
	c := &cobra.Command{
		Use: "verify DIR|TAR", Short: "Verify a copy of the ledger offline",
		Long: `Verify checks everything in a copy of the ledger: the signature of its checkpoint,
every entry against its hash, every tile against the one below, and the root
against all of them. It asks nobody.

Without --key it takes the public key that lies in the copy. That shows that the
copy is whole, not whose it is: an auditor keeps the key apart and passes it.`,
		Example: "  hauberk ledger export ledger.tar && hauberk ledger verify ledger.tar\n  hauberk ledger verify /var/lib/hauberk/control/ledger --key KEY",
		Args:    args(1, 1, "the DIR or TAR to verify"),
		RunE: func(c *cobra.Command, args []string) error {
			dir, done, err := ledgerDir(args[0])
			if err != nil {
				return err
			}
			defer done()
			vkey, own := key, true
			if vkey == "" {
				own = false
				if vkey, err = keyOf(dir); err != nil {
					return err
				}
			}
			r, err := ledger.VerifyDir(dir, strings.TrimSpace(vkey))
			if err != nil {
				return err
			}
			return s.print(r, func(w io.Writer) error { return reportTable(w, r, own) })
		},
	}
	c.Flags().StringVar(&key, "key", "", "public key of the ledger, as hauberk ledger export wrote it once")
	return c
}

// keyOf is the public key that lies in a copy, or beside a live ledger.
func keyOf(dir string) (string, error) {
	for _, name := range []string{filepath.Join(dir, keyFile), filepath.Join(filepath.Dir(dir), keyFile)} {
		raw, err := os.ReadFile(name)
		if err == nil {
			return string(raw), nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("no %s in %s: pass the ledger's public key with --key", keyFile, dir)
}

func reportTable(w io.Writer, r ledger.Report, own bool) error {
	fmt.Fprintf(w, "the ledger %s is whole: %d entries in %d tiles, root %s\n", show.Clean(r.Origin), r.Size, r.Tiles, r.Root)
	if !r.First.IsZero() {
		fmt.Fprintf(w, "first entry %s, last %s\n", r.First.Format("2006-01-02 15:04:05"), r.Last.Format("2006-01-02 15:04:05"))
	}
	if !own {
		fmt.Fprintln(w, "verified with the key in the copy; to know whose it is, pass the key you kept with --key")
	}
	return nil
}

// ledgerDir is the directory of a ledger: the one named, or a tar unpacked.
func ledgerDir(name string) (dir string, done func(), err error) {
	fi, err := os.Stat(name)
	if err != nil {
		return "", nil, err
	}
	if fi.IsDir() {
		return name, func() {}, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	tmp, err := os.MkdirTemp("", "hauberk-ledger-*")
	if err != nil {
		return "", nil, err
	}
	done = func() { os.RemoveAll(tmp) }
	if err := layout.Unpack(f, tmp); err != nil {
		done()
		return "", nil, fmt.Errorf("read %s: %w", name, err)
	}
	return under(tmp), done, nil
}

// under steps into a directory that holds nothing but one directory, as tars
// often do.
func under(dir string) string {
	list, err := os.ReadDir(dir)
	if err == nil && len(list) == 1 && list[0].IsDir() && list[0].Name() != "tile" {
		return filepath.Join(dir, list[0].Name())
	}
	return dir
}
