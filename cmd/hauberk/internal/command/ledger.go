package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/layout"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/ledger"
)

// keySuffix names the public key beside an exported ledger.
const keySuffix = ".key"

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
			list, err := s.entries(c.Context(), from, limit)
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error { return ledgerTable(w, list) })
		},
	}
	c.Flags().Uint64Var(&from, "from", 0, "first entry")
	c.Flags().IntVar(&limit, "limit", 0, "most entries to print; 0 is all")
	return c
}

// entries reads page after page.
func (s *session) entries(ctx context.Context, from uint64, limit int) ([]admin.LedgerEntry, error) {
	all := []admin.LedgerEntry{}
	for limit == 0 || len(all) < limit {
		most := 1000
		if limit > 0 {
			most = min(most, limit-len(all))
		}
		page, err := s.client().Ledger(ctx, from, most)
		if err != nil || len(page) == 0 {
			return all, err
		}
		all = append(all, page...)
		from = page[len(page)-1].Index + 1
	}
	return all, nil
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
		Use: "export FILE", Short: "Write the whole ledger to a tar, and its public key beside it",
		Args: args(1, 1, "the FILE to write"),
		RunE: func(c *cobra.Command, args []string) error {
			tar, key, err := s.client().LedgerTar(c.Context())
			if err != nil {
				return err
			}
			defer tar.Close()
			if err := fresh(args[0], tar); err != nil {
				return err
			}
			if err := fresh(args[0]+keySuffix, strings.NewReader(key+"\n")); err != nil {
				os.Remove(args[0])
				return err
			}
			s.progress().Say("wrote %s and %s; keep the key where nobody who can change the ledger can", args[0], args[0]+keySuffix)
			return nil
		},
	}
}

// fresh writes a file that must not be there, or none.
func fresh(name string, r io.Reader) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already: name another file", name)
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(name)
	}
	return err
}

func (s *session) ledgerVerify() *cobra.Command {
	var key string
	c := &cobra.Command{
		Use: "verify DIR|TAR", Short: "Verify a copy of the ledger offline",
		Long: `Verify checks everything in a copy of the ledger: the signature of its checkpoint,
every entry against its hash, every tile against the one below, and the root
against all of them. It asks nobody.

Without --key it takes the public key that export wrote beside the tar. That
shows that the copy is whole; to know whose it is, an auditor passes the key
they kept.`,
		Example: "  hauberk ledger export ledger.tar && hauberk ledger verify ledger.tar\n  hauberk ledger verify /mnt/copy/ledger --key hauberk.local+1f2e3d4c+AbCd...",
		Args:    args(1, 1, "the DIR or TAR to verify"),
		RunE: func(c *cobra.Command, args []string) error {
			own := key != ""
			vkey, err := verifierKey(key, args[0])
			if err != nil {
				return err
			}
			dir, done, err := ledgerDir(args[0])
			if err != nil {
				return err
			}
			defer done()
			r, err := ledger.VerifyDir(dir, vkey)
			if err != nil {
				return err
			}
			return s.print(r, func(w io.Writer) error { return reportTable(w, r, own) })
		},
	}
	c.Flags().StringVar(&key, "key", "", "public key of the ledger, or a file that holds it")
	return c
}

// verifierKey is the key that was given, as text or in a file, or the one
// beside the copy.
func verifierKey(given, copied string) (string, error) {
	name := given
	if given == "" {
		name = strings.TrimSuffix(copied, "/") + keySuffix
	}
	raw, err := os.ReadFile(name)
	switch {
	case err == nil:
		return strings.TrimSpace(string(raw)), nil
	case given != "":
		return given, nil
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("no %s: pass the ledger's public key with --key", name)
	}
	return "", err
}

func reportTable(w io.Writer, r ledger.Report, own bool) error {
	fmt.Fprintf(w, "the ledger %s is whole: %d entries in %d tiles, root %s\n", show.Clean(r.Origin), r.Size, r.Tiles, r.Root)
	if !r.First.IsZero() {
		fmt.Fprintf(w, "first entry %s, last %s\n", r.First.Format("2006-01-02 15:04:05"), r.Last.Format("2006-01-02 15:04:05"))
	}
	if !own {
		fmt.Fprintln(w, "verified with the key beside the copy; to know whose it is, pass the key you kept with --key")
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
	return tmp, done, nil
}
