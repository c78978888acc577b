// Command dubbogo serves and calls by dubbo-go, over the Dubbo protocol. A client
// says of each case "ok" or "FAIL".
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	hessian "github.com/apache/dubbo-go-hessian2"

	"dubbo.apache.org/dubbo-go/v3/client"
	_ "dubbo.apache.org/dubbo-go/v3/imports"
	"dubbo.apache.org/dubbo-go/v3/protocol"
	"dubbo.apache.org/dubbo-go/v3/server"
)

const service = "com.test.S"

// User is an argument that is an object.
type User struct {
	Name string
	Age  int32
	Tags map[string]string
}

// JavaClassName names it for Hessian.
func (User) JavaClassName() string { return "com.test.User" }

// S is what is served.
type S struct{}

// Reference names it for dubbo-go.
func (*S) Reference() string { return service }

// Plus adds.
func (*S) Plus(_ context.Context, a, b int32) (int32, error) { return a + b, nil }

// Echo returns what came.
func (*S) Echo(_ context.Context, s string) (string, error) { return s, nil }

// Older makes somebody a year older.
func (*S) Older(_ context.Context, u *User) (*User, error) { u.Age++; return u, nil }

// Drop is never allowed.
func (*S) Drop(context.Context) (string, error) { fmt.Println("DROPPED"); return "dropped", nil }

// Fail says no by itself.
func (*S) Fail(context.Context) (string, error) { return "", errors.New("as asked") }

func main() {
	hessian.RegisterPOJO(&User{})
	var err error
	if os.Args[1] == "serve" {
		err = serve()
	} else {
		err = call(os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "dubbogo:", err)
		os.Exit(1)
	}
}

func serve() error {
	srv, err := server.NewServer(server.WithServerProtocol(protocol.WithDubbo(), protocol.WithPort(20880)))
	if err != nil {
		return err
	}
	if err := srv.RegisterService(&S{}, server.WithInterface(service), server.WithNotRegister()); err != nil {
		return err
	}
	return srv.Serve()
}

func call(address string) error {
	cli, err := client.NewClient(client.WithClientProtocolDubbo(), client.WithClientURL("dubbo://"+address),
		client.WithClientSerialization("hessian2"), client.WithClientRequestTimeout(30*time.Second), client.WithClientRetries(0))
	if err != nil {
		return err
	}
	conn, err := cli.Dial(service)
	if err != nil {
		return err
	}
	failed := false
	for _, c := range []struct {
		name string
		run  func(*client.Connection) error
	}{{"sum", sum}, {"long string", long}, {"object", object}, {"200 at once", many}, {"exception", exception}, {"refused", refused}, {"after a refusal", sum}} {
		if err := c.run(conn); err != nil {
			failed = true
			fmt.Printf("FAIL %s: %v\n", c.name, err)
		} else {
			fmt.Printf("ok %s\n", c.name)
		}
	}
	if failed {
		return errors.New("cases have failed")
	}
	return nil
}

func sum(c *client.Connection) error {
	var n int32
	err := c.CallUnary(context.Background(), []any{int32(3), int32(4)}, &n, "Plus")
	if err == nil && n != 7 {
		err = fmt.Errorf("3 + 4 = %d", n)
	}
	return err
}

func long(c *client.Connection) error {
	for _, size := range []int{0, 1, 1000, 40_000, 300_000} {
		var got string
		want := strings.Repeat("xü", size/2)
		if err := c.CallUnary(context.Background(), []any{want}, &got, "Echo"); err != nil || got != want {
			return fmt.Errorf("%d bytes came back of %d, %v", len(got), len(want), err)
		}
	}
	return nil
}

func object(c *client.Connection) error {
	u := &User{}
	err := c.CallUnary(context.Background(), []any{&User{"Ada", 36, map[string]string{"a": "b"}}}, u, "Older")
	if err == nil && (u.Age != 37 || u.Name != "Ada" || u.Tags["a"] != "b") {
		err = fmt.Errorf("%+v", u)
	}
	return err
}

func many(c *client.Connection) error {
	errs := make([]error, 200)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			var n int32
			errs[i] = c.CallUnary(context.Background(), []any{int32(i), int32(i)}, &n, "Plus")
			if errs[i] == nil && n != int32(2*i) {
				errs[i] = fmt.Errorf("%d + %d = %d", i, i, n)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func exception(c *client.Connection) error {
	var s string
	if err := c.CallUnary(context.Background(), []any{}, &s, "Fail"); err == nil || !strings.Contains(err.Error(), "as asked") {
		return fmt.Errorf("%q, %v", s, err)
	}
	return nil
}

func refused(c *client.Connection) error {
	var s string
	if err := c.CallUnary(context.Background(), []any{}, &s, "Drop"); err == nil || !strings.Contains(err.Error(), "access denied") {
		return fmt.Errorf("%q, %v", s, err)
	}
	return nil
}
