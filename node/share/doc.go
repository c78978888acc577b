// Package share holds containers that share a node's own kernel, such as runc's,
// to policies of the Guard: the same programs, fed by the same compiler, for the
// tasks of bound cgroups only.
//
// It protects the node from nobody who is root there: in a shared kernel the
// host's root owns the Guard. It starts no container; a hook of the runtime binds
// one before its first process runs, and a hook that fails keeps it from
// starting.
package share
