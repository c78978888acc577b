package meshload

import (
	"net"
	"testing"
)

// Without a proxy between them, clients and servers understand each other.
func TestWithoutProxy(t *testing.T) {
	for _, protocol := range Protocols {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l := &Ledger{}
		stop := Serve(protocol, ln, l)
		c := New(protocol, func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) })
		asked := uint64(0)
		for i, size := range []int{0, 1, 100, 5000, MaxSize - 1, MaxSize} {
			for range 2 {
				asked++
				if err := c.Ask(asked, size); err != nil {
					t.Errorf("%s: %d bytes: %v", protocol, size, err)
				}
			}
			c.Abort(1000+uint64(i), size, uint8(50*i))
		}
		if l.Served.Load() < asked || l.Twice.Load() != 0 {
			t.Errorf("%s: %d asked, %d served, %d twice", protocol, asked, l.Served.Load(), l.Twice.Load())
		}
		if err := c.Ask(1, 1); err != nil || l.Twice.Load() != 1 {
			t.Errorf("%s: asked twice, noted %d, %v", protocol, l.Twice.Load(), err)
		}
		c.Close()
		stop()
	}
}
