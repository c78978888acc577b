package netns

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// part is a kind of thing that rules are made of, as the kernel lists them.
type part struct {
	what string
	list int
	// named are the attributes that make its name; counts are those that change
	// by themselves or say only where it is kept.
	named, counts []uint16
}

var parts = []part{
	{"table", unix.NFT_MSG_GETTABLE, []uint16{unix.NFTA_TABLE_NAME}, []uint16{unix.NFTA_TABLE_USE, tableHandle}},
	{"chain", unix.NFT_MSG_GETCHAIN, []uint16{unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME},
		[]uint16{unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE, unix.NFTA_CHAIN_COUNTERS}},
	{"set", unix.NFT_MSG_GETSET, []uint16{unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME}, []uint16{setHandle, setExpr, setExpressions, setCount}},
	{"rule of", unix.NFT_MSG_GETRULE, []uint16{unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN},
		[]uint16{unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION}},
}

// Attributes that are not in x/sys. The expressions of a set hold its
// counters.
const (
	tableHandle    = 4
	setHandle      = 16
	setExpr        = 17
	setExpressions = 18
	setCount       = 20
)

// rules are all tables, chains, sets and rules of the namespace of the calling
// thread, of whatever family. What sets hold is left out.
func rules() (state, error) {
	s := state{}
	for _, p := range parts {
		if err := p.read(s); err != nil {
			return nil, fmt.Errorf("list %s: %w", p.what, err)
		}
	}
	return s, nil
}

// rules are those of a state that come from there.
func (s state) rules() state {
	out := state{}
	for name, is := range s {
		for _, p := range parts {
			if strings.HasPrefix(name, p.what+" ") {
				out[name] = is
			}
		}
	}
	return out
}

func (p part) read(s state) error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|p.list, unix.NLM_F_DUMP)
	req.AddRawData([]byte{unix.AF_UNSPEC, 0, 0, 0}) // family, version, resource
	messages, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return err
	}
	for _, m := range messages {
		if len(m) < 4 {
			return fmt.Errorf("a message of %d bytes", len(m))
		}
		attributes, err := nl.ParseRouteAttr(m[4:])
		if err != nil {
			return err
		}
		name, is := fmt.Sprintf("%s %s", p.what, family(m[0])), ""
		for _, a := range attributes {
			kind := a.Attr.Type &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if slices.Contains(p.counts, kind) {
				continue
			}
			if slices.Contains(p.named, kind) {
				name += " " + strings.TrimRight(string(a.Value), "\x00")
			}
			is += fmt.Sprintf("%d:%d:%s", kind, len(a.Value), a.Value)
		}
		// Rules have no names of their own: those of a chain are one, in order.
		sum := sha256.Sum256([]byte(s[name] + is))
		s[name] = hex.EncodeToString(sum[:])
	}
	return nil
}

func family(n byte) string {
	switch n {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_NETDEV:
		return "netdev"
	}
	return fmt.Sprintf("of family %d", n)
}
