// Command assistant stands for an AI agent that runs code nobody has read. It
// does nothing but say that it is well; what is dangerous is in its image.
package main

import (
	"context"
	"io"
	"net/http"

	"example.com/bank/run"
)

func main() { run.Main("assistant", serve) }

func serve(ctx context.Context) error {
	ln, err := run.Listen(":8300")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	return run.HTTP(ctx, ln, mux)
}
