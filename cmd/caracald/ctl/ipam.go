package ctl

import "github.com/spf13/cobra"

func newIPAMCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ipam",
		Short: "Show, check and release addresses",
		Example: `  caracalctl ipam show --blocks
  caracalctl ipam check
  caracalctl ipam release 10.244.0.7`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newIPAMShowCommand(g),
		newIPAMBlocksCommand(g), newIPAMCheckCommand(g), newIPAMReleaseCommand(g))
	return cmd
}
