// Package policy turns the resources that people write into what the dataplane looks up: identities of addresses, policy
// ids of pods and flattened tables, in which a verdict takes the same time whatever the number of rules. Evaluate says the
// same without compiling anything: it is what the tables are held against.
package policy

import (
	"net/netip"

	"github.com/caracal-net/caracal/api/selector"
)

// Model is everything that decides, in one form whoever's kind it was written as.
type Model struct {
	Tiers     []Tier              // in their order of evaluation
	Profiles  map[string]*Profile // by name
	Endpoints map[string]*Endpoint
	Sets      map[string]*Set
}

// Endpoint is a pod of any node, or an interface of one.
type Endpoint struct {
	ID        string            // unique in the cluster
	Addresses []netip.Addr      // at most one holder of each
	Labels    map[string]string // its own, and those that its namespace and service account give it (pcns.*, pcsa.*)
	Ports     []NamedPort
	Profiles  []string // what decides when no tier does, in order; none: Allow
}

// NamedPort is a name for a port of an endpoint.
type NamedPort struct {
	Name     string
	Protocol uint8 // IANA number
	Port     uint16
}

// Set is a network set: addresses that have labels.
type Set struct {
	ID     string
	Labels map[string]string
	Nets   []netip.Prefix // masked
}

// Tier is a list of policies. An endpoint that none of them selects, for a direction, goes on to the next.
type Tier struct {
	Name     string
	Policies []*Policy // in their order of evaluation
	Default  Action    // what befalls what a policy selects and no rule matches: Deny or Pass
}

// Policy is an ordered list of rules for each direction, and whom they are for.
type Policy struct {
	ID              string            // kind, namespace and name: "NetworkPolicy default/web"
	Selector        selector.Selector // over an endpoint's labels
	Ingress, Egress *Rules            // nil: it is not about that direction
}

// Rules are those of a policy for one direction.
type Rules struct{ Rules []Rule }

// Profile decides for endpoints that name it, when no tier does.
type Profile struct {
	ID              string
	Ingress, Egress []Rule
}

// Direction is seen from the endpoint that a policy selects.
type Direction uint8

// The directions.
const (
	Ingress Direction = iota
	Egress
)

// Action is what a rule does.
type Action uint8

// The actions. Log is noted and goes on with the next rule. Pass leaves the tier; in the last one it leads to the profiles.
const (
	Allow Action = iota + 1
	Deny
	Pass
	Log
)

// Rule matches packets that open a flow: all of its conditions hold.
type Rule struct {
	Action      Action
	IPVersion   int    // 4, 6; 0: both
	Protocol    *uint8 // IANA number
	NotProtocol *uint8
	ICMP        *ICMP // with Protocol ICMP or ICMPv6
	NotICMP     *ICMP
	Source      Peer
	Destination Peer
	Place       string // where the resource says it: "ingress[0].from[1]"; for people
}

// ICMP is a type, and perhaps a code. Of replies nothing is asked: they belong to the flow that their request opened.
type ICMP struct {
	Type uint8
	Code *uint8
}

// Peer is what a rule asks of one end of a packet; the zero value nothing. Of an address that is no endpoint's and in no
// set no selector is true, and so every "not" of one.
type Peer struct {
	Selector    *selector.Selector // the address is that of an endpoint, or in a set, that this selects
	NotSelector *selector.Selector // it is not
	Nets        []netip.Prefix     // it is in one of them; nil: any. Masked
	NotNets     []netip.Prefix     // it is in none
	Ports       []Ports            // its port is one of these; nil: any
	NotPorts    []Ports            // it is none of them
}

// Ports are a range, or a name, that stands for what the endpoint at that end calls so, if the protocol is the packet's.
type Ports struct {
	First, Last uint16 // both included
	Name        string // "": the range
}

// Packet is the first of a flow. Ports are those of TCP, UDP and SCTP, in host order.
type Packet struct {
	Protocol               uint8
	Source, Destination    netip.Addr // unmapped
	SourcePort, TargetPort uint16
	ICMPType, ICMPCode     uint8
}

// RuleRef names a rule, or why none was needed.
type RuleRef struct {
	Tier   string // "": of a profile
	Policy string // Policy.ID, or Profile.ID
	Index  int    // in its direction's list from 0; NoRule: the end of the tier or of the profiles
}

// NoRule is the index of what is at the end of a list.
const NoRule = -1
