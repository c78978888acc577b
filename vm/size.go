package vm

// SizeClass rounds a size up to one that has a template: memory to a power of
// two or one and a half times one, from 128 MiB; processors to a power of two.
// Zero is the smallest. A guest takes of the host what it has touched, so the
// memory that is rounded up costs one page in sixty-four.
func SizeClass(memoryMiB, cpus int) (classMiB, classCPUs int) {
	classMiB, classCPUs = 128, 1
	for classMiB < memoryMiB {
		if classMiB&(classMiB-1) == 0 {
			classMiB += classMiB / 2
		} else {
			classMiB += classMiB / 3
		}
	}
	for classCPUs < cpus {
		classCPUs *= 2
	}
	return min(classMiB, MaxMemoryMiB), min(classCPUs, MaxCPUs)
}
