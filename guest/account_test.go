package guest

import (
	"reflect"
	"strings"
	"syscall"
	"testing"

	"hauberk.dev/api/guestproto"
)

const (
	passwdFile = "root:x:0:0:root:/root:/bin/sh\n" +
		"# a comment\n" +
		"broken:x:nan:5:::\n" +
		"short:x:7\n" +
		"app:x:1000:1001:App:/home/app:/bin/sh\n" +
		"1000:x:44:45:a name of digits:/n:/bin/sh\n" +
		"last:x:9:9::/:"
	groupFile = "root:x:0:\nextra:x:1002:other,app\napp:x:1001:\nappx:x:1003:appy\nwheel:x:10:app\n"
)

func TestResolve(t *testing.T) {
	for _, tt := range []struct {
		user string
		want identity
		err  string
	}{
		{"root", identity{0, 0, nil, "/root"}, ""},
		{"app", identity{1000, 1001, []uint32{1002, 10}, "/home/app"}, ""},
		{"app:extra", identity{1000, 1002, nil, "/home/app"}, ""},
		{"app:77", identity{1000, 77, nil, "/home/app"}, ""},
		{"1000", identity{1000, 1001, []uint32{1002, 10}, "/home/app"}, ""}, // the number, not the name of digits
		{"4711", identity{4711, 0, nil, "/"}, ""},
		{"4711:12", identity{4711, 12, nil, "/"}, ""},
		{"last", identity{9, 9, nil, "/"}, ""},
		{"nobody", identity{}, `find user "nobody"`},
		{"short", identity{}, `find user "short"`},
		{"broken", identity{}, `read uid of user "broken"`},
		{"app:none", identity{}, `find group "none"`},
		{"4294967295", identity{}, `find user "4294967295"`}, // the kernel's word for none
		{"", identity{}, `find user ""`},
	} {
		got, err := resolve(tt.user, []byte(passwdFile), []byte(groupFile))
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: got %+v, %v, want an error with %q", tt.user, got, err, tt.err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%q: got %+v, %v, want %+v", tt.user, got, err, tt.want)
		}
	}
}

// FuzzResolve reads accounts from whatever an image has in its files.
func FuzzResolve(f *testing.F) {
	f.Add("app:extra", []byte(passwdFile), []byte(groupFile))
	f.Add("1000", []byte("::::::\n"), []byte(":::\n"))
	f.Fuzz(func(t *testing.T, user string, passwd, group []byte) {
		who, err := resolve(user, passwd, group)
		if err == nil && (who.uid == 1<<32-1 || who.gid == 1<<32-1 || len(who.groups) > 64) {
			t.Errorf("%q is %+v", user, who)
		}
	})
}

func TestEnvironment(t *testing.T) {
	who := identity{home: "/home/app"}
	for _, tt := range []struct {
		program guestproto.Program
		want    string
	}{
		{guestproto.Program{}, "PATH=" + defaultPath + " HOME=/home/app"},
		{guestproto.Program{TTY: true, Env: []string{"HOME=/x", "PATHS=1"}}, "HOME=/x PATHS=1 PATH=" + defaultPath + " TERM=xterm"},
		{guestproto.Program{TTY: true, Env: []string{"PATH=", "HOME=", "TERM=vt100"}}, "PATH= HOME= TERM=vt100"},
	} {
		if got := strings.Join(environment(&tt.program, who), " "); got != tt.want {
			t.Errorf("%+v: got %q, want %q", tt.program, got, tt.want)
		}
	}
}

func TestField(t *testing.T) {
	const file = "MemTotal:       1024 kB\nMemFree: 5 kB\nusage_usec 77\noom 3\noom_kill 2"
	for name, want := range map[string]uint64{"MemTotal:": 1024, "MemFree:": 5, "usage_usec ": 77, "oom_kill ": 2, "oom ": 3, "none": 0} {
		if got := field([]byte(file), name); got != want {
			t.Errorf("%s is %d, want %d", name, got, want)
		}
	}
}

func TestHistory(t *testing.T) {
	h, err := newHistory()
	if err != nil {
		t.Fatal(err)
	}
	defer h.drop()
	var all []byte
	for i := range 5000 {
		line := []byte(strings.Repeat(string(rune('a'+i%26)), i%97))
		h.keep(line)
		all = append(all, line...)
		want := all[max(0, len(all)-guestproto.LogBytes):]
		if got := h.append(nil); i%100 == 0 && string(got) != string(want) {
			t.Fatalf("after %d lines the log has %d bytes, or others; want %d", i, len(got), len(want))
		}
	}
	(*history)(nil).keep([]byte("no log is kept"))
}

func TestAttribute(t *testing.T) {
	b := attribute(nil, syscall.IFLA_MTU, le32(nil, 1500))
	b = attribute(b, 7, []byte{1, 2, 3, 4, 5})
	if want := "\x08\x00\x04\x00\xdc\x05\x00\x00" + "\x09\x00\x07\x00\x01\x02\x03\x04\x05\x00\x00\x00"; string(b) != want {
		t.Errorf("got %q, want %q", b, want)
	}
}

// TestFilter runs the filter as the kernel would.
func TestFilter(t *testing.T) {
	const native, foreign = 0xc000003e, 0x40000003
	const allow, refuse = 0x7fff0000, 0x00050001
	filter := syscallInsns()
	for _, tt := range []struct{ arch, number, want uint32 }{
		{native, syscall.SYS_READ, allow}, {native, syscall.SYS_EXECVE, allow}, {native, 321, allow}, {native, 425, allow},
		{native, 248, refuse}, {native, 249, refuse}, {native, 250, refuse}, {native, 323, refuse},
		{native, 247, allow}, {native, 251, allow}, {native, 322, allow}, {native, 324, allow},
		{native, 0x40000000, refuse}, {native, 0x40000001, refuse}, {native, 0xffffffff, refuse},
		{foreign, syscall.SYS_READ, refuse}, {0, 0, refuse},
	} {
		if got := interpret(t, filter, tt.arch, tt.number); got != tt.want {
			t.Errorf("call %d of %#x: got %#x, want %#x", tt.number, tt.arch, got, tt.want)
		}
	}
}

func interpret(t *testing.T, filter []filterInsn, arch, number uint32) uint32 {
	var acc uint32
	for pc := 0; pc < len(filter); pc++ {
		in, taken := filter[pc], false
		switch in.code {
		case 0x20:
			acc = map[uint32]uint32{0: number, 4: arch}[in.k]
			continue
		case 0x06:
			return in.k
		case 0x15:
			taken = acc == in.k
		case 0x35:
			taken = acc >= in.k
		}
		if taken {
			pc += int(in.jt)
		} else {
			pc += int(in.jf)
		}
	}
	t.Fatal("the filter has no end")
	return 0
}
