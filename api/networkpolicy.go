package api

// NetworkPolicy is Kubernetes's: which connections pods of its namespace may have. A pod that some policy selects for a
// direction has those that one of them allows, in that direction.
type NetworkPolicy struct {
	PodSelector LabelSelector          `json:"podSelector"`
	Ingress     []NetworkPolicyIngress `json:"ingress,omitempty"`
	Egress      []NetworkPolicyEgress  `json:"egress,omitempty"`
	PolicyTypes []string               `json:"policyTypes,omitempty"` // none: Ingress, and Egress if there are egress rules
}

// NetworkPolicyIngress allows connections to the pods.
type NetworkPolicyIngress struct {
	Ports []NetworkPolicyPort `json:"ports,omitempty"` // none: all
	From  []NetworkPolicyPeer `json:"from,omitempty"`  // none: everyone
}

// NetworkPolicyEgress allows connections from the pods.
type NetworkPolicyEgress struct {
	Ports []NetworkPolicyPort `json:"ports,omitempty"` // none: all
	To    []NetworkPolicyPeer `json:"to,omitempty"`    // none: everyone
}

// NetworkPolicyPort are ports of the destination.
type NetworkPolicyPort struct {
	Protocol *Protocol `json:"protocol,omitempty"` // TCP (default), UDP or SCTP
	Port     *Ports    `json:"port,omitempty"`     // a number or a name; nil: all
	EndPort  *int      `json:"endPort,omitempty"`  // the last of a range that Port begins
}

// NetworkPolicyPeer is a block of addresses, or pods.
type NetworkPolicyPeer struct {
	PodSelector       *LabelSelector `json:"podSelector,omitempty"`       // nil: all pods of the namespaces
	NamespaceSelector *LabelSelector `json:"namespaceSelector,omitempty"` // nil: the policy's own
	IPBlock           *IPBlock       `json:"ipBlock,omitempty"`
}

// IPBlock are the addresses of a network without those of some others.
type IPBlock struct {
	CIDR   Net   `json:"cidr"`
	Except []Net `json:"except,omitempty"` // parts of it
}

// Complete validates the policy and fills in its types and protocols.
func (p *NetworkPolicy) Complete(string) error {
	if err := p.PodSelector.check(); err != nil {
		return at("podSelector", err)
	}
	if len(p.PolicyTypes) == 0 {
		p.PolicyTypes = []string{"Ingress"}
		if len(p.Egress) > 0 {
			p.PolicyTypes = append(p.PolicyTypes, "Egress")
		}
	}
	if err := checkTypes("policyTypes", p.PolicyTypes); err != nil {
		return err
	}
	for i, r := range p.Ingress {
		if err := checkPortsAndPeers(r.Ports, "from", r.From); err != nil {
			return at(index("ingress", i), err)
		}
	}
	for i, r := range p.Egress {
		if err := checkPortsAndPeers(r.Ports, "to", r.To); err != nil {
			return at(index("egress", i), err)
		}
	}
	return nil
}

func checkTypes(path string, types []string) error {
	for i, t := range types {
		if t != "Ingress" && t != "Egress" {
			return invalid(index(path, i), "%.80q: Ingress or Egress", t)
		}
		if i > 0 && t == types[0] || i > 1 {
			return invalid(index(path, i), "%s is there twice", t)
		}
	}
	return nil
}

// maxPortsOfPeers is how many ports all the peers of a rule together may have. Each peer stands for a rule of its own, with all the ports,
// but for the ipBlocks without exceptions, which are one. Kubernetes takes some thousands of both, of whoever may write policies.
const maxPortsOfPeers = 100_000

func checkPortsAndPeers(ports []NetworkPolicyPort, key string, peers []NetworkPolicyPeer) error {
	rules := 0
	for _, peer := range peers {
		if peer.IPBlock == nil || len(peer.IPBlock.Except) > 0 {
			rules++
		}
	}
	if rules*len(ports) > maxPortsOfPeers {
		return invalid("ports", "%d ports for each of %d peers are more than %d in all; write ranges of ports (endPort), or ipBlocks without except", len(ports), rules, maxPortsOfPeers)
	}
	for i := range ports {
		if err := ports[i].complete(); err != nil {
			return at(index("ports", i), err)
		}
	}
	for i, peer := range peers {
		if err := peer.check(); err != nil {
			return at(index(key, i), err)
		}
	}
	return nil
}

func (p *NetworkPolicyPort) complete() error {
	if p.Protocol == nil {
		tcp := TCP
		p.Protocol = &tcp
	}
	switch {
	case !p.Protocol.HasPorts():
		return invalid("protocol", "%s: TCP, UDP or SCTP", p.Protocol)
	case p.Port == nil && p.EndPort != nil:
		return invalid("endPort", "there is no port that begins the range; write port")
	case p.Port == nil:
		return nil
	case p.Port.Name != "" && p.EndPort != nil:
		return invalid("endPort", "port %q is a name; a range begins with a number", p.Port.Name)
	case p.Port.Name != "":
		return checkPortName("port", p.Port.Name)
	case p.Port.First != p.Port.Last:
		return invalid("port", "a range; write port: %d and endPort: %d", p.Port.First, p.Port.Last)
	case p.EndPort != nil && (*p.EndPort < 1 || *p.EndPort > 65535):
		return invalid("endPort", "%d is not between 1 and 65535", *p.EndPort)
	case p.EndPort != nil && *p.EndPort < int(p.Port.First):
		return invalid("endPort", "%d comes before port %d; the range is reversed", *p.EndPort, p.Port.First)
	}
	return nil
}

func (p NetworkPolicyPeer) check() error {
	switch {
	case p.IPBlock == nil && p.PodSelector == nil && p.NamespaceSelector == nil:
		return invalid("podSelector", "neither podSelector, namespaceSelector nor ipBlock is there; write podSelector: {} for all pods of the namespace")
	case p.IPBlock != nil && (p.PodSelector != nil || p.NamespaceSelector != nil):
		return invalid("ipBlock", "it goes with neither podSelector nor namespaceSelector; write it as a peer of its own")
	case p.IPBlock != nil:
		return at("ipBlock", p.IPBlock.check())
	}
	for _, s := range []struct {
		key      string
		selector *LabelSelector
	}{{"podSelector", p.PodSelector}, {"namespaceSelector", p.NamespaceSelector}} {
		if s.selector == nil {
			continue
		}
		if err := s.selector.check(); err != nil {
			return at(s.key, err)
		}
	}
	return nil
}

func (b IPBlock) check() error {
	if !b.CIDR.IsValid() {
		return invalid("cidr", "it is missing")
	}
	for i, e := range b.Except {
		if !e.IsValid() || e.family() != b.CIDR.family() || !b.CIDR.Contains(e.Addr()) || e.Bits() <= b.CIDR.Bits() {
			return invalid(index("except", i), "%s is no part of cidr %s; leave it out", e, b.CIDR)
		}
	}
	return nil
}
