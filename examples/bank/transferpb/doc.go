// Package transferpb is the protocol of the transfer service.
package transferpb

//go:generate protoc -I .. --go_out=.. --go_opt=paths=source_relative --go-grpc_out=.. --go-grpc_opt=paths=source_relative transferpb/transfer.proto
