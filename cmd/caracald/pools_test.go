package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
)

func TestDefaultPools(t *testing.T) {
	for _, test := range []struct {
		env  string // NAME=VALUE, with spaces between
		want string // names and CIDRs, or what the error says
	}{
		{"", ""},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16", "default-ipv4-ippool 10.244.0.0/16/26 nat"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 NO_DEFAULT_POOLS=true", ""},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV4POOL_BLOCK_SIZE=24 CALICO_IPV4POOL_NAT_OUTGOING=false CALICO_IPV4POOL_VXLAN=CrossSubnet CALICO_IPV4POOL_IPIP=Never CALICO_IPV4POOL_DISABLE_BGP_EXPORT=false",
			"default-ipv4-ippool 10.244.0.0/16/24 CrossSubnet"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV6POOL_CIDR=fd00:10::/48", "default-ipv4-ippool 10.244.0.0/16/26 nat, default-ipv6-ippool fd00:10::/48/122"},
		{"CALICO_IPV4POOL_CIDR=fd00:10::/48", "not a CIDR of that family"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0", "not a CIDR of that family"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV4POOL_IPIP=Always", "write vxlanMode"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV4POOL_VXLAN=Sometimes", "vxlanMode"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV4POOL_DISABLE_BGP_EXPORT=true", "BGPFilter"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV4POOL_NODE_SELECTOR=all(", "nodeSelector"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV4POOL_BLOCK_SIZE=8", "block size"},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/16 CALICO_IPV4POOL_NAT_OUTGOING=perhaps", "neither true nor false"},
	} {
		env := make(map[string]string)
		for _, v := range strings.Fields(test.env) {
			name, value, _ := strings.Cut(v, "=")
			env[name] = value
		}
		pools, err := defaultPools(func(name string) string { return env[name] })
		if err != nil {
			if test.want == "" || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v, want %q", test.env, err, test.want)
			}
			continue
		}
		var got []string
		for _, r := range pools {
			p := r.Spec.(*api.IPPool)
			text := fmt.Sprintf("%s %s/%d %s", r.Metadata.Name, p.CIDR, p.BlockSize, p.VXLANMode)
			if p.NATOutgoing {
				text += "nat"
			}
			got = append(got, strings.TrimSpace(text))
		}
		if s := strings.Join(got, ", "); s != test.want {
			t.Errorf("%s: %q, want %q", test.env, s, test.want)
		}
	}
}
