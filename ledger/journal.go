package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// The journal holds the batch that is being added, written and synced before
// any tile of it. After a crash the batch is added again, to the same place
// and with the same root, so a checkpoint that somebody copied just before
// the crash stays true. A journal that is cut off or of another base is of a
// batch that nobody was told about, or of one that is complete.
const (
	journalMagic = "hauberk ledger journal 1\n"
	maxBatch     = 256
	maxJournal   = len(journalMagic) + 8 + tlog.HashSize + 4 + maxBatch*(2+MaxEntry) + sha256.Size
)

type journal struct {
	base    int64 // size of the log before the batch
	root    tlog.Hash
	entries [][]byte
}

func (j journal) encode() []byte {
	b := []byte(journalMagic)
	b = binary.BigEndian.AppendUint64(b, uint64(j.base))
	b = append(b, j.root[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(j.entries)))
	for _, e := range j.entries {
		b = appendBundle(b, e)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func parseJournal(raw []byte) (journal, error) {
	head := len(journalMagic) + 8 + tlog.HashSize + 4
	if len(raw) < head+sha256.Size || len(raw) > maxJournal || !bytes.HasPrefix(raw, []byte(journalMagic)) {
		return journal{}, errors.New("journal is not whole")
	}
	body, sum := raw[:len(raw)-sha256.Size], raw[len(raw)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return journal{}, errors.New("journal is not whole: its checksum differs")
	}
	fields := body[len(journalMagic):]
	j := journal{base: int64(binary.BigEndian.Uint64(fields)), root: tlog.Hash(fields[8 : 8+tlog.HashSize])}
	count := binary.BigEndian.Uint32(fields[8+tlog.HashSize:])
	if j.base < 0 || count == 0 || count > maxBatch {
		return journal{}, fmt.Errorf("journal has base %d and %d entries", j.base, count)
	}
	var err error
	j.entries, err = splitBundle(body[head:], int(count))
	return j, err
}
