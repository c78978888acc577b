package vm

import "testing"

func TestSizeClass(t *testing.T) {
	for asked, want := range map[[2]int][2]int{
		{0, 0}: {128, 1}, {128, 1}: {128, 1}, {129, 2}: {192, 2}, {193, 3}: {256, 4}, {257, 5}: {384, 8}, {1000, 1}: {1024, 1},
		{1025, 1}: {1536, 1}, {1 << 20, 64}: {1 << 20, 64}, {1<<20 - 1, 33}: {1 << 20, 64},
	} {
		if mib, cpus := SizeClass(asked[0], asked[1]); [2]int{mib, cpus} != want {
			t.Errorf("%v: %d MiB and %d CPUs, want %v", asked, mib, cpus, want)
		}
	}
}
