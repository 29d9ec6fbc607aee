package main

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/lab"
)

func newExecCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "exec HOST[/POD] -- CMD...",
		Short: "Run a command on a host or in a pod",
		Long: `Run a command in the network namespace of a host ("h1"), of a pod ("h1/web"), or in "outside" or "switch".
On a host CARACAL_STATE_DIR and CARACAL_BPFFS_DIR are set, and our tools are first in the PATH. Mounts, also /sys,
stay as they are. The command takes the place of lab: its exit status is its own.`,
		Example: "  lab exec h1 -- caracalctl pods\n  lab exec h1/web -- ip route",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			place, command := args[0], args[1:]
			if command[0] == "--" {
				command = command[1:]
			}
			if len(command) == 0 {
				return errors.New("exec: no command given")
			}
			ns, err := findNamespace(name, place)
			if err != nil {
				return err
			}
			return ns.Replace(command)
		},
	}
	nameFlag(cmd, &name)
	cmd.Flags().SetInterspersed(false) // flags behind HOST are CMD's
	return cmd
}

func findNamespace(labName, place string) (lab.Namespace, error) {
	l, err := lab.Open(labName)
	if err != nil {
		return lab.Namespace{}, err
	}
	switch place {
	case "outside":
		return l.Outside(), nil
	case "switch":
		return l.Switch(), nil
	}
	host, pod, inPod := strings.Cut(place, "/")
	h, err := l.HostByName(host)
	if err != nil || !inPod {
		if err != nil {
			return lab.Namespace{}, err
		}
		return h.Namespace(), nil
	}
	p, err := h.Pod(pod)
	if err != nil {
		return lab.Namespace{}, err
	}
	return p.Namespace(), nil
}
