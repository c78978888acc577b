// Package ext stands for the module of the same path, which Traefik replaces by a
// directory that the module proxy does not serve: what its makers add to a
// configuration, which is nothing here.
package ext

// HTTP is added to what HTTP is told.
type HTTP struct{}

// Router is added to what a router is told.
type Router struct{}
