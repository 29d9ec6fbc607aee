package ipam

import (
	"encoding/json"
	"fmt"
	"iter"
	"net/netip"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// poolsSetting holds the cluster's pools, as JSON. While it is there blocks are claimed for this node by its agent, in the
// store that the nodes share, and addresses come out of claimed blocks only.
const poolsSetting = "cluster/pools"

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
	if old := tx.Setting(poolsSetting); old == string(text) {
		return nil
	}
	return tx.PutSetting(poolsSetting, string(text))
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
	if err != nil || !claimed {
		return pools, false, err
	}
	if len(cfg.Pools) == 0 {
		return cluster, true, nil
	}
	var named []api.IPPool
	for _, p := range pools {
		c, ok := within(cluster, p.CIDR.Addr())
		if !ok || c.CIDR != p.CIDR {
			return nil, false, fmt.Errorf("%w: %s is none of the cluster's; they are %s (caracalctl get ippools)", ErrPool, p.CIDR, names(cluster))
		}
		named = append(named, c)
	}
	return named, true, nil
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
