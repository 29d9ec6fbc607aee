package api

import (
	"fmt"
	"slices"
)

// WorkloadEndpoint is a pod's interface on some node. The agents write it; metadata.labels are the pod's.
type WorkloadEndpoint struct {
	Node           string         `json:"node"`
	Orchestrator   string         `json:"orchestrator,omitempty"` // "k8s", "libnetwork" (Docker), "cni" (default)
	Workload       string         `json:"workload,omitempty"`
	Pod            string         `json:"pod,omitempty"`
	ContainerID    string         `json:"containerID,omitempty"`
	Endpoint       string         `json:"endpoint,omitempty"` // the interface in the pod: "eth0"
	InterfaceName  string         `json:"interfaceName,omitempty"`
	MAC            string         `json:"mac,omitempty"`
	ServiceAccount string         `json:"serviceAccountName,omitempty"`
	IPNetworks     []Net          `json:"ipNetworks,omitempty"` // single addresses
	Profiles       []string       `json:"profiles,omitempty"`   // none: what no tier decides is allowed
	Ports          []EndpointPort `json:"ports,omitempty"`
}

// EndpointPort is a name of a port.
type EndpointPort struct {
	Name     string   `json:"name"`
	Protocol Protocol `json:"protocol"`
	Port     uint16   `json:"port"`
	HostPort uint16   `json:"hostPort,omitempty"` // read, of no effect
	HostIP   string   `json:"hostIP,omitempty"`   // read, of no effect
}

// Complete validates the endpoint and fills in its orchestrator.
func (w *WorkloadEndpoint) Complete(string) error {
	if w.Node == "" {
		return invalid("node", "it is missing")
	}
	if w.Orchestrator == "" {
		w.Orchestrator = "cni"
	}
	for i, n := range w.IPNetworks {
		if !n.IsSingleIP() {
			return invalid(index("ipNetworks", i), "%s is more than one address", n)
		}
		if slices.Contains(w.IPNetworks[:i], n) {
			return invalid(index("ipNetworks", i), "%s is there twice", n)
		}
	}
	for i, p := range w.Ports {
		var err error
		switch {
		case !validPortName(p.Name):
			err = invalid("name", "%.80q is no port's name", p.Name)
		case !p.Protocol.HasPorts():
			err = invalid("protocol", "%s: TCP, UDP or SCTP", p.Protocol)
		case p.Port == 0:
			err = invalid("port", "it is not between 1 and 65535")
		}
		if err != nil {
			return at(index("ports", i), err)
		}
	}
	for i, name := range w.Profiles {
		if !validName(name) {
			return invalid(index("profiles", i), "%.80q is no profile's name", name)
		}
	}
	return nil
}

// Namespace is one of Kubernetes's. Its labels are all that counts.
type Namespace struct {
	Finalizers []string `json:"finalizers,omitempty"` // read, of no effect
}

// Complete validates the namespace's name.
func (n *Namespace) Complete(name string) error {
	if !ValidNamespace(name) {
		return fmt.Errorf("%w: %.80q is no namespace's name: it has lower case letters, digits and '-', at most %d", ErrInvalid, name, maxNamespace)
	}
	return nil
}

// ServiceAccount is one of Kubernetes's. Its labels are all that counts.
type ServiceAccount struct{}

// Complete has nothing to validate.
func (s *ServiceAccount) Complete(string) error { return nil }
