// Package hostile boots guests whose every program is an attacker's and looks at
// what the host holds, says and keeps running.
//
// It holds tests only.
package hostile
