// Command idle sleeps. Asked to, it writes a file and says whether it could.
package main

import (
	"fmt"
	"os"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		for { // select alone would be called a deadlock
			time.Sleep(time.Hour)
		}
	}
	if err := os.WriteFile(os.Args[1], []byte("x"), 0o600); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
