package qemu

import (
	"errors"
	"os"
	"testing"

	"hauberk.dev/vm"
)

func TestFewTemplatesAreKept(t *testing.T) {
	d := &Driver{config: Config{MaxTemplates: 2}}
	made := map[string]*vm.Template{}
	for _, k := range []string{"a", "b"} {
		made[k] = devNull(t, k)
		d.keep(made[k])
	}
	if d.known("a") != made["a"] { // now b is the one used least recently
		t.Fatal("a template that was kept is not known")
	}
	d.keep(devNull(t, "c"))
	if d.known("b") != nil || d.known("a") == nil || d.known("c") == nil {
		t.Errorf("kept: %v", d.templates)
	}
	if err := made["b"].Use(func(_, _ *os.File) error { return nil }); !errors.Is(err, vm.ErrTemplateClosed) {
		t.Errorf("the template given up: %v", err)
	}
}

func devNull(t *testing.T, k string) *vm.Template {
	t.Helper()
	var files [2]*os.File
	for i := range files {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		files[i] = f
	}
	tpl := vm.NewTemplate(k, "", files[0], files[1])
	t.Cleanup(func() { tpl.Close() })
	return tpl
}
