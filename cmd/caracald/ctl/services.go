package ctl

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/maps"
)

func newServicesCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "services",
		Aliases: []string{"service", "svc"},
		Short:   "List the Services' addresses that this node's proxy translates",
		Long: `services lists caracal_service: the addresses and ports of Kubernetes's Services, which this node's kube-proxy translates to those of
pods. What a pod sends there is not judged by that address, but behind the translation, by whom it goes to.

ADDRESS "host" stands for each of this host's own addresses: node ports, and host ports of its pods, which are listed by their pod.
SERVICE "others" says that not all are listed: there are too many, or one can't be read, which caracalctl node status names.`,
		Example: `  caracalctl services
  caracalctl services -o json | jq '.[] | select(.port == 53)'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := g.maps()
			if err != nil {
				return err
			}
			defer m.Close()
			all, err := m.Services()
			if errors.Is(err, maps.ErrNotLoaded) {
				return fmt.Errorf("%w: the programs are of a build that knows no Services; run caracalctl upgrade", err)
			}
			if err != nil {
				return err
			}
			t := newTable("ADDRESS", "PORT", "PROTOCOL", "SERVICE")
			for _, s := range all {
				address := "host"
				if s.Address.IsValid() {
					address = s.Address.String()
				}
				t.add(address, s.Port, s.Protocol, s.Name)
			}
			if all == nil {
				all = []maps.Service{}
			}
			return g.print(cmd, all, t)
		},
	}
}
