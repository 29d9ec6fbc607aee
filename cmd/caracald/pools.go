package main

import (
	"fmt"
	"net/netip"
	"strconv"

	"github.com/caracal-net/caracal/api"
)

// defaultPools are the pools that the variables of calico-node's name, CALICO_IPV4POOL_CIDR and those beside it. Without a CIDR there is
// none: no range suits every network.
func defaultPools(getenv func(string) string) ([]api.Resource, error) {
	if off, err := boolVariable(getenv, "NO_DEFAULT_POOLS", false); off || err != nil {
		return nil, err
	}
	kind, err := api.FindKind("IPPool")
	if err != nil {
		return nil, err
	}
	var pools []api.Resource
	for _, f := range []struct {
		prefix, name string
		v6, nat      bool
	}{{"CALICO_IPV4POOL_", "default-ipv4-ippool", false, true}, {"CALICO_IPV6POOL_", "default-ipv6-ippool", true, false}} {
		text := getenv(f.prefix + "CIDR")
		if text == "" || text == "none" {
			continue
		}
		p := &api.IPPool{NodeSelector: getenv(f.prefix + "NODE_SELECTOR"), VXLANMode: getenv(f.prefix + "VXLAN"), IPIPMode: getenv(f.prefix + "IPIP")}
		if p.CIDR, err = netip.ParsePrefix(text); err != nil || p.CIDR.Addr().Is6() != f.v6 {
			return nil, fmt.Errorf("%sCIDR %q: not a CIDR of that family", f.prefix, text)
		}
		if p.NATOutgoing, err = boolVariable(getenv, f.prefix+"NAT_OUTGOING", f.nat); err != nil {
			return nil, err
		}
		if size := getenv(f.prefix + "BLOCK_SIZE"); size != "" {
			if p.BlockSize, err = strconv.Atoi(size); err != nil {
				return nil, fmt.Errorf("%sBLOCK_SIZE %q: not a prefix length", f.prefix, size)
			}
		}
		if private, err := boolVariable(getenv, f.prefix+"DISABLE_BGP_EXPORT", false); private || err != nil {
			if err == nil {
				err = fmt.Errorf("%sDISABLE_BGP_EXPORT: %w: keep routes back from a peer by its filters (BGPFilter)", f.prefix, api.ErrUnsupported)
			}
			return nil, err
		}
		if err := p.Complete(f.name); err != nil {
			return nil, fmt.Errorf("%s*: %w", f.prefix, err)
		}
		pools = append(pools, api.Resource{Kind: kind, Metadata: api.Metadata{Name: f.name}, Spec: p})
	}
	return pools, nil
}

func boolVariable(getenv func(string) string, name string, otherwise bool) (bool, error) {
	text := getenv(name)
	if text == "" {
		return otherwise, nil
	}
	b, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%s=%q: neither true nor false", name, text)
	}
	return b, nil
}

// podCIDRs tells whether a node's blocks are those that Kubernetes gives it, by --ipam or Calico's USE_POD_CIDR.
func podCIDRs(mode string, getenv func(string) string) (bool, error) {
	switch mode {
	case "":
		return boolVariable(getenv, "USE_POD_CIDR", false)
	case "pools", "podcidr":
		return mode == "podcidr", nil
	}
	return false, fmt.Errorf("--ipam %q: pools or podcidr", mode)
}
