package guard

import "syscall"

// Error is what went wrong, with a number for machines.
type Error struct {
	Errno syscall.Errno
	text  string
}

func (e *Error) Error() string { return e.text }

func (e *Error) Unwrap() error { return e.Errno }

// fail names what was tried on what, and why it was not done.
func fail(verb, object string, cause error) error {
	return &Error{errnoOf(cause), verb + " " + object + ": " + cause.Error()}
}

func errnoOf(err error) syscall.Errno {
	switch e := err.(type) {
	case syscall.Errno:
		return e
	case *Error:
		return e.Errno
	}
	return syscall.EINVAL
}
