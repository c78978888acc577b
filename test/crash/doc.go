// Package crash proves that no moment is a bad one to be killed at: it kills
// each program of a running installation again and again while payments are
// made, and looks afterwards at what must hold whatever happened.
//
// It holds tests only.
package crash
