// Command idle writes a file every half second and does nothing else. Asked
// to, it writes one file and says whether it could.
package main

import (
	"fmt"
	"os"
	"time"
)

func main() {
	if len(os.Args) > 2 && os.Args[1] == "write" {
		if err := os.WriteFile(os.Args[2], []byte("x"), 0o600); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	for {
		_ = os.WriteFile("/data/state", []byte("alive"), 0o600) // a policy may refuse it
		time.Sleep(500 * time.Millisecond)
	}
}
