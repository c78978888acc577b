// Package hand is what who runs sandboxes by hand says to a shim beyond what
// containerd would: files in and out of a container, what runs in it, and that it
// is to be saved. A saved one goes on by Create with its directory as checkpoint.
//
// The calls go over the shim's own socket, to Service; a request and its answer
// are the JSON of a type below. The files of a copy do not: they are a tar
// stream on a Unix socket that the caller listens on.
package hand

import "encoding/json"

// Service has the methods.
const Service = "hauberk.hand.v1.Hand"

// The methods.
const (
	MethodCopy = "Copy" // CopyRequest, Empty
	MethodTop  = "Top"  // TopRequest, TopReply
	// SnapshotRequest, SnapshotReply
	MethodSnapshot = "Snapshot"
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

// SnapshotRequest asks for a container to be saved with its machine: all of its
// memory, and so all of its secrets.
type SnapshotRequest struct {
	Container string `json:"container"`
	// Dir is made, and must not be there yet.
	Dir string `json:"dir"`
	// End ends the container instead of letting it go on.
	End bool `json:"end,omitempty"`
	// Note is kept with it, for whoever has it restored.
	Note json.RawMessage `json:"note,omitempty"`
}

// SnapshotReply says what was saved.
type SnapshotReply struct {
	Bytes int64 `json:"bytes"`
	// StoodMicros is how long the container stood still.
	StoodMicros int64 `json:"stoodMicros"`
}

// SavedVersion of Saved.
const SavedVersion = 1

// Saved is the note that a shim puts into a snapshot.
type Saved struct {
	Version int `json:"version"`
	// Process is the container's first, by its number in the guest.
	Process  uint32 `json:"process"`
	Terminal bool   `json:"terminal,omitempty"`
	// Paused says that it was paused before, and is to be so again.
	Paused bool `json:"paused,omitempty"`
	// Root is the digest of the image its root is on.
	Root       string `json:"root"`
	MemoryMiB  int    `json:"memoryMiB"`
	Processors int    `json:"processors"`
	// Caller is the request's Note.
	Caller json.RawMessage `json:"caller,omitempty"`
}
