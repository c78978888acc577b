package kernel

import (
	"bufio"
	"bytes"
	"fmt"
	"path"
	"slices"
	"strings"
)

// sandboxModules are the drivers a sandbox needs: PCI transport, disk, agent
// port, network, the two file systems of its root, and that of shares. Containers
// with CAP_NET_ADMIN expect bridges and, if they were given it, /dev/net/tun;
// nobody in a sandbox can load a module.
var sandboxModules = []string{"virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "overlay", "erofs", "virtiofs", "bridge", "tun"}

// SandboxModules returns the names of the modules that every sandbox loads.
func SandboxModules() []string { return slices.Clone(sandboxModules) }

// order returns the module files, relative to the modules folder, in the order
// in which they load: each after everything it depends on. A name that is
// built into the kernel needs no file.
func order(modulesDep, modulesBuiltin []byte, names []string) ([]string, error) {
	files, deps, err := parseDep(modulesDep)
	if err != nil {
		return nil, err
	}
	builtin := map[string]bool{}
	for line := range strings.Lines(string(modulesBuiltin)) {
		builtin[moduleName(strings.TrimSpace(line))] = true
	}
	var out []string
	load := func(file string) {
		if !slices.Contains(out, file) {
			out = append(out, file)
		}
	}
	for _, name := range names {
		file, ok := files[moduleName(name)]
		switch {
		case !ok && builtin[moduleName(name)]:
			continue
		case !ok:
			return nil, fmt.Errorf("order modules: %q is neither a module nor built in", name)
		}
		// modules.dep lists all dependencies, the deepest last.
		for _, dep := range slices.Backward(deps[file]) {
			load(dep)
		}
		load(file)
	}
	return out, nil
}

// parseDep reads modules.dep: the file of each module name and what each file
// depends on.
func parseDep(data []byte) (files map[string]string, deps map[string][]string, err error) {
	files, deps = map[string]string{}, map[string][]string{}
	sc := bufio.NewScanner(bytes.NewReader(data))
	for sc.Scan() {
		file, rest, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			return nil, nil, fmt.Errorf("read modules.dep: line %q has no colon", sc.Text())
		}
		all := append([]string{file}, strings.Fields(rest)...)
		for _, f := range all {
			if f == "" || path.IsAbs(f) || path.Clean(f) != f || strings.HasPrefix(f, "..") {
				return nil, nil, fmt.Errorf("read modules.dep: %q is not a file below the modules folder", f)
			}
		}
		files[moduleName(file)] = file
		deps[file] = all[1:]
	}
	if err := sc.Err(); err != nil {
		return nil, nil, fmt.Errorf("read modules.dep: %w", err)
	}
	return files, deps, nil
}

// moduleName is the name of a module whatever way it is written: the kernel
// takes - and _ for the same.
func moduleName(file string) string {
	name := path.Base(file)
	if i := strings.Index(name, ".ko"); i >= 0 {
		name = name[:i]
	}
	return strings.ReplaceAll(name, "-", "_")
}
