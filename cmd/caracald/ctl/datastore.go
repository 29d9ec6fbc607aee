package ctl

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/store"
)

func newDatastoreCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "datastore",
		Short: "Export, import and move what the nodes share",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newExportCommand(g), newImportCommand(g), newMigrateCommand(g))
	return cmd
}

func newExportCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "export",
		Short:   "Write everything in the store to stdout, as it is at one moment",
		Example: "  caracalctl datastore export > backup.jsonl",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.withStore(cmd.Context(), func(s store.Store) error {
				n, err := store.Export(cmd.Context(), s, cmd.OutOrStdout())
				if err == nil {
					fmt.Fprintf(cmd.ErrOrStderr(), "%d keys\n", n)
				}
				return err
			})
		},
	}
}

func newImportCommand(g *globals) *cobra.Command {
	var o store.WriteOptions
	cmd := &cobra.Command{
		Use:   "import",
		Short: "Read from stdin what export wrote",
		Long: `import reads all of an export before it writes anything. What is there already with another value is an error, unless it
is to be overwritten.`,
		Example: "  caracalctl datastore import < backup.jsonl",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.withStore(cmd.Context(), func(s store.Store) error {
				n, err := store.Import(cmd.Context(), s, cmd.InOrStdin(), o)
				if err == nil {
					fmt.Fprintf(cmd.OutOrStdout(), "%d keys written\n", n)
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&o.Overwrite, "overwrite", false, "write over what is there")
	return cmd
}

func newMigrateCommand(g *globals) *cobra.Command {
	var o store.WriteOptions
	var to string
	cmd := &cobra.Command{
		Use:   "migrate --to FILE",
		Short: "Copy everything to the store that another file names",
		Long: `migrate copies everything from this store to another; run again it finishes what was interrupted. Stop the nodes' agents
meanwhile: pods go on. What they then claim goes to the store that they are started with.`,
		Example: "  caracalctl -c old.cfg datastore migrate --to new.cfg",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				return usagef("say where to (--to FILE, shaped like calicoctl.cfg)")
			}
			return g.withStore(cmd.Context(), func(from store.Store) error {
				dest, err := OpenStore(cmd.Context(), to, g.stateDir)
				if err != nil {
					return err
				}
				n, err := store.Copy(cmd.Context(), from, dest, "", o)
				if err == nil {
					fmt.Fprintf(cmd.OutOrStdout(), "%d keys written\n", n)
				}
				return errors.Join(err, dest.Close())
			})
		},
	}
	cmd.Flags().BoolVar(&o.Overwrite, "overwrite", false, "write over what is there")
	cmd.Flags().StringVar(&to, "to", "", "`FILE` that says where the other store is")
	return cmd
}
