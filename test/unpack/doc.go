// Package unpack compares the trees that image makes with those that an
// independent tool, umoci, unpacks of the same images: ordinary ones, and nasty
// ones made for it.
//
// It holds tests only.
package unpack
