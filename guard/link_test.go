package guard

import (
	"bytes"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"hauberk.dev/guard/bpf"
)

// The compiler and the programs must mean the same by the same bytes. Offsets
// are asserted in bpf/*.h, where they are compiled.
func TestLayoutsAgreeWithPrograms(t *testing.T) {
	spec, err := ebpf.LoadCollectionSpec("bpf/src/guard.o")
	if err != nil {
		t.Fatal(err)
	}
	c := compileForTest(t, 1, strict())
	const head = len(policyMagic) + 8 + 32
	if got := spec.Maps["current"].InnerMap.ValueSize; got != fixedSize || len(c.Blob) < head+int(got) {
		t.Errorf("struct policy has %d bytes, the compiler writes %d", got, fixedSize)
	}
	if got := spec.Maps["egress"].InnerMap.KeySize; int(got) != len(appendKey(nil, destination{prefix: netip.MustParsePrefix("10.0.0.0/8")})) {
		t.Errorf("struct destination has %d bytes, the compiler writes another number", got)
	}
	if got := spec.Maps["marks"].ValueSize; got != 72 {
		t.Errorf("struct mark has %d bytes, the agent writes 72", got)
	}
}

func TestLinkTwiceGivesTheSameBytes(t *testing.T) {
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	again, err := linkFor(m.kernel)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again, m.bundle) {
		t.Error("two bundles for one kernel differ")
	}
}

func TestLinkRefuses(t *testing.T) {
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	types, err := os.ReadFile(m.kernel.Types)
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := m.kernel.Module("overlay")
	if err != nil {
		t.Fatal(err)
	}
	other, err := m.kernel.Module("erofs")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name            string
		kernel, overlay []byte
		id, want        string
	}{
		{"no build id", types, overlay, "", "build id"},
		{"no kernel", nil, overlay, "aa", "read the guest's kernel"},
		{"broken kernel", []byte("not BTF at all"), overlay, "aa", "BTF of the guest's kernel"},
		{"cut kernel", types[:len(types)/2], overlay, "aa", "BTF of the guest's kernel"},
		{"another module", types, other, "aa", "find overlay's inode"},
		{"said to be built in", types, nil, "aa", "find overlay's inode"},
	} {
		var module io.ReaderAt
		if tt.overlay != nil {
			module = bytes.NewReader(tt.overlay)
		}
		_, err := bpf.Link(bytes.NewReader(tt.kernel), module, tt.id)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want an error with %q", tt.name, err, tt.want)
		}
	}
}
