package netns

import (
	"errors"
	"net"
	"os"
	"testing"
)

// TestLooseTap takes a tap from nowhere into a namespace: it is the guest's
// there, and its descriptor carries frames.
func TestLooseTap(t *testing.T) {
	needRoot(t)
	nowhere, err := OpenNowhere()
	if err != nil {
		t.Fatal(err)
	}
	tap, err := nowhere.Tap()
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	if err := errors.Join(nowhere.Close(), nowhere.Close()); err != nil {
		t.Error(err)
	}
	if _, err := nowhere.Tap(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a tap of a closed nowhere: %v", err)
	}
	ns, err := Create(t.TempDir(), "loose")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Delete()
	if err := ns.Adopt(tap, guest); err != nil {
		t.Fatal(err)
	}
	err = ns.Do(func() error {
		ifi, err := net.InterfaceByName(Device)
		if err == nil && (ifi.HardwareAddr.String() != GatewayMAC.String() || ifi.Flags&net.FlagUp == 0) {
			t.Errorf("adopted as %+v", ifi)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	frame := ipv4(guest.MAC, guest.Address.As4(), [4]byte{1, 2, 3, 4}, 17)
	if _, err := tap.Write(append(make([]byte, 10), frame...)); err != nil {
		t.Error(err)
	}
	if d, err := ns.Dropped(); err != nil || len(d.Bypass) == 0 {
		t.Errorf("a frame of the adopted tap is not in the counters: %+v, %v", d, err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := ns.Adopt(null, guest); err == nil {
		t.Error("what is no tap was adopted")
	}
}
