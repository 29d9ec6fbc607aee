package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/node"
)

// upgraded is what upgrade did.
type upgraded struct {
	Changed    bool   `json:"changed"`
	From       string `json:"from"`
	To         string `json:"to"`
	Interfaces int    `json:"interfaces"`
}

func newUpgradeCommand(g *globals) *cobra.Command {
	o := &upgradeOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Put this program's eBPF programs onto a running node",
		Long: `upgrade replaces the loaded eBPF programs by those in this program, on the existing maps: flows go on and no packet
meets an interface without a program. Maps of another schema are refused and nothing is changed.`,
		Example: `  caracalctl version
  caracalctl upgrade`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	cmd.Flags().BoolVar(&o.force, "force", false, "also when the same build is loaded")
	return cmd
}

type upgradeOptions struct {
	*globals
	force bool
}

func (o *upgradeOptions) run(cmd *cobra.Command) error {
	u, err := o.upgrade(cmd.Context())
	if err != nil {
		return err
	}
	t := newTable("FROM", "TO", "INTERFACES", "RESULT")
	result := "replaced"
	if !u.Changed {
		result = "nothing to do: this build is loaded already"
	}
	t.add(u.From, u.To, u.Interfaces, result)
	return o.print(cmd, u, t)
}

func (o *upgradeOptions) upgrade(ctx context.Context) (upgraded, error) {
	m, err := o.maps()
	if err != nil {
		return upgraded{}, err
	}
	defer m.Close()
	lock, err := o.lock(ctx)
	if err != nil {
		return upgraded{}, err
	}
	defer lock.Unlock()
	s, err := m.State()
	if err != nil {
		return upgraded{}, err
	}
	u := upgraded{From: s.Build, To: build()}
	pods, err := m.Pods()
	if err != nil {
		return upgraded{}, err
	}
	u.Interfaces = len(pods)
	if u.From == u.To && !o.force {
		return u, nil
	}
	if err := loader.Upgrade(loader.Config{Dir: o.bpffsDir}); err != nil {
		return upgraded{}, o.explainBPF(err)
	}
	u.Changed = true
	return u, nil
}

// lock takes the node lock, which whoever writes kernel maps holds.
func (g *globals) lock(ctx context.Context) (*node.Lock, error) {
	if _, err := os.Stat(g.stateDir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("take the node lock: there is no %s; is --state-dir another one?", g.stateDir)
	}
	lock, err := node.LockNode(ctx, g.stateDir)
	if err != nil {
		return nil, g.explainDB(fmt.Errorf("take the node lock: %w", err))
	}
	return lock, nil
}
