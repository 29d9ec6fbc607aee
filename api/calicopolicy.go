package api

import (
	"maps"
	"slices"

	"github.com/caracal-net/caracal/api/selector"
)

// CalicoNetworkPolicy is Calico's NetworkPolicy: ordered rules for pods of its namespace.
type CalicoNetworkPolicy struct {
	OrderedPolicy
}

// GlobalNetworkPolicy is ordered rules for pods of all namespaces.
type GlobalNetworkPolicy struct {
	OrderedPolicy
	NamespaceSelector string `json:"namespaceSelector,omitempty"` // over labels of namespaces; "": all

	DoNotTrack     Refused `json:"doNotTrack,omitempty"`
	PreDNAT        Refused `json:"preDNAT,omitempty"`
	ApplyOnForward Refused `json:"applyOnForward,omitempty"`
}

// OrderedPolicy is what Calico's two policies have in common.
type OrderedPolicy struct {
	Tier                   string   `json:"tier,omitempty"`     // "": "default"
	Order                  *float64 `json:"order,omitempty"`    // the lower comes first; nil: last. Of the same order the names decide
	Selector               string   `json:"selector,omitempty"` // over labels of pods; "": all
	ServiceAccountSelector string   `json:"serviceAccountSelector,omitempty"`
	Types                  []string `json:"types,omitempty"` // none: those that there are rules of, or Ingress
	Ingress                []Rule   `json:"ingress,omitempty"`
	Egress                 []Rule   `json:"egress,omitempty"`
	PerformanceHints       []string `json:"performanceHints,omitempty"` // read, of no effect
}

// Rule is one of an ordered list; the first that matches decides. All that it says must be true.
type Rule struct {
	Metadata    *RuleMetadata `json:"metadata,omitempty"` // of no effect
	Action      string        `json:"action"`             // Allow, Deny, Log or Pass
	IPVersion   int           `json:"ipVersion,omitempty"`
	Protocol    *Protocol     `json:"protocol,omitempty"`
	NotProtocol *Protocol     `json:"notProtocol,omitempty"`
	ICMP        *ICMPMatch    `json:"icmp,omitempty"`
	NotICMP     *ICMPMatch    `json:"notICMP,omitempty"`
	Source      EntityRule    `json:"source,omitzero"`
	Destination EntityRule    `json:"destination,omitzero"`
	HTTP        Refused       `json:"http,omitempty"`
}

// RuleMetadata are notes on a rule.
type RuleMetadata struct {
	Annotations map[string]string `json:"annotations,omitempty"`
}

// ICMPMatch is a type of message, and perhaps a code.
type ICMPMatch struct {
	Type *int `json:"type,omitempty"`
	Code *int `json:"code,omitempty"`
}

// EntityRule is what a rule asks of one end of a packet.
type EntityRule struct {
	Nets              []Net                `json:"nets,omitempty"`
	NotNets           []Net                `json:"notNets,omitempty"`
	Selector          string               `json:"selector,omitempty"`
	NotSelector       string               `json:"notSelector,omitempty"`
	NamespaceSelector string               `json:"namespaceSelector,omitempty"` // "": in a NetworkPolicy, its own namespace
	ServiceAccounts   *ServiceAccountMatch `json:"serviceAccounts,omitempty"`
	Ports             []Ports              `json:"ports,omitempty"`
	NotPorts          []Ports              `json:"notPorts,omitempty"`
	Services          Refused              `json:"services,omitempty"`
}

// IsZero tells whether the rule asks nothing of that end.
func (e EntityRule) IsZero() bool {
	return len(e.Nets)+len(e.NotNets)+len(e.Ports)+len(e.NotPorts) == 0 && e.Selector == "" && e.NotSelector == "" &&
		e.NamespaceSelector == "" && e.ServiceAccounts == nil && !bool(e.Services)
}

// ServiceAccountMatch are service accounts by name, by label, or both.
type ServiceAccountMatch struct {
	Names    []string `json:"names,omitempty"`
	Selector string   `json:"selector,omitempty"`
}

// Complete validates the policy and fills in its tier and types.
func (p *CalicoNetworkPolicy) Complete(string) error { return p.complete() }

// Complete validates the policy and fills in its tier and types.
func (p *GlobalNetworkPolicy) Complete(string) error {
	for _, f := range []struct {
		key string
		set Refused
	}{{"doNotTrack", p.DoNotTrack}, {"preDNAT", p.PreDNAT}, {"applyOnForward", p.ApplyOnForward}} {
		if f.set {
			return unsupported(f.key, "policy is for pods, and all of it is for what is forwarded too; leave it out")
		}
	}
	if err := checkSelectorAt("namespaceSelector", p.NamespaceSelector); err != nil {
		return err
	}
	return p.complete()
}

func (p *OrderedPolicy) complete() error {
	if p.Tier == "" {
		p.Tier = DefaultTier
	}
	if !validName(p.Tier) {
		return invalid("tier", "%.80q is no tier's name", p.Tier)
	}
	if len(p.Types) == 0 {
		if len(p.Ingress) > 0 || len(p.Egress) == 0 {
			p.Types = append(p.Types, "Ingress")
		}
		if len(p.Egress) > 0 {
			p.Types = append(p.Types, "Egress")
		}
	}
	err := checkTypes("types", p.Types)
	if err == nil {
		err = checkSelectorAt("selector", p.Selector)
	}
	if err == nil {
		err = checkSelectorAt("serviceAccountSelector", p.ServiceAccountSelector)
	}
	if err == nil {
		err = checkRules("ingress", p.Ingress)
	}
	if err == nil {
		err = checkRules("egress", p.Egress)
	}
	return err
}

func checkSelectorAt(path, text string) error {
	if _, err := selector.Parse(text); err != nil {
		return invalid(path, "%.80q: %w", text, err)
	}
	return nil
}

func checkRules(path string, rules []Rule) error {
	for i, r := range rules {
		if err := r.check(); err != nil {
			return at(index(path, i), err)
		}
	}
	return nil
}

func (r Rule) check() error {
	switch {
	case !slices.Contains([]string{"Allow", "Deny", "Log", "Pass"}, r.Action):
		return invalid("action", "%.80q: Allow, Deny, Log or Pass", r.Action)
	case r.IPVersion != 0 && r.IPVersion != 4 && r.IPVersion != 6:
		return invalid("ipVersion", "%d: 4, 6, or none for both", r.IPVersion)
	case bool(r.HTTP):
		return unsupported("http", "nothing looks into what a connection carries; match its ports")
	}
	if err := r.checkICMP("icmp", r.ICMP); err != nil {
		return err
	}
	if err := r.checkICMP("notICMP", r.NotICMP); err != nil {
		return err
	}
	version := r.IPVersion
	for _, end := range []struct {
		key    string
		entity EntityRule
	}{{"source", r.Source}, {"destination", r.Destination}} {
		if err := end.entity.check(r.Protocol, &version); err != nil {
			return at(end.key, err)
		}
	}
	return nil
}

func (r Rule) checkICMP(path string, m *ICMPMatch) error {
	switch {
	case m == nil:
		return nil
	case r.Protocol == nil || *r.Protocol != ICMP && *r.Protocol != ICMPv6:
		return invalid(path, "it goes with protocol ICMP or ICMPv6; write that")
	case *r.Protocol == ICMP && r.IPVersion == 6 || *r.Protocol == ICMPv6 && r.IPVersion == 4:
		return invalid("ipVersion", "%d has no %s", r.IPVersion, r.Protocol)
	case m.Type == nil:
		return invalid(path, "type is missing; for all messages leave %s out", path)
	case *m.Type < 0 || *m.Type > 255:
		return invalid(path+".type", "%d is not between 0 and 255", *m.Type)
	case m.Code != nil && (*m.Code < 0 || *m.Code > 255):
		return invalid(path+".code", "%d is not between 0 and 255", *m.Code)
	}
	return nil
}

// check validates one end. Version is the rule's, 0 until some network says it.
func (e EntityRule) check(protocol *Protocol, version *int) error {
	if e.Services {
		return unsupported("services", "match the pods behind the service by their labels")
	}
	for _, list := range []struct {
		key  string
		nets []Net
	}{{"nets", e.Nets}, {"notNets", e.NotNets}} {
		for i, n := range list.nets {
			if *version == 0 {
				*version = n.family()
			}
			if n.family() != *version {
				return invalid(index(list.key, i), "%s: the rule is about IPv%d already; write a rule for each", n, *version)
			}
		}
	}
	for _, list := range []struct {
		key   string
		ports []Ports
	}{{"ports", e.Ports}, {"notPorts", e.NotPorts}} {
		if len(list.ports) > 0 && (protocol == nil || !protocol.HasPorts()) {
			return invalid(list.key, "they go with protocol TCP, UDP or SCTP; write that")
		}
	}
	err := checkSelectorAt("selector", e.Selector)
	if err == nil {
		err = checkSelectorAt("notSelector", e.NotSelector)
	}
	if err == nil {
		err = checkSelectorAt("namespaceSelector", e.NamespaceSelector)
	}
	if err == nil && e.ServiceAccounts != nil {
		err = at("serviceAccounts", e.ServiceAccounts.check())
	}
	return err
}

func (s ServiceAccountMatch) check() error {
	if len(s.Names) == 0 && s.Selector == "" {
		return invalid("names", "neither names nor selector is there; write selector: all() for every service account")
	}
	for i, name := range s.Names {
		if !validName(name) {
			return invalid(index("names", i), "%.80q is no service account's name", name)
		}
	}
	return checkSelectorAt("selector", s.Selector)
}

// NetworkSet is a set of addresses that rules select by its labels. GlobalNetworkSet is the same, without a namespace.
type NetworkSet struct {
	Nets []Net `json:"nets,omitempty"`
}

// Complete has nothing to validate: each network does it itself.
func (s *NetworkSet) Complete(string) error { return nil }

// DockerNetworkAnnotation is on the Profile of a Docker network: how people call the network.
const DockerNetworkAnnotation = "caracal.dev/docker-network"

// DockerNetworkLabel begins the label of who is on a Docker network. Its Profile gives it, and nobody can give it to himself.
const DockerNetworkLabel = "docker.caracal.dev/"

// Profile is rules, and labels, of the endpoints that name it. Its rules decide when no tier does.
type Profile struct {
	Ingress       []Rule            `json:"ingress,omitempty"`
	Egress        []Rule            `json:"egress,omitempty"`
	LabelsToApply map[string]string `json:"labelsToApply,omitempty"`
}

// Complete validates the profile.
func (p *Profile) Complete(string) error {
	for _, list := range []struct {
		key   string
		rules []Rule
	}{{"ingress", p.Ingress}, {"egress", p.Egress}} {
		if err := checkRules(list.key, list.rules); err != nil {
			return err
		}
		for i, r := range list.rules {
			if r.Action == "Pass" {
				return invalid(index(list.key, i)+".action", "Pass leads from tiers to profiles; a profile has Allow, Deny and Log")
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(p.LabelsToApply)) {
		if !selector.ValidKey(key) {
			return invalid("labelsToApply", "%.80q: no selector could name it", key)
		}
	}
	return nil
}
