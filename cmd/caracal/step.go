//go:build !faults

package main

// step does nothing: faults are injected only into binaries built for it.
var step func(string) error
