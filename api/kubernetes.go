package api

import (
	"fmt"
	"net/netip"
	"slices"
)

// Pod is one of Kubernetes's, as far as a network needs it: metadata has its labels and its uid. One on its node's own network,
// or that has ended, is none. It is read from Kubernetes alone.
type Pod struct {
	Node           string         `json:"nodeName,omitempty"` // none: not scheduled yet
	ServiceAccount string         `json:"serviceAccountName,omitempty"`
	IPs            []netip.Addr   `json:"podIPs,omitempty"`
	Announced      bool           `json:"announced,omitempty"` // by its node's agent, in an annotation: its kubelet has not told them yet
	Ports          []EndpointPort `json:"ports,omitempty"`     // that have a name
}

// Complete validates the pod.
func (p *Pod) Complete(string) error {
	for i, a := range p.IPs {
		if !a.IsValid() || slices.Contains(p.IPs[:i], a) {
			return invalid(index("podIPs", i), "%s is no address, or there twice", a)
		}
	}
	return nil
}

// Service is one of Kubernetes's: the addresses and ports that each node's proxy translates to those of pods. One without an
// address of its own (headless) or of type ExternalName has none. It is read from Kubernetes alone.
type Service struct {
	IPs   []netip.Addr  `json:"ips,omitempty"` // cluster IPs, external IPs and those of load balancers
	Ports []ServicePort `json:"ports,omitempty"`
}

// ServicePort is a port of a Service.
type ServicePort struct {
	Name     string   `json:"name,omitempty"`
	Protocol Protocol `json:"protocol"`
	Port     uint16   `json:"port"`
	NodePort uint16   `json:"nodePort,omitempty"` // of every node's own addresses; 0: none
}

// Complete validates the service.
func (s *Service) Complete(string) error {
	for i, a := range s.IPs {
		if !a.IsValid() {
			return invalid(index("ips", i), "%s is no address", a)
		}
	}
	for i, p := range s.Ports {
		if !p.Protocol.HasPorts() || p.Port == 0 {
			return invalid(index("ports", i), "%s", fmt.Sprintf("%s port %d: TCP, UDP or SCTP, and a port", p.Protocol, p.Port))
		}
	}
	return nil
}

// CoreNode is a Node of Kubernetes: what its kubelet and the cluster say of a host. It is no resource of a store, in which a Node
// is what Caracal's agents say of their hosts.
type CoreNode struct {
	UID                string
	Labels             map[string]string
	Annotations        map[string]string // Calico's, projectcalico.org/...
	PodCIDRs           []netip.Prefix    // that the cluster has given it, one of each family at most
	Addresses          []netip.Addr      // internal ones, as its kubelet found them
	Unschedulable      bool              // it is cordoned: no new pod comes
	NetworkUnavailable string            // its condition of that name: "True", "False", "Unknown"; "": it has none
}
