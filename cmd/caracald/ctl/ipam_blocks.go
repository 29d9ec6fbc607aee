package ctl

import (
	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/store"
)

func newIPAMBlocksCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "blocks",
		Short: "Show which node has which block",
		Long: `blocks lists the claims in the store that the nodes share. A node that is gone for good gives its blocks back when it is
deleted (caracalctl delete node NAME).`,
		Example: "  caracalctl ipam blocks\n  caracalctl ipam blocks -o json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.withStore(cmd.Context(), func(s store.Store) error {
				claims, err := agent.Blocks(cmd.Context(), s)
				if err != nil {
					return err
				}
				t := newTable("BLOCK", "POOL", "NODE")
				for _, c := range claims {
					t.add(c.CIDR, c.Pool, c.Node)
				}
				return g.print(cmd, claims, t)
			})
		},
	}
}
