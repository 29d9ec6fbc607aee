// Package ctl is caracalctl, what an operator reads and repairs a node with: one file per command.
package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/cni"
)

// Exit codes.
const (
	ExitOK    = 0
	ExitError = 1 // it did not work, or what was checked is not right
	ExitUsage = 2 // the command line is wrong
)

// Run runs caracalctl with the arguments that follow its name and returns its exit code.
func Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ExitOK
	}
	var usage usageError
	switch {
	case errors.Is(err, errFound):
		return ExitError // what was found is on stdout already
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "caracalctl: %v\n", err)
		return ExitUsage
	}
	fmt.Fprintf(stderr, "caracalctl: %v\n", err)
	return ExitError
}

// errFound ends a check that printed what is wrong.
var errFound = errors.New("something is wrong")

// usageError is a mistake in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// globals are the flags of every command.
type globals struct {
	stateDir, bpffsDir, bootIDFile string
	config, socket                 string
	kubeconfig, context            string
	output                         format
}

func newRootCommand() *cobra.Command {
	g := &globals{output: formatTable}
	cmd := &cobra.Command{
		Use:   "caracalctl",
		Short: "Read and repair a Caracal node",
		Long: `caracalctl reads and repairs a Caracal node: its pods, routes, flows, counters and addresses.

Reading commands change nothing. Exit code 0: done; 1: an error, or a check found something; 2: wrong usage.`,
		Example: `  caracalctl pods
  caracalctl flows --pod default/web -o json
  caracalctl counters --drops
  caracalctl why default/web default/db:5432
  caracalctl ipam check
  caracalctl validate < /etc/cni/net.d/10-caracal.conflist`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
		PersistentPreRunE: func(*cobra.Command, []string) error { return g.complete() },
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w; see %s --help", err, cmd.CommandPath())
	})
	f := cmd.PersistentFlags()
	f.StringVar(&g.stateDir, "state-dir", FromEnv("CARACAL_STATE_DIR", cni.DefaultStateDir), "`DIR` that holds node.db (env CARACAL_STATE_DIR)")
	f.StringVar(&g.bpffsDir, "bpffs-dir", FromEnv("CARACAL_BPFFS_DIR", cni.DefaultBPFFSDir), "`DIR` that holds the pinned maps and programs (env CARACAL_BPFFS_DIR)")
	f.StringVar(&g.bootIDFile, "boot-id-file", os.Getenv("CARACAL_BOOT_ID_FILE"), "`FILE` with the boot id of a simulated node (env CARACAL_BOOT_ID_FILE)")
	f.StringVarP(&g.config, "config", "c", os.Getenv("CARACAL_CONFIG"), "`FILE` that says where resources are stored, shaped like calicoctl.cfg (env CARACAL_CONFIG); none: "+DefaultConfigFile+" or /etc/calico/calicoctl.cfg if there is one, else this machine alone")
	f.StringVar(&g.kubeconfig, "kubeconfig", "", "`FILE` that says where a cluster's Kubernetes API is, which the store is then (else KUBECONFIG, where nothing says another store)")
	f.StringVar(&g.context, "context", "", "`NAME` of the kubeconfig's context; none: its current one")
	f.StringVar(&g.socket, "socket", FromEnv("CARACAL_SOCKET", cni.DefaultSocket), "the agent's `SOCKET` (env CARACAL_SOCKET)")
	f.VarP(&g.output, "output", "o", "table, json or yaml")
	complete(cmd, "output", formats...)
	cmd.AddCommand(
		newPodsCommand(g),
		newRoutesCommand(g),
		newServicesCommand(g),
		newFlowsCommand(g),
		newCountersCommand(g),
		newWhyCommand(g),
		newPolicyCommand(g),
		newRulesCommand(g),
		newWhatIfCommand(g),
		newIPAMCommand(g),
		newNodeCommand(g),
		newBGPCommand(g),
		newDatastoreCommand(g),
		newApplyCommand(g),
		newGetCommand(g),
		newDeleteCommand(g),
		newImportCalicoCommand(g),
		newAdoptCommand(g),
		newDoctorCommand(g),
		newValidateCommand(g),
		newVersionCommand(g),
		newInstallCommand(g),
		newHealthCommand(g),
		newUpgradeCommand(g),
		newUninstallCommand(g),
	)
	return cmd
}

func (g *globals) complete() error {
	for _, f := range []struct {
		name string
		dir  *string
	}{{"state-dir", &g.stateDir}, {"bpffs-dir", &g.bpffsDir}} {
		if *f.dir == "" {
			return usagef("--%s: empty", f.name)
		}
		abs, err := filepath.Abs(*f.dir)
		if err != nil {
			return fmt.Errorf("--%s: %w", f.name, err)
		}
		*f.dir = abs
	}
	return nil
}

// FromEnv is an environment variable, or something else where it is not set.
func FromEnv(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// complete offers words for a flag in the shell.
func complete(cmd *cobra.Command, flag string, words ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)) // the flag exists
}

func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case cmd.HasSubCommands():
		return usagef("unknown command %q; see %s --help", args[0], cmd.CommandPath())
	}
	return usagef("%s takes no arguments, not %q", cmd.CommandPath(), args[0])
}

func atMostOneArg(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usagef("%s takes at most one argument, not %d; see --help", cmd.CommandPath(), len(args))
	}
	return nil
}
