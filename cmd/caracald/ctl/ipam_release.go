package ctl

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// released is what ipam release took back from one attachment.
type released struct {
	Network     string       `json:"network"`
	ContainerID string       `json:"containerID"`
	IfName      string       `json:"ifName"`
	Addresses   []netip.Addr `json:"addresses"`
	Pod         string       `json:"pod,omitempty"` // whose interface went with them
}

type ipamReleaseOptions struct {
	*globals
	containerID, cache string
	force              bool
}

func newIPAMReleaseCommand(g *globals) *cobra.Command {
	o := &ipamReleaseOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "release {ADDRESS | --container-id ID}",
		Short: "Take back an address, with all else that its attachment left",
		Long: `release takes back what one attachment holds: all its addresses, and for a pod of Caracal's its interface, map entries
and record too, so that no two pods ever have one address. It refuses where the container lives, or where nothing
tells that it is gone, unless --force is given: a living pod then loses its network.`,
		Example: `  caracalctl ipam check
  caracalctl ipam release 10.244.0.7
  caracalctl ipam release --container-id 4f1c0a9e77d2`,
		Args: atMostOneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (o.containerID != "") {
				return usagef("release wants an address or --container-id, one of them; see %s --help", cmd.CommandPath())
			}
			return o.run(cmd, args)
		},
	}
	cmd.Flags().StringVar(&o.containerID, "container-id", "", "release what the container of this `ID` holds, in all networks")
	cmd.Flags().BoolVar(&o.force, "force", false, "also when the container may be living")
	cacheFlag(cmd, &o.cache)
	return cmd
}

func (o *ipamReleaseOptions) run(cmd *cobra.Command, args []string) error {
	var find func(*node.Tx) ([]node.Key, error)
	if len(args) == 0 {
		find = o.ofContainer
	} else {
		a, err := netip.ParseAddr(args[0])
		if err != nil {
			return usagef("%q is not an address", args[0])
		}
		find = func(tx *node.Tx) ([]node.Key, error) { return holderOf(tx, a.Unmap()) }
	}
	type victim struct {
		key      node.Key
		endpoint *node.Endpoint
	}
	var victims []victim
	err := o.view(cmd.Context(), func(tx *node.Tx) error {
		if err := o.sameBoot(tx); err != nil {
			return err
		}
		keys, err := find(tx)
		if err != nil {
			return err
		}
		for _, k := range keys {
			e, err := tx.Endpoint(k)
			v := victim{key: k}
			switch {
			case err == nil:
				v.endpoint = &e
			case !errors.Is(err, node.ErrNotFound):
				return err
			}
			if err := o.mayRelease(k, v.endpoint); err != nil {
				return err
			}
			victims = append(victims, v)
		}
		return nil
	})
	if err != nil {
		return err
	}
	all := []released{}
	t := newTable("ADDRESSES", "NETWORK", "CONTAINER", "INTERFACE", "POD")
	var errs []error
	for _, v := range victims {
		r, err := o.release(cmd.Context(), v.key, v.endpoint)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, r)
		t.add(join(r.Addresses), r.Network, short(r.ContainerID), r.IfName, r.Pod)
		if v.endpoint != nil && foreignIPAM(*v.endpoint) != "" {
			warn(cmd, "%s", foreignIPAM(*v.endpoint))
		}
	}
	return errors.Join(append(errs, o.print(cmd, all, t))...)
}

func holderOf(tx *node.Tx, a netip.Addr) ([]node.Key, error) {
	k, err := tx.Owner(a)
	if errors.Is(err, node.ErrNotFound) {
		return nil, fmt.Errorf("%s: no attachment of this node holds it", a)
	}
	return []node.Key{k}, err
}

// ofContainer lists the attachments of a container that hold addresses or are recorded.
func (o *ipamReleaseOptions) ofContainer(tx *node.Tx) ([]node.Key, error) {
	var keys []node.Key
	seen := make(map[node.Key]bool)
	note := func(k node.Key) {
		if k.ContainerID == o.containerID && !seen[k] {
			seen[k] = true
			keys = append(keys, k)
		}
	}
	err := tx.Holdings(func(k node.Key, _ []node.Holding) error {
		note(k)
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = tx.Endpoints(func(e node.Endpoint) error {
		note(e.Key)
		return nil
	})
	if err == nil && len(keys) == 0 {
		err = fmt.Errorf("container %q holds no address of this node; the id must be complete", o.containerID)
	}
	return keys, err
}

// mayRelease refuses where a container lives, or may.
func (o *ipamReleaseOptions) mayRelease(k node.Key, e *node.Endpoint) error {
	switch {
	case o.force:
		return nil
	case e != nil && dead(*e) == "":
		return fmt.Errorf("pod %s lives in %s: remove it with its runtime, or take its network away with --force", recorded(*e).title(), e.Netns)
	case e == nil && cached(o.cache, k):
		return fmt.Errorf("%s: its runtime still lists it in %s: remove it there, or release its addresses with --force", k, filepath.Join(o.cache, "results"))
	case e == nil:
		return fmt.Errorf("%s: another main plugin made it, and nothing here tells whether it lives: when it does not, release its addresses with --force", k)
	}
	return nil
}

func (o *ipamReleaseOptions) release(ctx context.Context, k node.Key, e *node.Endpoint) (released, error) {
	r := released{Network: k.Network, ContainerID: k.ContainerID, IfName: k.IfName, Addresses: []netip.Addr{}}
	if e != nil {
		r.Pod, r.Addresses = recorded(*e).title(), e.Addrs
		return r, o.removePod(ctx, *e)
	}
	db, err := node.Open(ctx, o.stateDir, o.options())
	if err != nil {
		return r, o.explainDB(err)
	}
	defer db.Close()
	err = db.Update(func(tx *node.Tx) error {
		addrs, err := ipam.Release(tx, k)
		r.Addresses = append(r.Addresses, addrs...)
		return err
	})
	return r, o.explainDB(err)
}
