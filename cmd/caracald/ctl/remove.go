package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// removePod takes away all that a record names, and the record, as a runtime's DEL does.
func (g *globals) removePod(ctx context.Context, e node.Endpoint) error {
	config, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": e.Network, "type": "caracal", "log_level": "error",
		"state_dir": g.stateDir, "bpffs_dir": g.bpffsDir, "boot_id_file": g.bootIDFile,
	})
	if err != nil {
		return err
	}
	env := map[string]string{"CNI_COMMAND": "DEL", "CNI_CONTAINERID": e.ContainerID, "CNI_IFNAME": e.IfName}
	var stdout bytes.Buffer
	p := &cni.Plugin{
		Getenv: func(name string) string { return env[name] },
		Stdin:  bytes.NewReader(config), Stdout: &stdout, Stderr: io.Discard,
	}
	if p.Main(ctx) == 0 {
		return nil
	}
	var failed cni.Error
	if err := json.Unmarshal(stdout.Bytes(), &failed); err != nil {
		return fmt.Errorf("remove pod %s: %s", recorded(e).title(), bytes.TrimSpace(stdout.Bytes()))
	}
	return fmt.Errorf("remove pod %s: %w", recorded(e).title(), &failed)
}

// foreignIPAM says what removing a pod leaves to do, "" when nothing.
func foreignIPAM(e node.Endpoint) string {
	if e.IPAM == "" || e.IPAM == ipam.Name {
		return ""
	}
	return fmt.Sprintf("IPAM plugin %s still holds the addresses of %s", e.IPAM, e.Key)
}

// errOtherBoot keeps writing commands from taking another boot's records for this one's.
var errOtherBoot = errors.New("node.db was written in another boot")

// sameBoot refuses to write to a database of another boot: opening it for writing releases all that it records.
func (g *globals) sameBoot(tx *node.Tx) error {
	other, err := g.otherBoot(tx)
	if err != nil || !other {
		return err
	}
	if g.pinned() {
		return fmt.Errorf("%w, but programs are pinned in %s, which do not outlive one: a simulated node needs --boot-id-file", errOtherBoot, g.bpffsDir)
	}
	return fmt.Errorf("%w: nothing that it records lives, and the next ADD releases all of it", errOtherBoot)
}
