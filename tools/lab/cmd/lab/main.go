// Command lab builds simulated hosts on one machine and runs pods on them through real CNI invocations.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Simulated hosts on one machine, with pods made by real CNI invocations",
		Example: `  lab up --hosts 2 --static-routes
  lab pod add h1 web
  lab pod add h2 client --label app=client
  lab exec h2/client -- ping -c 1 10.244.0.0
  lab status
  lab down`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.AddCommand(newUpCommand(), newPodCommand(), newExecCommand(), newStatusCommand(), newDownCommand())
	return cmd
}

// nameFlag adds the flag that says which lab is meant.
func nameFlag(cmd *cobra.Command, name *string) {
	cmd.Flags().StringVar(name, "name", "lab", "name of the lab")
}
