package vm

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"
)

// TestLetGo lets go of a child that runs on, and finds it reaped when it ended.
func TestLetGo(t *testing.T) {
	c := exec.Command("sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	h, err := openHandle(c.Process.Pid, 0, c.Process)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.letGo(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.wait(); err == nil {
		t.Error("a handle that was let go of waits")
	}
	if _, err := startTime(c.Process.Pid); err != nil {
		t.Errorf("it ended with its handle: %v", err)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	name := "/proc/" + strconv.Itoa(c.Process.Pid)
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Millisecond) {
		if _, err = os.Stat(name); errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
	t.Errorf("%s is there still: %v", name, err)
}
