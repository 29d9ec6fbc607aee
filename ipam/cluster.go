package ipam

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// poolsSetting holds the cluster's pools, as JSON. While it is there blocks are claimed for this node by its agent, in the
// store that the nodes share, and addresses come out of claimed blocks only.
const poolsSetting = "cluster/pools"

// namesSetting holds the names of these pools, as JSON.
const namesSetting = "cluster/poolnames"

// namespaceSetting, with a namespace's name behind it, holds which pools Kubernetes's pods of that namespace get their addresses
// from, as JSON. There is none of a namespace that does not say.
const namespaceSetting = "cluster/namespacepools/"

// Names are what people call pools.
type Names map[string]netip.Prefix

// Only are pools that addresses are to come from, by name or CIDR; of a family of which none is named, from any.
type Only struct {
	V4 []string `json:"ipv4pools,omitempty"`
	V6 []string `json:"ipv6pools,omitempty"`
}

// Empty tells whether no pool is named.
func (o Only) Empty() bool { return len(o.V4)+len(o.V6) == 0 }

// Or fills in what another names of a family of which o names none.
func (o Only) Or(other Only) Only {
	if len(o.V4) == 0 {
		o.V4 = other.V4
	}
	if len(o.V6) == 0 {
		o.V6 = other.V6
	}
	return o
}

// HostNetwork is the network of what the host itself holds. No CNI network can have such a name.
const HostNetwork = "caracal:host"

// TunnelKey holds the host's own addresses in the VXLAN tunnel.
var TunnelKey = node.Key{Network: HostNetwork, ContainerID: "tunnel", IfName: "vxlan"}

// SetClusterPools records the pools of the cluster that this node is part of; nil: it is part of none.
func SetClusterPools(tx *node.Tx, pools []api.IPPool) error {
	if pools == nil {
		return tx.PutSetting(poolsSetting, "")
	}
	text, err := json.Marshal(pools)
	if err != nil {
		return err
	}
	return putChanged(tx, poolsSetting, string(text))
}

// ClusterPools are the pools of the cluster; false when this node is part of none.
func ClusterPools(tx *node.Tx) ([]api.IPPool, bool, error) {
	text := tx.Setting(poolsSetting)
	if text == "" {
		return nil, false, nil
	}
	pools := []api.IPPool{}
	if err := json.Unmarshal([]byte(text), &pools); err != nil {
		return nil, false, fmt.Errorf("setting %s: %w", poolsSetting, err)
	}
	return pools, true, nil
}

// SetPoolNames records what the cluster's pools are called.
func SetPoolNames(tx *node.Tx, names Names) error {
	if len(names) == 0 {
		return putChanged(tx, namesSetting, "")
	}
	text, err := json.Marshal(names)
	if err != nil {
		return err
	}
	return putChanged(tx, namesSetting, string(text))
}

// PoolNames are what the cluster's pools are called.
func PoolNames(tx *node.Tx) (Names, error) {
	names := make(Names)
	text := tx.Setting(namesSetting)
	if text == "" {
		return names, nil
	}
	if err := json.Unmarshal([]byte(text), &names); err != nil {
		return nil, fmt.Errorf("setting %s: %w", namesSetting, err)
	}
	return names, nil
}

// SetNamespacePools records from which pools the pods of Kubernetes's namespaces get their addresses, and forgets what was
// recorded of others.
func SetNamespacePools(tx *node.Tx, namespaces map[string]Only) error {
	var old []string
	err := tx.Settings(namespaceSetting, func(name, _ string) error {
		old = append(old, name)
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range old {
		if _, still := namespaces[strings.TrimPrefix(name, namespaceSetting)]; !still {
			if err := tx.PutSetting(name, ""); err != nil {
				return err
			}
		}
	}
	for namespace, only := range namespaces {
		text, err := json.Marshal(only)
		if err != nil {
			return err
		}
		if err := putChanged(tx, namespaceSetting+namespace, string(text)); err != nil {
			return err
		}
	}
	return nil
}

// AllNamespacePools is what SetNamespacePools recorded.
func AllNamespacePools(tx *node.Tx) (map[string]Only, error) {
	all := make(map[string]Only)
	err := tx.Settings(namespaceSetting, func(name, text string) error {
		var only Only
		if err := json.Unmarshal([]byte(text), &only); err != nil {
			return fmt.Errorf("setting %s: %w", name, err)
		}
		all[strings.TrimPrefix(name, namespaceSetting)] = only
		return nil
	})
	return all, err
}

// NamespacePools are the pools from which the pods of one of Kubernetes's namespaces get their addresses.
func NamespacePools(tx *node.Tx, namespace string) (only Only, err error) {
	text := tx.Setting(namespaceSetting + namespace)
	if text == "" {
		return Only{}, nil
	}
	if err := json.Unmarshal([]byte(text), &only); err != nil {
		return Only{}, fmt.Errorf("setting %s%s: %w", namespaceSetting, namespace, err)
	}
	return only, nil
}

func putChanged(tx *node.Tx, name, value string) error {
	if tx.Setting(name) == value {
		return nil
	}
	return tx.PutSetting(name, value)
}

// Pools are the pools that an attachment gets its addresses from: the configured ones, or in a cluster the cluster's, less
// those that the configuration does not name if it names any. claimed: out of claimed blocks only.
func Pools(tx *node.Tx, cfg Config) (pools []api.IPPool, claimed bool, err error) {
	if pools, err = cfg.pools(); err != nil {
		return nil, false, err
	}
	cluster, claimed, err := ClusterPools(tx)
	if err == nil && !claimed && cfg.Cluster {
		err = ErrNoCluster
	}
	if err != nil {
		return nil, false, err
	}
	if !claimed {
		pools, err = cfg.Only.of(pools, pools, nil)
		return pools, false, err
	}
	names, err := PoolNames(tx)
	if err != nil {
		return nil, false, err
	}
	if len(cfg.Pools) == 0 {
		pools, err = cfg.Only.of(cluster, cluster, names)
		return pools, true, err
	}
	var named []api.IPPool
	for _, p := range pools {
		c, ok := within(cluster, p.CIDR.Addr())
		if !ok || c.CIDR != p.CIDR {
			return nil, false, fmt.Errorf("%w: %s is none of the cluster's; they are %s (caracalctl get ippools)", ErrPool, p.CIDR, list(cluster))
		}
		named = append(named, c)
	}
	pools, err = cfg.Only.of(named, cluster, names)
	return pools, true, err
}

// of are, in each family, those of the pools there are that o names, or else the usual ones.
func (o Only) of(usual, there []api.IPPool, names Names) ([]api.IPPool, error) {
	if o.Empty() {
		return usual, nil
	}
	var pools []api.IPPool
	for _, family := range []struct {
		v6    bool
		named []string
	}{{false, o.V4}, {true, o.V6}} {
		if len(family.named) == 0 {
			for _, p := range usual {
				if p.CIDR.Addr().Is6() == family.v6 {
					pools = append(pools, p)
				}
			}
		}
		for _, name := range family.named {
			cidr, ok := names[name]
			if !ok {
				cidr, _ = netip.ParsePrefix(name)
			}
			at := slices.IndexFunc(there, func(p api.IPPool) bool { return p.CIDR == cidr && cidr.Addr().Is6() == family.v6 })
			if at < 0 {
				return nil, fmt.Errorf("%w: %.80q is none of that family that this node may use, by name or CIDR; they are %s", ErrPool, name, list(there))
			}
			pools = append(pools, there[at])
		}
	}
	return pools, nil
}

// Families tells which families an attachment's pools have.
func Families(pools []api.IPPool) (v4, v6 bool) {
	for _, p := range pools {
		v4 = v4 || p.CIDR.Addr().Is4()
		v6 = v6 || p.CIDR.Addr().Is6()
	}
	return v4, v6
}

// Blocks are a pool's blocks, in order.
func Blocks(p api.IPPool) iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		for cidr, ok := netip.PrefixFrom(p.CIDR.Addr(), p.BlockSize), true; ok; cidr, ok = nextBlock(p, cidr) {
			if !yield(cidr) {
				return
			}
		}
	}
}

// NATOutgoing tells, by family, whether one of the addresses comes out of a pool whose pods are masqueraded.
func NATOutgoing(pools []api.IPPool, addrs []netip.Addr) (v4, v6 bool) {
	for _, p := range pools {
		for _, a := range addrs {
			if p.NATOutgoing && p.CIDR.Contains(a) {
				v4, v6 = v4 || a.Is4(), v6 || a.Is6()
			}
		}
	}
	return v4, v6
}
