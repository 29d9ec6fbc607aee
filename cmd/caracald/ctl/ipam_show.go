package ctl

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/node"
)

// usage is how full a pool's claimed blocks, or one block, are.
type usage struct {
	CIDR      netip.Prefix  `json:"cidr"`
	Pool      *netip.Prefix `json:"pool,omitempty"`   // of a block
	Blocks    int           `json:"blocks,omitempty"` // of a pool
	Addresses int           `json:"addresses"`
	Used      int           `json:"used"`
	Free      int           `json:"free"`
}

// usages is what ipam show shows.
type usages struct {
	Pools  []usage `json:"pools"`
	Blocks []usage `json:"blocks,omitempty"`
}

// holder is who holds one address.
type holder struct {
	Address     netip.Addr   `json:"address"`
	Block       netip.Prefix `json:"block"`
	Network     string       `json:"network"`
	ContainerID string       `json:"containerID"`
	IfName      string       `json:"ifName"`
	Pod         string       `json:"pod,omitempty"`
}

type ipamShowOptions struct {
	*globals
	blocks bool
}

func newIPAMShowCommand(g *globals) *cobra.Command {
	o := &ipamShowOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "show [ADDRESS]",
		Short: "Show how full this node's blocks are, or who holds an address",
		Long: `show counts the addresses of the blocks that this node has claimed, by pool. FREE includes reserved addresses.

With ADDRESS it shows which attachment holds it.`,
		Example: `  caracalctl ipam show
  caracalctl ipam show --blocks
  caracalctl ipam show 10.244.0.7`,
		Args: atMostOneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return o.holder(cmd, args[0])
			}
			return o.run(cmd)
		},
	}
	cmd.Flags().BoolVar(&o.blocks, "blocks", false, "also each block")
	cmd.Flags().BoolVar(&o.blocks, "show-blocks", false, "the same, as calicoctl calls it")
	return cmd
}

func (o *ipamShowOptions) run(cmd *cobra.Command) error {
	var blocks []node.Block
	err := o.view(cmd.Context(), func(tx *node.Tx) (err error) {
		blocks, err = tx.Blocks()
		return err
	})
	if err != nil {
		return err
	}
	u := usages{Pools: []usage{}}
	for _, b := range blocks {
		i := slices.IndexFunc(u.Pools, func(p usage) bool { return p.CIDR == b.Pool })
		if i < 0 {
			i = len(u.Pools)
			u.Pools = append(u.Pools, usage{CIDR: b.Pool})
		}
		p := &u.Pools[i]
		p.Blocks++
		p.Addresses += b.Size()
		p.Used += b.Used
		p.Free += b.Size() - b.Used
		if o.blocks {
			u.Blocks = append(u.Blocks, usage{CIDR: b.CIDR, Pool: &b.Pool, Addresses: b.Size(), Used: b.Used, Free: b.Size() - b.Used})
		}
	}
	t := newTable("GROUPING", "CIDR", "BLOCKS", "ADDRESSES", "USED", "FREE")
	for _, p := range u.Pools {
		t.add("pool", p.CIDR, p.Blocks, p.Addresses, p.Used, p.Free)
		for _, b := range u.Blocks {
			if *b.Pool == p.CIDR {
				t.add("block", b.CIDR, "", b.Addresses, b.Used, b.Free)
			}
		}
	}
	return o.print(cmd, u, t)
}

func (o *ipamShowOptions) holder(cmd *cobra.Command, arg string) error {
	a, err := netip.ParseAddr(arg)
	if err != nil {
		return usagef("%q is not an address", arg)
	}
	h := holder{Address: a.Unmap()}
	err = o.view(cmd.Context(), func(tx *node.Tx) error {
		k, err := tx.Owner(h.Address)
		if errors.Is(err, node.ErrNotFound) {
			return fmt.Errorf("%s: no attachment of this node holds it", h.Address)
		}
		if err != nil {
			return err
		}
		h.Network, h.ContainerID, h.IfName = k.Network, k.ContainerID, k.IfName
		held, err := tx.Held(k)
		for _, one := range held {
			if one.Addr == h.Address {
				h.Block = one.Block
			}
		}
		if e, err := tx.Endpoint(k); err == nil {
			h.Pod = recorded(e).title()
		}
		return err
	})
	if err != nil {
		return err
	}
	t := newTable("ADDRESS", "BLOCK", "NETWORK", "CONTAINER", "INTERFACE", "POD")
	t.add(h.Address, h.Block, h.Network, short(h.ContainerID), h.IfName, h.Pod)
	return o.print(cmd, h, t)
}
