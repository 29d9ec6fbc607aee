package docker

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	ipamhelper "github.com/docker/go-plugins-helpers/ipam"
	nethelper "github.com/docker/go-plugins-helpers/network"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// FuzzRequests feeds what is read of Docker's requests and answers: whatever is accepted can be stored and named.
func FuzzRequests(f *testing.F) {
	const id = "735f15b514db3a7310a7f3ef0734a6cd6b966753dc8cf0f7847305e0ba9fe51f"
	for _, s := range []string{
		`{"NetworkID":"` + id + `","Options":{"com.docker.network.generic":{"com.caracal.network":"calnet1"}},"IPv4Data":[{"AddressSpace":"CaracalGlobalAddressSpace","Pool":"0.0.0.0/0","Gateway":"0.0.0.0/0"}]}`,
		`{"NetworkID":"` + id + `","EndpointID":"` + id + `","Interface":{"Address":"10.244.0.1/32","AddressIPv6":"2001:db8::1/128","MacAddress":"02:00:00:00:00:01"},"Options":{"com.docker.network.portmap":[]}}`,
		`{"PoolID":"CalicoPoolIPv4","Address":"10.244.0.9","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
		`{"PoolID":"10.244.0.0/16","Pool":"10.244.0.0/16","V6":false}`,
		`{"Name":"calnet1","Id":"` + id + `","Containers":{"ep-1":{"Name":"c1","EndpointID":"1"}},"Config":{"Labels":{"org.projectcalico.label.app":"web"}}}`,
		`{"Options":{"com.docker.network.generic":[1],"com.docker.network.internal":true},"IPv4Data":[null]}`,
	} {
		f.Add([]byte(s))
	}
	pools := []api.IPPool{{CIDR: netip.MustParsePrefix("10.244.0.0/16")}, {CIDR: netip.MustParsePrefix("2001:db8::/64"), Disabled: true}}
	f.Fuzz(func(t *testing.T, data []byte) {
		var network nethelper.CreateNetworkRequest
		if json.Unmarshal(data, &network) == nil {
			shared, err := sharedName(network.Options)
			if err == nil && checkID("network id", network.NetworkID) == nil && checkData("caracal", network.IPv4Data) == nil {
				text, err := json.Marshal(newProfile(network.NetworkID, shared, "h1", "local"))
				var back api.Resource
				if err == nil {
					err = json.Unmarshal(text, &back)
				}
				if err != nil {
					t.Fatalf("network %q, shared %q makes an invalid profile: %v", network.NetworkID, shared, err)
				}
			}
		}
		var endpoint nethelper.CreateEndpointRequest
		if json.Unmarshal(data, &endpoint) == nil {
			if key, err := endpointKey(endpoint.NetworkID, endpoint.EndpointID); err == nil {
				if _, err := node.ParseKey(key.String()); err != nil || !ours(key) || len(hostIfName(endpoint.EndpointID)) != 15 {
					t.Fatalf("endpoint %q of %q is called %s: %v", endpoint.EndpointID, endpoint.NetworkID, key, err)
				}
			}
			if w, err := readEndpoint(endpoint.Interface, endpoint.Options); err == nil {
				if len(w.addrs) == 0 || slices.ContainsFunc(w.addrs, func(a netip.Addr) bool { return !a.IsValid() || a.Is4In6() }) || w.mac != nil && len(w.mac) != 6 {
					t.Fatalf("accepted %+v", w)
				}
			}
		}
		var pool ipamhelper.RequestPoolRequest
		if json.Unmarshal(data, &pool) == nil {
			id, cidr, err := choosePool(spaces["caracal"], pools, pool.Pool, pool.V6)
			if _, perr := netip.ParsePrefix(cidr); err == nil && perr != nil {
				t.Fatalf("pool %q: %v", cidr, perr)
			}
			if _, _, rerr := readRequest(id, ""); err == nil && rerr != nil {
				t.Fatalf("pool id %q is not read again: %v", id, rerr)
			}
		}
		var address ipamhelper.RequestAddressRequest
		if json.Unmarshal(data, &address) == nil {
			cfg, want, err := readRequest(address.PoolID, address.Address)
			if err == nil && (!cfg.Cluster || want.V4 == want.V6 || len(want.Want) > 1) {
				t.Fatalf("accepted %+v %+v", cfg, want)
			}
		}
		var container struct {
			Config struct{ Labels map[string]string }
		}
		if json.Unmarshal(data, &container) == nil {
			ownLabels(container.Config.Labels)
		}
		var n engineNetwork
		_ = json.Unmarshal(data, &n)
		missing(string(data))
	})
}

// The firewall's rules are added where Docker has it drop what nothing accepts, once.
func TestMissing(t *testing.T) {
	drop := "-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n"
	all := drop + "-A " + strings.Join(forwarded, "\n-A ") + "\n"
	for _, c := range []struct {
		chain string
		want  int
	}{{"-P FORWARD ACCEPT\n", 0}, {drop, 2}, {drop + "-A " + forwarded[1] + "\n", 1}, {all, 0}, {"", 0}} {
		if got := missing(c.chain); len(got) != c.want {
			t.Errorf("%q lacks %q, want %d", c.chain, got, c.want)
		}
	}
}

// What Docker does not know of is freed; addresses of pods are not, however their network is called.
func TestOurs(t *testing.T) {
	const id = "735f15b514db3a7310a7f3ef0734a6cd6b966753dc8cf0f7847305e0ba9fe51f"
	for key, want := range map[node.Key]bool{
		requested(netip.MustParseAddr("10.244.0.1")):                             true,
		requested(netip.MustParseAddr("2001:db8::1")):                            true,
		{Network: keyNetwork + id[:shownID], ContainerID: id, IfName: keyIfName}: true,
		{Network: keyNetwork + id[:shownID], ContainerID: id, IfName: "eth0"}:    false,
		{Network: "docker-bridge", ContainerID: id, IfName: "eth0"}:              false,
		{Network: "docker-bridge", ContainerID: id, IfName: keyIfName}:           false,
		{Network: "docker-requested", ContainerID: id, IfName: keyIfName}:        false,
	} {
		if ours(key) != want {
			t.Errorf("%s is Docker's: %v", key, !want)
		}
	}
}
