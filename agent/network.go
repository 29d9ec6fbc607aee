package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/caracal-net/caracal/internal/atomicfile"
)

// DeferredNetwork is the name, in the state directory, of a network that runtimes are to have once pods can be added. Who installs
// leaves it there, and an agent puts it in place (Config.Network).
const DeferredNetwork = "network.conflist"

// placeNetwork puts the deferred network in place, if one was left: a node whose runtime has a network is one that pods are sent
// to. own are this node's blocks, as ADD finds them. What runtimes have already stays until there is another.
func (a *Agent) placeNetwork(own int) error {
	if a.Network == "" || a.networkPlaced || own == 0 {
		return nil
	}
	text, err := os.ReadFile(filepath.Join(a.StateDir, DeferredNetwork))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody may yet install
	}
	if err != nil {
		return fmt.Errorf("read the network that runtimes are to have: %w", err)
	}
	if there, err := os.ReadFile(a.Network); err == nil && bytes.Equal(there, text) {
		a.networkPlaced = true
		return nil
	}
	dir, name := filepath.Split(a.Network)
	d, err := atomicfile.Open(dir)
	if err != nil {
		return fmt.Errorf("put the network in place: %w", err)
	}
	f, err := d.Write(name, 0o600, bytes.NewReader(text))
	if err == nil {
		err = f.Commit()
	}
	if err = errors.Join(err, d.Close()); err != nil {
		return fmt.Errorf("put the network in place: %w", err)
	}
	a.networkPlaced = true
	a.Log.Info("runtimes have the network: pods can be added", "file", a.Network)
	return nil
}
