// Package grpc holds no code: its module names gRPC's own interop client and
// server, and their version.
package grpc
