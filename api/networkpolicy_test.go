package api

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

// A rule may name many peers or many ports, and not any product of them.
func TestPortsOfPeers(t *testing.T) {
	block := IPBlock{CIDR: Net{Prefix: netip.MustParsePrefix("10.0.0.0/8")}}
	part := IPBlock{CIDR: block.CIDR, Except: []Net{{Prefix: netip.MustParsePrefix("10.1.0.0/16")}}}
	for _, test := range []struct {
		peer         NetworkPolicyPeer
		peers, ports int
		fails        bool
	}{
		{NetworkPolicyPeer{IPBlock: &part}, 8000, 5000, true},
		{NetworkPolicyPeer{PodSelector: &LabelSelector{}}, 8000, 5000, true},
		{NetworkPolicyPeer{IPBlock: &block}, 8000, 5000, false},
		{NetworkPolicyPeer{IPBlock: &part}, 8000, 1, false},
		{NetworkPolicyPeer{IPBlock: &part}, 1, 5000, false},
		{NetworkPolicyPeer{IPBlock: &part}, 1000, 100, false},
	} {
		r := NetworkPolicyIngress{}
		for range test.peers {
			r.From = append(r.From, test.peer)
		}
		for i := range test.ports {
			r.Ports = append(r.Ports, NetworkPolicyPort{Port: &Ports{First: uint16(i + 1), Last: uint16(i + 1)}})
		}
		err := (&NetworkPolicy{Ingress: []NetworkPolicyIngress{r}}).Complete("")
		switch {
		case !test.fails && err != nil:
			t.Errorf("%d peers, %d ports: %v", test.peers, test.ports, err)
		case test.fails && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "5000 ports for each of 8000 peers")):
			t.Errorf("%d peers, %d ports: %v, want an error that says so", test.peers, test.ports, err)
		}
	}
}
