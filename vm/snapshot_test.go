package vm

import (
	"errors"
	"strings"
	"testing"
)

// TestCheckOrigin names what is not as it was.
func TestCheckOrigin(t *testing.T) {
	was := Origin{Monitor: "QEMU 7", Arguments: "aa", Kernel: "bb", Initrd: "cc", MemoryMiB: 128, CPUs: 1, TrustDomain: "d"}
	s := Snapshot{Key: "k", Origin: was}
	if err := CheckOrigin(s, "k", Origin{}); err != nil {
		t.Errorf("the same key: %v", err)
	}
	for want, change := range map[string]func(*Origin){
		`monitor was "QEMU 7" and is "QEMU 8"`:                func(o *Origin) { o.Monitor = "QEMU 8" },
		"kernel was bb and is b":                              func(o *Origin) { o.Kernel = "b" },
		"initramfs of agent and Guard was cc and is c":        func(o *Origin) { o.Initrd = "c" },
		"memory in MiB was 128 and is 256":                    func(o *Origin) { o.MemoryMiB, o.Arguments = 256, "a" },
		"number of CPUs was 1 and is 2":                       func(o *Origin) { o.CPUs = 2 },
		`trust domain was "d" and is "e"`:                     func(o *Origin) { o.TrustDomain = "e" },
		"digest of the monitor's arguments was aa and is a":   func(o *Origin) { o.Arguments = "a" },
		"the state's key is k, the machine needs another-key": func(*Origin) {},
	} {
		is := was
		change(&is)
		if err := CheckOrigin(s, "another-key", is); !errors.Is(err, ErrWrongTemplate) || !strings.HasSuffix(err.Error(), ": "+want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
