package vm

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"hauberk.dev/api/guestproto"
)

// NewSeed is what makes a guest its own: entropy, clock and names that no
// other has.
func NewSeed(hostname string) guestproto.Reseed {
	seed := guestproto.Reseed{UnixNanos: time.Now().UnixNano(), Hostname: hostname}
	var ids [32]byte
	rand.Read(seed.Entropy[:]) // never fails
	rand.Read(ids[:])
	seed.MachineID = hex.EncodeToString(ids[:16])
	u := ids[16:]
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80 // RFC 9562, version 4
	seed.BootID = fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
	return seed
}

// Refresh is the seed for a guest that stood still: its names, new entropy, and
// what time it is.
func Refresh(seed guestproto.Reseed) guestproto.Reseed {
	seed.UnixNanos = time.Now().UnixNano()
	rand.Read(seed.Entropy[:]) // never fails
	return seed
}
