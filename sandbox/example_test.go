package sandbox_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"hauberk.dev/sandbox"
)

// config is where the example's sandboxes are; the zero value is the default.
var config sandbox.Config

// imageName is that of an image: "busybox" from a registry, or of a file.
var imageName = "busybox"

// output is where the example prints.
var output = os.Stdout

// An agent is given a sandbox, runs what it was told, and is gone.
// TestExample runs it for real.
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	host, err := sandbox.Open(config)
	if err != nil {
		log.Fatal(err)
	}
	box, err := host.Create(ctx, sandbox.Options{Image: imageName, Args: []string{"sleep", "1000"}, Memory: 64 << 20})
	if err != nil {
		log.Fatal(err)
	}
	defer box.Remove(context.WithoutCancel(ctx), true)
	if err := box.Start(ctx); err != nil {
		log.Fatal(err)
	}
	p, err := box.Exec(ctx, sandbox.Cmd{Args: []string{"sh", "-c", "read name; echo hello $name; exit 3"}, Stdin: true})
	if err != nil {
		log.Fatal(err)
	}
	defer p.Close()
	var out, errs bytes.Buffer
	if err := p.Run(ctx, sandbox.Stdio{In: bytes.NewBufferString("agent\n"), Out: &out, Err: &errs}); err != nil {
		log.Fatal(err)
	}
	code, err := p.Wait(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprintf(output, "it said %q and ended with %d\n", &out, code)
}
