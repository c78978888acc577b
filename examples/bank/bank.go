// Package bank is a small payments company in plain Go programs and standard
// protocols: web (HTTP) asks transfer (gRPC), which asks risk (Dubbo), books
// with ledger (SOFARPC bolt) and has vault (HTTP) sign a receipt. assistant
// stands for an agent that runs code nobody has read.
//
// None of it knows of Hauberk. bank.json says how its images are built,
// bank.yaml how they run.
package bank
