// Command inside is what the images of the validation suite run besides
// busybox. Its name says what it is: pause waits, nginx and httpd serve a page,
// nnp tells its effective user, ipcs and pgrep are two words that Debian's
// busybox does not know, and sh is what its shell does not do.
package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	name := filepath.Base(os.Args[0])
	if err := run(name, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "pause":
		return pause()
	case "nginx", "httpd":
		fmt.Fprintf(os.Stderr, "Command line: %q\n", os.Args)
		return serve()
	case "nnp":
		fmt.Printf("Effective uid: %d\n", os.Geteuid())
		return nil
	case "ipcs":
		return segments()
	case "pgrep":
		return find(args)
	case "sh":
		return shell(args)
	}
	return fmt.Errorf("no word of mine")
}

// pause reaps what is given to it until it is told to end.
func pause() error {
	told := make(chan os.Signal, 8)
	signal.Notify(told, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range told {
		if s != syscall.SIGCHLD {
			return nil
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}

// serve is as much of nginx as the suite looks at: a page on the port of
// PORT, its process number in a file.
func serve() error {
	port := os.Getenv("PORT")
	if port == "" {
		port = "80"
	}
	if err := os.WriteFile("/var/run/nginx.pid", fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
		return err
	}
	page := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "<title>Welcome to nginx!</title>")
	}
	return http.ListenAndServe(":"+port, http.HandlerFunc(page))
}

// shell is busybox' but for one thing: Debian's would run its own "ls" without
// looking at /bin/ls, which may be masked. A command of one word is looked for.
func shell(args []string) error {
	if len(args) == 2 && args[0] == "-c" && !strings.ContainsAny(args[1], " \t\n;&|<>()$`\\\"'*?[]#~=%!{}/") {
		program := "/bin/" + args[1]
		switch err := syscall.Exec(program, args[1:], os.Environ()); {
		case errors.Is(err, syscall.EACCES):
			fmt.Fprintf(os.Stderr, "%s: %s: Permission denied\n", os.Args[0], args[1])
			os.Exit(126)
		case !errors.Is(err, syscall.ENOENT):
			return err
		}
	}
	return syscall.Exec("/bin/busybox", os.Args, os.Environ())
}

// segments lists shared memory as "ipcs -m" does.
func segments() error {
	raw, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return err
	}
	fmt.Println("------ Shared Memory Segments --------\nkey        shmid      owner      bytes")
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	for _, line := range lines[1:] {
		if f := strings.Fields(line); len(f) > 7 {
			fmt.Println(f[0], f[1], f[7], f[3])
		}
	}
	return nil
}

// find prints processes by name, and ends as pgrep does.
func find(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("wants one name")
	}
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return err
	}
	found := false
	for _, name := range names {
		if raw, err := os.ReadFile(name); err == nil && strings.Contains(string(raw), args[0]) {
			found = true
			fmt.Println(filepath.Base(filepath.Dir(name)))
		}
	}
	if !found {
		os.Exit(1)
	}
	return nil
}
