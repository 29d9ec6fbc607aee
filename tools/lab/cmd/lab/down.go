package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/lab"
)

type downOptions struct {
	lab string
	all bool
}

func newDownCommand() *cobra.Command {
	var o downOptions
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Take a lab down and leave nothing of it",
		Long: `Take a lab down: end the processes in its namespaces, remove namespaces, links, pins, mounts and files.
It may be repeated, and finishes what an interrupted up or down left. No lab of that name is not an error.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			names := []string{o.lab}
			if o.all {
				var err error
				if names, err = lab.Names(); err != nil {
					return err
				}
			}
			var errs []error
			for _, n := range names {
				err := lab.Down(cmd.Context(), n)
				switch {
				case errors.Is(err, lab.ErrNotFound):
					fmt.Fprintf(cmd.ErrOrStderr(), "lab %s is not there\n", n)
				case err != nil:
					errs = append(errs, err)
				default:
					fmt.Fprintf(cmd.OutOrStdout(), "lab %s is down\n", n)
				}
			}
			return errors.Join(errs...)
		},
	}
	nameFlag(cmd, &o.lab)
	cmd.Flags().BoolVar(&o.all, "all", false, "all labs of this machine")
	cmd.MarkFlagsMutuallyExclusive("name", "all")
	return cmd
}
