package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// RaiseEpoch adds one to the epoch in the state map pinned in a caracal node's directory, as any change of pods,
// routes or policy does. It is nil in a build without the maps package.
var RaiseEpoch func(dir string) error

// ErrNoEpoch says that the epoch of a datapath cannot be raised.
var ErrNoEpoch = errors.New("cannot raise the epoch")

// CanRaise tells whether RaiseEpoch can work on the node; the error is ErrNoEpoch.
func (n *Node) CanRaise() error {
	if RaiseEpoch == nil {
		return fmt.Errorf("%w: this build has no access to caracal's maps; use --during with a command", ErrNoEpoch)
	}
	if pin := filepath.Join(n.BPFDir(), "state"); !exists(pin) {
		return fmt.Errorf("%w: datapath %s has no map pinned at %s", ErrNoEpoch, n.Spec.Name, pin)
	}
	return nil
}

// UsesCaracal tells whether the node's pods are wired by the caracal plugin.
func (n *Node) UsesCaracal() bool { return n.Spec.usesCaracal() }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
