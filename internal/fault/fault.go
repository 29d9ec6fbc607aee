//go:build !faults

// Package fault fails a program at a step of its work, for tests: only in binaries that are built for it (-tags faults).
package fault

// Step is to be called before a step of that name; nil: nothing ever fails.
var Step func(name string) error
