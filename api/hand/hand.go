// Package hand is what who runs sandboxes by hand says to a shim beyond what
// containerd would: files in and out of a container, and what runs in it.
//
// The calls go over the shim's own socket, to Service; a request and its answer
// are the JSON of a type below. The files of a copy do not: they are a tar
// stream on a Unix socket that the caller listens on.
package hand

// Service has the methods.
const Service = "hauberk.hand.v1.Hand"

// The methods.
const (
	MethodCopy = "Copy" // CopyRequest, Empty
	MethodTop  = "Top"  // TopRequest, TopReply
)

// Empty is nothing to say.
type Empty struct{}

// CopyRequest asks for files to be copied.
type CopyRequest struct {
	Container string `json:"container"`
	// Out gives what Path names, by its last name; else the files go below the
	// directory Path.
	Out  bool   `json:"out"`
	Path string `json:"path"`
	// Socket is one on this machine that the shim connects to.
	Socket string `json:"socket"`
}

// TopRequest asks what runs in a container.
type TopRequest struct {
	Container string `json:"container"`
}

// TopReply is what runs, by the guest's word.
type TopReply struct {
	Tasks []Task `json:"tasks"`
}

// Task is a process of a container. Its numbers are those of the guest, not of
// the container.
type Task struct {
	PID       uint32 `json:"pid"`
	Parent    uint32 `json:"parent"`
	UID       uint32 `json:"uid"`
	Resident  uint64 `json:"resident"` // bytes
	CPUMicros uint64 `json:"cpuMicros"`
	Name      string `json:"name"`
}
