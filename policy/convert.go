package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/selector"
)

// Labels that an endpoint or a set has because of where it is, as in Calico.
const (
	labelNamespace      = "projectcalico.org/namespace"
	labelOrchestrator   = "projectcalico.org/orchestrator" // of every endpoint, of no set
	labelServiceAccount = "projectcalico.org/serviceaccount"

	namespacePrefix      = "pcns." // before the labels of its namespace
	serviceAccountPrefix = "pcsa." // before those of its service account
)

// Orders of what says none of its own.
const (
	orderKubernetes = 1000 // of a NetworkPolicy in the default tier
	orderBaseline   = 1001 // of the BaselineAdminNetworkPolicy: behind all priorities
)

// FromResources makes the model of all resources that are about policy; others are passed over. Resources are as
// UnmarshalJSON leaves them, complete, and stay as they are. What can't be converted is left out, and the error names every
// such resource with the way out: a model with an error may allow what its owner wants denied.
func FromResources(resources []api.Resource) (*Model, error) {
	all := slices.SortedFunc(slices.Values(resources), func(a, b api.Resource) int { return strings.Compare(a.Key(), b.Key()) })
	m := &Model{Profiles: make(map[string]*Profile), Endpoints: make(map[string]*Endpoint), Sets: make(map[string]*Set)}
	var errs []error
	context, tiers := NewContext(), make(map[string]api.Tier)
	for i, r := range all {
		if i > 0 && r.Key() == all[i-1].Key() {
			errs = append(errs, fmt.Errorf("%s: %w: it is there twice; leave one out", r, api.ErrInvalid))
		}
		context.Add(r)
		if t, ok := r.Spec.(*api.Tier); ok {
			tiers[r.Metadata.Name] = *t
		}
	}
	var placed []Placed
	holders := make(map[string]string)
	for i, r := range all {
		if i > 0 && r.Key() == all[i-1].Key() {
			continue
		}
		var err error
		switch r.Spec.(type) {
		case *api.WorkloadEndpoint:
			var e *Endpoint
			if e, err = FromEndpoint(r, context); err == nil {
				err = m.hold(e, r, holders)
			}
		case *api.NetworkSet:
			var s *Set
			if s, err = FromSet(r, context); err == nil {
				m.Sets[s.ID] = s
			}
		case *api.Profile:
			var p *Profile
			if p, err = FromProfile(r); err == nil {
				m.Profiles[r.Metadata.Name] = p
			}
		default:
			var p Placed
			if p, err = FromPolicy(r); err == nil && p.Policy != nil {
				placed = append(placed, p)
			}
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	var missing error
	m.Tiers, missing = Arrange(tiers, placed)
	return m, errors.Join(append(errs, missing)...)
}

// hold adds an endpoint, if no other has one of its addresses.
func (m *Model) hold(e *Endpoint, r api.Resource, holders map[string]string) error {
	for _, a := range e.Addresses {
		if other := holders[a.String()]; other != "" {
			return fmt.Errorf("%s: spec.ipNetworks: %w: %s is WorkloadEndpoint %s's already; delete the one whose pod is gone", r, api.ErrInvalid, a, other)
		}
	}
	for _, a := range e.Addresses {
		holders[a.String()] = e.ID
	}
	m.Endpoints[e.ID] = e
	return nil
}

// Placed is a policy with its place among others; no Policy: there is nothing to place.
type Placed struct {
	*Policy
	Tier  string
	Order float64 // the lower comes first; +Inf: last
	Name  string  // decides between policies of the same order, and ID between those of the same name
}

// Compare orders policies of a tier.
func (p Placed) Compare(other Placed) int {
	return cmp.Or(cmp.Compare(p.Order, other.Order), strings.Compare(p.Name, other.Name), strings.Compare(p.ID, other.ID))
}

// Arrange puts policies into their tiers, and those into their order. A policy whose tier is not there is left out, and the
// error names it.
func Arrange(tiers map[string]api.Tier, policies []Placed) ([]Tier, error) {
	tiers = maps.Clone(tiers)
	members := make(map[string][]Placed)
	var errs []error
	for _, p := range policies {
		if _, ok := tiers[p.Tier]; !ok {
			builtin, ok := api.BuiltinTier(p.Tier)
			if !ok {
				errs = append(errs, fmt.Errorf("%s: spec.tier: %w: there is no Tier %s; apply one, or leave the tier out", p.ID, api.ErrInvalid, p.Tier))
				continue
			}
			if tiers == nil {
				tiers = make(map[string]api.Tier)
			}
			tiers[p.Tier] = builtin
		}
		members[p.Tier] = append(members[p.Tier], p)
	}
	names := slices.SortedFunc(maps.Keys(tiers), func(a, b string) int {
		return cmp.Or(cmp.Compare(api.OrderOf(tiers[a].Order), api.OrderOf(tiers[b].Order)), strings.Compare(a, b))
	})
	var all []Tier
	for _, name := range names {
		t := Tier{Name: name, Default: Deny}
		if tiers[name].DefaultAction == "Pass" {
			t.Default = Pass
		}
		for _, p := range slices.SortedFunc(slices.Values(members[name]), Placed.Compare) {
			t.Policies = append(t.Policies, p.Policy)
		}
		all = append(all, t)
	}
	return all, errors.Join(errs...)
}

// Context is what endpoints and sets have their labels from besides themselves.
type Context struct {
	namespaces, serviceAccounts, profiles map[string]map[string]string // by full name
}

// NewContext makes an empty context.
func NewContext() *Context {
	return &Context{make(map[string]map[string]string), make(map[string]map[string]string), make(map[string]map[string]string)}
}

// Add takes the labels that a Namespace, a ServiceAccount or a Profile gives, in place of those it gave before. It tells
// whether r is one of these: endpoints and sets are then to be converted again.
func (c *Context) Add(r api.Resource) bool {
	switch spec := r.Spec.(type) {
	case *api.Namespace:
		c.namespaces[r.Metadata.Name] = r.Metadata.Labels
	case *api.ServiceAccount:
		c.serviceAccounts[r.Metadata.FullName()] = r.Metadata.Labels
	case *api.Profile:
		c.profiles[r.Metadata.Name] = spec.LabelsToApply
	default:
		return false
	}
	return true
}

// labels are those of something in a namespace, or in none.
func (c *Context) labels(meta api.Metadata, profiles ...string) map[string]string {
	labels := make(map[string]string)
	for _, p := range slices.Backward(profiles) {
		maps.Copy(labels, c.profiles[p])
	}
	for key, value := range meta.Labels {
		if !strings.HasPrefix(key, namespacePrefix) && !strings.HasPrefix(key, serviceAccountPrefix) && !strings.HasPrefix(key, api.DockerNetworkLabel) {
			labels[key] = value
		}
	}
	for _, key := range []string{labelNamespace, labelOrchestrator, labelServiceAccount} {
		delete(labels, key) // nobody says of himself where he is
	}
	if meta.Namespace == "" {
		return labels
	}
	addPrefixed(labels, namespacePrefix, c.namespaces[meta.Namespace])
	labels[labelNamespace] = meta.Namespace
	labels[namespacePrefix+"projectcalico.org/name"] = meta.Namespace
	labels[namespacePrefix+"kubernetes.io/metadata.name"] = meta.Namespace
	return labels
}

func addPrefixed(labels map[string]string, prefix string, more map[string]string) {
	for key, value := range more {
		labels[prefix+key] = value
	}
}

// FromEndpoint converts a WorkloadEndpoint. The error names it.
func FromEndpoint(r api.Resource, c *Context) (*Endpoint, error) {
	spec, ok := r.Spec.(*api.WorkloadEndpoint)
	if !ok {
		return nil, wrongKind(r, "WorkloadEndpoint")
	}
	e := &Endpoint{ID: r.Metadata.FullName(), Labels: c.labels(r.Metadata, spec.Profiles...), Profiles: slices.Clone(spec.Profiles)}
	e.Labels[labelOrchestrator] = spec.Orchestrator
	if name := spec.ServiceAccount; name != "" {
		addPrefixed(e.Labels, serviceAccountPrefix, c.serviceAccounts[r.Metadata.Namespace+"/"+name])
		e.Labels[labelServiceAccount] = name
		e.Labels[serviceAccountPrefix+"projectcalico.org/name"] = name
	}
	for _, n := range spec.IPNetworks {
		e.Addresses = append(e.Addresses, n.Addr())
	}
	for _, p := range spec.Ports {
		e.Ports = append(e.Ports, NamedPort{Name: p.Name, Protocol: uint8(p.Protocol), Port: p.Port})
	}
	return e, nil
}

// FromSet converts a NetworkSet or a GlobalNetworkSet. The error names it.
func FromSet(r api.Resource, c *Context) (*Set, error) {
	spec, ok := r.Spec.(*api.NetworkSet)
	if !ok {
		return nil, wrongKind(r, "NetworkSet")
	}
	s := &Set{ID: r.String(), Labels: c.labels(r.Metadata)}
	for _, n := range spec.Nets {
		s.Nets = append(s.Nets, n.Prefix)
	}
	return s, nil
}

// FromProfile converts a Profile's rules. The error names it.
func FromProfile(r api.Resource) (*Profile, error) {
	spec, ok := r.Spec.(*api.Profile)
	if !ok {
		return nil, wrongKind(r, "Profile")
	}
	ingress, err := calicoRules("ingress", spec.Ingress, "")
	egress, err1 := calicoRules("egress", spec.Egress, "")
	if err := errors.Join(err, err1); err != nil {
		return nil, fmt.Errorf("%s: spec.%w", r, err)
	}
	return &Profile{ID: r.String(), Ingress: ingress, Egress: egress}, nil
}

func wrongKind(r api.Resource, want string) error {
	return fmt.Errorf("%s: %w: it is no %s", r, api.ErrInvalid, want)
}

// FromPolicy converts a policy of any kind; of another resource it returns none. The error names the resource and the field.
func FromPolicy(r api.Resource) (Placed, error) {
	p := Placed{Name: r.Metadata.Name}
	var err error
	switch spec := r.Spec.(type) {
	case *api.NetworkPolicy:
		p.Policy, p.Tier, p.Order = fromNetworkPolicy(spec, r.Metadata.Namespace), api.DefaultTier, orderKubernetes
	case *api.CalicoNetworkPolicy:
		p.Tier, p.Order = spec.Tier, api.OrderOf(spec.Order)
		p.Policy, err = fromOrdered(spec.OrderedPolicy, r.Metadata.Namespace)
	case *api.GlobalNetworkPolicy:
		p.Tier, p.Order = spec.Tier, api.OrderOf(spec.Order)
		p.Policy, err = fromOrdered(spec.OrderedPolicy, "")
		if err == nil && spec.NamespaceSelector != "" {
			var s selector.Selector
			s, err = within("namespaceSelector", spec.NamespaceSelector, namespacePrefix, labelNamespace)
			p.Selector = selector.And(p.Selector, s)
		}
	case *api.AdminNetworkPolicy:
		p.Tier, p.Order = api.AdminTier, float64(*spec.Priority)
		p.Policy, err = fromAdmin(spec.Subject, spec.Ingress, spec.Egress)
	case *api.BaselineAdminNetworkPolicy:
		p.Tier, p.Order = api.BaselineTier, orderBaseline
		p.Policy, err = fromAdmin(spec.Subject, spec.Ingress, spec.Egress)
	case *api.ClusterNetworkPolicy:
		p.Tier, p.Order = api.AdminTier, float64(*spec.Priority)
		if spec.Tier == "Baseline" {
			p.Tier = api.BaselineTier
		}
		p.Policy, err = fromAdmin(spec.Subject, spec.Ingress, spec.Egress)
	default:
		return Placed{}, nil
	}
	if err != nil {
		return Placed{}, fmt.Errorf("%s: spec.%w", r, err)
	}
	p.ID = r.String()
	return p, nil
}

// Kubernetes's NetworkPolicy.

func fromNetworkPolicy(spec *api.NetworkPolicy, namespace string) *Policy {
	p := &Policy{Selector: selector.And(inNamespace(namespace), labelSelector(spec.PodSelector, ""))}
	if slices.Contains(spec.PolicyTypes, "Ingress") {
		p.Ingress = &Rules{}
		for i, r := range spec.Ingress {
			p.Ingress.add(Ingress, Allow, fmt.Sprintf("ingress[%d]", i), kubernetesPeers("from", r.From, namespace), kubernetesPorts(r.Ports))
		}
	}
	if slices.Contains(spec.PolicyTypes, "Egress") {
		p.Egress = &Rules{}
		for i, r := range spec.Egress {
			p.Egress.add(Egress, Allow, fmt.Sprintf("egress[%d]", i), kubernetesPeers("to", r.To, namespace), kubernetesPorts(r.Ports))
		}
	}
	return p
}

// placedPeer is a peer and what it is called within its rule.
type placedPeer struct {
	Peer
	place string
}

// protocolPorts are ports of one protocol, or names of any.
type protocolPorts struct {
	protocol *uint8
	ports    []Ports // nil: all
}

// add adds the rules that one with several peers and protocols stands for.
func (rules *Rules) add(d Direction, action Action, place string, peers []placedPeer, ports []protocolPorts) {
	for _, peer := range peers {
		for _, pp := range ports {
			r := Rule{Action: action, Protocol: pp.protocol, Place: place + peer.place}
			if d == Ingress {
				r.Source = peer.Peer
			} else {
				r.Destination = peer.Peer
			}
			r.Destination.Ports = pp.ports
			rules.Rules = append(rules.Rules, r)
		}
	}
}

// kubernetesPorts are the ports of each protocol: one rule for each.
func kubernetesPorts(ports []api.NetworkPolicyPort) []protocolPorts {
	if len(ports) == 0 {
		return []protocolPorts{{}}
	}
	var matches []api.PortMatch
	for _, p := range ports {
		m := api.PortMatch{Protocol: p.Protocol, Ports: api.Ports{First: 0, Last: math.MaxUint16}}
		if p.Port != nil {
			m.Ports = *p.Port
		}
		if p.EndPort != nil {
			m.Ports.Last = uint16(*p.EndPort)
		}
		matches = append(matches, m)
	}
	return portsByProtocol(matches)
}

// portsByProtocol gathers what is of one protocol.
func portsByProtocol(matches []api.PortMatch) []protocolPorts {
	var all []protocolPorts
	for _, m := range matches {
		i := slices.IndexFunc(all, func(p protocolPorts) bool {
			return p.protocol == nil && m.Protocol == nil || p.protocol != nil && m.Protocol != nil && *p.protocol == uint8(*m.Protocol)
		})
		if i < 0 {
			i = len(all)
			all = append(all, protocolPorts{protocol: protocolNumber(m.Protocol), ports: []Ports{}})
		}
		switch {
		case all[i].ports == nil:
		case m.Ports.First == 0 && m.Ports.Last == math.MaxUint16 && m.Ports.Name == "":
			all[i].ports = nil
		default:
			all[i].ports = append(all[i].ports, Ports(m.Ports))
		}
	}
	return all
}

func protocolNumber(p *api.Protocol) *uint8 {
	if p == nil {
		return nil
	}
	n := uint8(*p)
	return &n
}

// kubernetesPeers are the peers of a rule. Blocks of addresses without exceptions are one peer: addresses are not told apart
// by them.
func kubernetesPeers(key string, peers []api.NetworkPolicyPeer, namespace string) []placedPeer {
	if len(peers) == 0 {
		return []placedPeer{{}}
	}
	var all []placedPeer
	blocks := -1
	for i, p := range peers {
		place := fmt.Sprintf(".%s[%d]", key, i)
		switch {
		case p.IPBlock == nil:
			s := podsOf(p.NamespaceSelector, p.PodSelector, namespace)
			all = append(all, placedPeer{Peer{Selector: &s}, place})
		case len(p.IPBlock.Except) > 0:
			except := Peer{Nets: prefixes([]api.Net{p.IPBlock.CIDR}), NotNets: prefixes(p.IPBlock.Except)}
			all = append(all, placedPeer{except, place})
		case blocks < 0:
			blocks = len(all)
			all = append(all, placedPeer{Peer{Nets: prefixes([]api.Net{p.IPBlock.CIDR})}, place})
		default:
			all[blocks].Nets = append(all[blocks].Nets, p.IPBlock.CIDR.Prefix)
			all[blocks].place = "." + key
		}
	}
	return all
}

// podsOf selects pods by Kubernetes's selectors; of nil ones the namespaces' means the one given, if any, and the pods' all.
func podsOf(namespaces, pods *api.LabelSelector, namespace string) selector.Selector {
	all := []selector.Selector{selector.Has(labelOrchestrator)} // sets have labels too
	switch {
	case namespaces != nil:
		all = append(all, labelSelector(*namespaces, namespacePrefix))
	case namespace != "":
		all = append(all, inNamespace(namespace))
	}
	if pods != nil {
		all = append(all, labelSelector(*pods, ""))
	}
	return selector.And(all...)
}

func inNamespace(namespace string) selector.Selector { return selector.In(labelNamespace, namespace) }

// labelSelector is Kubernetes's selector in Calico's language, over labels with a prefix.
func labelSelector(s api.LabelSelector, prefix string) selector.Selector {
	var all []selector.Selector
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		all = append(all, selector.In(prefix+key, s.MatchLabels[key]))
	}
	for _, r := range s.MatchExpressions {
		key := prefix + r.Key
		switch r.Operator {
		case "In":
			all = append(all, selector.In(key, r.Values...))
		case "NotIn":
			all = append(all, selector.NotIn(key, r.Values...))
		case "Exists":
			all = append(all, selector.Has(key))
		default: // DoesNotExist
			all = append(all, selector.Not(selector.Has(key)))
		}
	}
	return selector.And(all...)
}

func prefixes(nets []api.Net) []netip.Prefix {
	var all []netip.Prefix
	for _, n := range nets {
		all = append(all, n.Prefix)
	}
	return all
}

// Calico's policies.

// fromOrdered converts a policy of a namespace, "": of all.
func fromOrdered(spec api.OrderedPolicy, namespace string) (*Policy, error) {
	s, err := parse("selector", spec.Selector)
	if err != nil {
		return nil, err
	}
	if spec.ServiceAccountSelector != "" {
		accounts, err := within("serviceAccountSelector", spec.ServiceAccountSelector, serviceAccountPrefix, labelServiceAccount)
		if err != nil {
			return nil, err
		}
		s = selector.And(s, accounts)
	}
	if namespace != "" {
		s = selector.And(inNamespace(namespace), s)
	}
	p := &Policy{Selector: s}
	for _, d := range []struct {
		name  string
		rules []api.Rule
		into  **Rules
	}{{"Ingress", spec.Ingress, &p.Ingress}, {"Egress", spec.Egress, &p.Egress}} {
		if !slices.Contains(spec.Types, d.name) {
			continue
		}
		rules, err := calicoRules(strings.ToLower(d.name), d.rules, namespace)
		if err != nil {
			return nil, err
		}
		*d.into = &Rules{rules}
	}
	return p, nil
}

func parse(path, text string) (selector.Selector, error) {
	s, err := selector.Parse(text)
	if err != nil {
		return s, fmt.Errorf("%s: %w: %.80q: %w", path, api.ErrInvalid, text, err)
	}
	return s, nil
}

// within parses a selector over the labels of namespaces, or of service accounts.
func within(path, text, prefix, member string) (selector.Selector, error) {
	s, err := parse(path, text)
	return s.Within(prefix, member), err
}

var actions = map[string]Action{"Allow": Allow, "Accept": Allow, "Deny": Deny, "Pass": Pass, "Log": Log}

func action(place, name string) (Action, error) {
	a, ok := actions[name]
	if !ok {
		return 0, fmt.Errorf("%s.action: %w: %.80q: Allow, Deny, Pass or Log", place, api.ErrInvalid, name)
	}
	return a, nil
}

func calicoRules(list string, rules []api.Rule, namespace string) ([]Rule, error) {
	var all []Rule
	for i, r := range rules {
		place := fmt.Sprintf("%s[%d]", list, i)
		a, err := action(place, r.Action)
		if err != nil {
			return nil, err
		}
		c := Rule{Action: a, IPVersion: r.IPVersion, Protocol: protocolNumber(r.Protocol), NotProtocol: protocolNumber(r.NotProtocol), ICMP: icmp(r.ICMP), NotICMP: icmp(r.NotICMP), Place: place}
		if c.Source, err = calicoPeer(place+".source", r.Source, namespace); err != nil {
			return nil, err
		}
		if c.Destination, err = calicoPeer(place+".destination", r.Destination, namespace); err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func icmp(m *api.ICMPMatch) *ICMP {
	if m == nil {
		return nil
	}
	match := &ICMP{Type: uint8(*m.Type)}
	if m.Code != nil {
		code := uint8(*m.Code)
		match.Code = &code
	}
	return match
}

// calicoPeer converts one end of a rule. As soon as a rule of a namespace's policy selects by labels at all, also by what is
// not to match, it selects only what is in that namespace, or in those that it names.
func calicoPeer(place string, e api.EntityRule, namespace string) (Peer, error) {
	p := Peer{Nets: prefixes(e.Nets), NotNets: prefixes(e.NotNets), Ports: portsOf(e.Ports), NotPorts: portsOf(e.NotPorts)}
	var all []selector.Selector
	selects := false
	switch {
	case e.NamespaceSelector != "":
		s, err := within(place+".namespaceSelector", e.NamespaceSelector, namespacePrefix, labelNamespace)
		if err != nil {
			return p, err
		}
		all, selects = append(all, s), true
	case namespace != "":
		all = append(all, inNamespace(namespace))
	}
	if a := e.ServiceAccounts; a != nil {
		selects = true
		if a.Selector != "" {
			s, err := within(place+".serviceAccounts.selector", a.Selector, serviceAccountPrefix, labelServiceAccount)
			if err != nil {
				return p, err
			}
			all = append(all, s)
		}
		if len(a.Names) > 0 {
			all = append(all, selector.In(labelServiceAccount, a.Names...))
		}
	}
	if e.Selector != "" {
		s, err := parse(place+".selector", e.Selector)
		if err != nil {
			return p, err
		}
		all, selects = append(all, s), true
	}
	if e.NotSelector != "" {
		s, err := parse(place+".notSelector", e.NotSelector)
		if err != nil {
			return p, err
		}
		p.NotSelector = &s
		selects = selects || namespace != ""
	}
	if selects {
		s := selector.And(all...)
		p.Selector = &s
	}
	return p, nil
}

func portsOf(from []api.Ports) []Ports {
	var all []Ports
	for _, p := range from {
		all = append(all, Ports(p))
	}
	return all
}

// The network policy API's policies.

func fromAdmin(subject api.PolicySubject, ingress, egress []api.AdminRule) (*Policy, error) {
	p := &Policy{Selector: adminPods(subject.Namespaces, subject.Pods)}
	for _, d := range []struct {
		direction Direction
		list, key string
		rules     []api.AdminRule
		into      **Rules
	}{{Ingress, "ingress", "from", ingress, &p.Ingress}, {Egress, "egress", "to", egress, &p.Egress}} {
		for i, r := range d.rules {
			place := fmt.Sprintf("%s[%d]", d.list, i)
			a, err := action(place, r.Action)
			if err != nil {
				return nil, err
			}
			peers := r.From
			if d.direction == Egress {
				peers = r.To
			}
			ports := portsByProtocol(r.PortMatches())
			if len(ports) == 0 {
				ports = []protocolPorts{{}}
			}
			if *d.into == nil {
				*d.into = &Rules{}
			}
			(*d.into).add(d.direction, a, place, adminPeers(d.key, peers), ports)
		}
	}
	return p, nil
}

func adminPeers(key string, peers []api.AdminPeer) []placedPeer {
	var all []placedPeer
	for i, p := range peers {
		peer := placedPeer{place: fmt.Sprintf(".%s[%d]", key, i)}
		if len(p.Networks) > 0 {
			peer.Nets = prefixes(p.Networks)
		} else {
			s := adminPods(p.Namespaces, p.Pods)
			peer.Selector = &s
		}
		all = append(all, peer)
	}
	return all
}

func adminPods(namespaces *api.LabelSelector, pods *api.PodsSelector) selector.Selector {
	if pods != nil {
		return podsOf(&pods.NamespaceSelector, &pods.PodSelector, "")
	}
	return podsOf(namespaces, nil, "")
}
