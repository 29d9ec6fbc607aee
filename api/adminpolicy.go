package api

import (
	"fmt"
	"slices"
	"strings"
)

// AdminNetworkPolicy is the network policy API's (v1alpha1): ordered rules, before what namespaces say.
type AdminNetworkPolicy struct {
	Priority *int          `json:"priority"` // 0 to 1000; the lower comes first. Of the same priority the names decide
	Subject  PolicySubject `json:"subject"`
	Ingress  []AdminRule   `json:"ingress,omitempty"`
	Egress   []AdminRule   `json:"egress,omitempty"`
}

// BaselineAdminNetworkPolicy is the network policy API's (v1alpha1): ordered rules for what namespaces say nothing of. There
// is one, called "default".
type BaselineAdminNetworkPolicy struct {
	Subject PolicySubject `json:"subject"`
	Ingress []AdminRule   `json:"ingress,omitempty"`
	Egress  []AdminRule   `json:"egress,omitempty"`
}

// ClusterNetworkPolicy is the network policy API's (v1alpha2): both of the former.
type ClusterNetworkPolicy struct {
	Tier     string        `json:"tier"`     // Admin or Baseline
	Priority *int          `json:"priority"` // 0 to 1000; the lower comes first. Of the same priority the names decide
	Subject  PolicySubject `json:"subject"`
	Ingress  []AdminRule   `json:"ingress,omitempty"`
	Egress   []AdminRule   `json:"egress,omitempty"`
}

// PolicySubject is whom a policy is for: one of its fields.
type PolicySubject struct {
	Namespaces *LabelSelector `json:"namespaces,omitempty"`
	Pods       *PodsSelector  `json:"pods,omitempty"`
}

// PodsSelector are pods by the labels of their namespace and their own.
type PodsSelector struct {
	NamespaceSelector LabelSelector `json:"namespaceSelector"`
	PodSelector       LabelSelector `json:"podSelector"`
}

// AdminRule is one of an ordered list; the first that matches decides.
type AdminRule struct {
	Name      string          `json:"name,omitempty"`
	Action    string          `json:"action"` // Allow (v1alpha2: Accept), Deny or Pass; baseline: Allow or Deny
	From      []AdminPeer     `json:"from,omitempty"`
	To        []AdminPeer     `json:"to,omitempty"`
	Ports     []AdminPort     `json:"ports,omitempty"`     // of v1alpha1. None: all
	Protocols []AdminProtocol `json:"protocols,omitempty"` // of v1alpha2. None: all
}

// AdminPeer are pods or, of egress, networks: one of its fields.
type AdminPeer struct {
	Namespaces  *LabelSelector `json:"namespaces,omitempty"`
	Pods        *PodsSelector  `json:"pods,omitempty"`
	Networks    []Net          `json:"networks,omitempty"`
	Nodes       *LabelSelector `json:"nodes,omitempty"`       // refused
	DomainNames []string       `json:"domainNames,omitempty"` // refused
}

// AdminPort are ports of the destination: one of its fields.
type AdminPort struct {
	PortNumber *AdminPortNumber `json:"portNumber,omitempty"`
	NamedPort  string           `json:"namedPort,omitempty"` // of whatever protocol the pod says
	PortRange  *AdminPortRange  `json:"portRange,omitempty"`
}

// AdminPortNumber is a port.
type AdminPortNumber struct {
	Protocol *Protocol `json:"protocol,omitempty"` // TCP (default), UDP or SCTP
	Port     int       `json:"port"`
}

// AdminPortRange are ports, both ends included.
type AdminPortRange struct {
	Protocol *Protocol `json:"protocol,omitempty"` // TCP (default), UDP or SCTP
	Start    int       `json:"start"`
	End      int       `json:"end"`
}

// AdminProtocol are ports of the destination: one of its fields.
type AdminProtocol struct {
	TCP       *AdminDestination `json:"tcp,omitempty"`
	UDP       *AdminDestination `json:"udp,omitempty"`
	SCTP      *AdminDestination `json:"sctp,omitempty"`
	NamedPort string            `json:"destinationNamedPort,omitempty"` // of whatever protocol the pod says
}

// AdminDestination are ports of one protocol.
type AdminDestination struct {
	Port *AdminDestinationPort `json:"destinationPort,omitempty"`
}

// AdminDestinationPort is a port, or a range: one of its fields.
type AdminDestinationPort struct {
	Number int             `json:"number,omitempty"`
	Range  *AdminPortRange `json:"range,omitempty"` // without a protocol
}

// PortMatch are ports of a protocol; nil is any, of a name.
type PortMatch struct {
	Protocol *Protocol
	Ports    Ports
}

// Complete validates the policy and fills in its protocols.
func (p *AdminNetworkPolicy) Complete(string) error {
	return checkAdmin(p.Priority, true, p.Subject, p.Ingress, p.Egress, false, "Allow", "Deny", "Pass")
}

// Complete validates the policy and fills in its protocols.
func (p *BaselineAdminNetworkPolicy) Complete(name string) error {
	if name != "default" {
		return fmt.Errorf("%w: there is one, called \"default\"", ErrInvalid)
	}
	return checkAdmin(nil, false, p.Subject, p.Ingress, p.Egress, false, "Allow", "Deny")
}

// Complete validates the policy.
func (p *ClusterNetworkPolicy) Complete(string) error {
	if p.Tier != "Admin" && p.Tier != "Baseline" {
		return invalid("tier", "%.80q: Admin or Baseline", p.Tier)
	}
	return checkAdmin(p.Priority, true, p.Subject, p.Ingress, p.Egress, true, "Accept", "Deny", "Pass")
}

func checkAdmin(priority *int, prioritized bool, subject PolicySubject, ingress, egress []AdminRule, v2 bool, actions ...string) error {
	switch {
	case prioritized && priority == nil:
		return invalid("priority", "it is missing; write a number from 0 to 1000")
	case prioritized && (*priority < 0 || *priority > 1000):
		return invalid("priority", "%d is not between 0 and 1000", *priority)
	}
	if err := checkPods(subject.Namespaces, subject.Pods, 0); err != nil {
		return at("subject", err)
	}
	for i, r := range ingress {
		if err := r.check("from", "to", r.From, r.To, v2, actions); err != nil {
			return at(index("ingress", i), err)
		}
	}
	for i, r := range egress {
		if err := r.check("to", "from", r.To, r.From, v2, actions); err != nil {
			return at(index("egress", i), err)
		}
	}
	return nil
}

// checkPods validates a subject or a peer, of which exactly one field is to be there; others is how many more there are.
func checkPods(namespaces *LabelSelector, pods *PodsSelector, others int) error {
	if namespaces != nil {
		others++
	}
	if pods != nil {
		others++
	}
	if others != 1 {
		return invalid("pods", "of namespaces, pods and, in egress rules, networks exactly one is to be there, not %d; write namespaces: {} for all pods", others)
	}
	if namespaces != nil {
		if err := namespaces.check(); err != nil {
			return at("namespaces", err)
		}
	}
	if pods != nil {
		if err := pods.NamespaceSelector.check(); err != nil {
			return at("pods.namespaceSelector", err)
		}
		if err := pods.PodSelector.check(); err != nil {
			return at("pods.podSelector", err)
		}
	}
	return nil
}

// check validates a rule whose peers are at key; v2 tells whether it is one of v1alpha2.
func (r AdminRule) check(key, otherKey string, peers, others []AdminPeer, v2 bool, actions []string) error {
	switch {
	case !slices.Contains(actions, r.Action):
		return invalid("action", "%.80q: %s", r.Action, strings.Join(actions, " or "))
	case len(r.Name) > 100:
		return invalid("name", "it is longer than 100 bytes")
	case len(others) > 0:
		return invalid(otherKey, "here it is %s", key)
	case len(peers) == 0:
		return invalid(key, "it is missing; write [{namespaces: {}}] for all pods")
	case v2 && len(r.Ports) > 0:
		return invalid("ports", "they are of v1alpha1; write protocols")
	case !v2 && len(r.Protocols) > 0:
		return invalid("protocols", "they are of v1alpha2; write ports")
	}
	networks := false
	for i, p := range peers {
		if err := p.check(key == "to"); err != nil {
			return at(index(key, i), err)
		}
		networks = networks || len(p.Networks) > 0
	}
	matches, err := r.complete()
	if err != nil {
		return err
	}
	for _, m := range matches {
		if m.Ports.Name != "" && networks {
			return invalid(key, "networks have no port %q; write its number", m.Ports.Name)
		}
	}
	return nil
}

func (p AdminPeer) check(egress bool) error {
	switch {
	case p.Nodes != nil:
		return unsupported("nodes", "write the nodes' addresses as networks")
	case len(p.DomainNames) > 0:
		return unsupported("domainNames", "write the addresses as networks")
	case len(p.Networks) > 0 && !egress:
		return invalid("networks", "they are for egress rules; write a GlobalNetworkPolicy")
	}
	others := 0
	if len(p.Networks) > 0 {
		others = 1
	}
	return checkPods(p.Namespaces, p.Pods, others)
}

// PortMatches are the ports of a rule that is complete; none: all packets.
func (r AdminRule) PortMatches() []PortMatch {
	matches, _ := r.complete() // which has been validated
	return matches
}

// complete validates the ports and fills in their protocols.
func (r AdminRule) complete() ([]PortMatch, error) {
	var all []PortMatch
	for i := range r.Ports {
		m, err := r.Ports[i].complete()
		if err != nil {
			return nil, at(index("ports", i), err)
		}
		all = append(all, m)
	}
	for i := range r.Protocols {
		m, err := r.Protocols[i].match()
		if err != nil {
			return nil, at(index("protocols", i), err)
		}
		all = append(all, m)
	}
	return all, nil
}

func (p AdminPort) complete() (PortMatch, error) {
	switch {
	case p.PortNumber != nil && p.PortRange == nil && p.NamedPort == "":
		return portMatch("portNumber", &p.PortNumber.Protocol, "port", p.PortNumber.Port, "port", p.PortNumber.Port)
	case p.PortRange != nil && p.PortNumber == nil && p.NamedPort == "":
		return portMatch("portRange", &p.PortRange.Protocol, "start", p.PortRange.Start, "end", p.PortRange.End)
	case p.NamedPort != "" && p.PortNumber == nil && p.PortRange == nil:
		return PortMatch{Ports: Ports{Name: p.NamedPort}}, checkPortName("namedPort", p.NamedPort)
	}
	return PortMatch{}, invalid("portNumber", "of portNumber, portRange and namedPort exactly one is to be there")
}

func (p AdminProtocol) match() (PortMatch, error) {
	var key string
	var found *AdminDestination
	var protocol Protocol
	n := 0
	for _, d := range []struct {
		key      string
		protocol Protocol
		of       *AdminDestination
	}{{"tcp", TCP, p.TCP}, {"udp", UDP, p.UDP}, {"sctp", SCTP, p.SCTP}} {
		if d.of != nil {
			key, protocol, found = d.key+".destinationPort", d.protocol, d.of
			n++
		}
	}
	switch {
	case n == 0 && p.NamedPort != "":
		return PortMatch{Ports: Ports{Name: p.NamedPort}}, checkPortName("destinationNamedPort", p.NamedPort)
	case n != 1 || p.NamedPort != "":
		return PortMatch{}, invalid("tcp", "of tcp, udp, sctp and destinationNamedPort exactly one is to be there")
	case found.Port == nil || (found.Port.Number == 0) == (found.Port.Range == nil):
		return PortMatch{}, invalid(key, "of number and range exactly one is to be there")
	case found.Port.Range == nil:
		to := &protocol
		return portMatch(key, &to, "number", found.Port.Number, "number", found.Port.Number)
	case found.Port.Range.Protocol != nil:
		return PortMatch{}, invalid(key+".range.protocol", "%s is said already; leave it out", protocol)
	}
	to := &protocol
	return portMatch(key+".range", &to, "start", found.Port.Range.Start, "end", found.Port.Range.End)
}

// portMatch validates ports and their protocol, which it fills in.
func portMatch(path string, protocol **Protocol, firstKey string, first int, lastKey string, last int) (PortMatch, error) {
	if *protocol == nil {
		tcp := TCP
		*protocol = &tcp
	}
	switch {
	case !(*protocol).HasPorts():
		return PortMatch{}, invalid(path+".protocol", "%s: TCP, UDP or SCTP", *protocol)
	case first < 1 || first > 65535:
		return PortMatch{}, invalid(path+"."+firstKey, "%d is not between 1 and 65535", first)
	case last < 1 || last > 65535:
		return PortMatch{}, invalid(path+"."+lastKey, "%d is not between 1 and 65535", last)
	case first > last:
		return PortMatch{}, invalid(path+"."+lastKey, "%d comes before %d; the range is reversed", last, first)
	}
	return PortMatch{*protocol, Ports{First: uint16(first), Last: uint16(last)}}, nil
}
