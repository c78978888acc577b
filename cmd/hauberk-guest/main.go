// Command hauberk-guest is PID 1 of a sandbox. It takes no arguments: what it
// does it is told through a port of the machine.
package main

import "hauberk.dev/guest"

func main() { guest.Main() }
