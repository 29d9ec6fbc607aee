package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// DefaultASNumber is everybody's unless something says otherwise, as in Calico.
const DefaultASNumber = 64512

// ASNumber is an autonomous system, 4 bytes (RFC 6793), written as a number or as "1.10" (RFC 5396).
type ASNumber uint32

// UnmarshalJSON reads a number, "64512" or "1.10".
func (n *ASNumber) UnmarshalJSON(b []byte) error {
	s := strings.Trim(string(b), `"`)
	high, low, dotted := strings.Cut(s, ".")
	if !dotted {
		high, low = "0", s
	}
	bits := 32
	if dotted {
		bits = 16
	}
	h, err := strconv.ParseUint(high, 10, 16)
	l, err1 := strconv.ParseUint(low, 10, bits)
	if err := errors.Join(err, err1); err != nil || h<<16|l == 0 {
		return fmt.Errorf("AS number %s: not between 1 and 4294967295", b)
	}
	*n = ASNumber(h<<16 | l)
	return nil
}

// Node is one host of the cluster.
type Node struct {
	BGP       *NodeBGP      `json:"bgp,omitempty"`
	Addresses []NodeAddress `json:"addresses,omitempty"`
}

// NodeBGP is what a node is to its peers.
type NodeBGP struct {
	ASNumber    ASNumber     `json:"asNumber,omitempty"`   // 0: the BGPConfiguration's
	IPv4Address netip.Prefix `json:"ipv4Address,omitzero"` // with its network's length, "10.0.0.1/24"
	IPv6Address netip.Prefix `json:"ipv6Address,omitzero"` //
	ClusterID   string       `json:"routeReflectorClusterID,omitempty"`
}

// NodeAddress is an address that reaches a node.
type NodeAddress struct {
	Address string `json:"address"`
	Type    string `json:"type,omitempty"`
}

// Complete validates the node.
func (n *Node) Complete(string) error {
	if n.BGP == nil {
		return nil
	}
	for _, a := range []struct {
		key string
		p   netip.Prefix
		v6  bool
	}{{"bgp.ipv4Address", n.BGP.IPv4Address, false}, {"bgp.ipv6Address", n.BGP.IPv6Address, true}} {
		if a.p.IsValid() && (a.p.Addr().Is6() != a.v6 || a.p.Addr().Is4In6() || a.p.Addr().IsUnspecified() || a.p.Addr().IsMulticast()) {
			return fmt.Errorf("%w: %s %s is not a host's address of that family", ErrInvalid, a.key, a.p)
		}
	}
	if n.BGP.ClusterID != "" {
		if id, err := netip.ParseAddr(n.BGP.ClusterID); err != nil || !id.Is4() {
			return fmt.Errorf("%w: bgp.routeReflectorClusterID %q: write it like an IPv4 address", ErrInvalid, n.BGP.ClusterID)
		}
	}
	return nil
}

// BGPConfiguration is the cluster's, called "default", or one node's, called "node.NAME".
type BGPConfiguration struct {
	LogSeverityScreen      string   `json:"logSeverityScreen,omitempty"` // read, of no effect
	NodeToNodeMesh         *bool    `json:"nodeToNodeMeshEnabled,omitempty"`
	ASNumber               ASNumber `json:"asNumber,omitempty"`
	ListenPort             int      `json:"listenPort,omitempty"`             // 0: 179
	NodeMeshMaxRestartTime Duration `json:"nodeMeshMaxRestartTime,omitempty"` // 0: 120 s
	NodeMeshPassword       *Secret  `json:"nodeMeshPassword,omitempty"`

	Communities          []BGPCommunity           `json:"communities,omitempty"`
	PrefixAdvertisements []BGPPrefixAdvertisement `json:"prefixAdvertisements,omitempty"`
}

// Mesh tells whether every node is every other node's peer.
func (c BGPConfiguration) Mesh() bool { return c.NodeToNodeMesh == nil || *c.NodeToNodeMesh }

// Complete validates the configuration and fills in the AS number.
func (c *BGPConfiguration) Complete(name string) error {
	if name != "default" && !strings.HasPrefix(name, "node.") {
		return fmt.Errorf("%w: it is called \"default\" or \"node.NAME\"", ErrInvalid)
	}
	if c.ASNumber == 0 {
		c.ASNumber = DefaultASNumber
	}
	if c.ListenPort < 0 || c.ListenPort > 65535 {
		return fmt.Errorf("%w: listenPort %d", ErrInvalid, c.ListenPort)
	}
	if _, err := c.Advertised(); err != nil {
		return err
	}
	return c.NodeMeshPassword.check("nodeMeshPassword")
}

// Duration is a time as Go writes it: "2m0s".
type Duration time.Duration

// MarshalJSON writes the duration as text.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// UnmarshalJSON reads the duration's text.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("duration %s: write it like \"90s\"", b)
	}
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return fmt.Errorf("duration %q: write it like \"90s\"", s)
	}
	*d = Duration(v)
	return nil
}

// Secret is a password: in a file on each node, or plainly here. Calico's reference to a Kubernetes secret needs Kubernetes.
type Secret struct {
	File         string `json:"file,omitempty"`
	Value        string `json:"value,omitempty"`
	SecretKeyRef *struct {
		Name string `json:"name"`
		Key  string `json:"key"`
	} `json:"secretKeyRef,omitempty"`
}

func (s *Secret) check(key string) error {
	switch {
	case s == nil:
		return nil
	case s.SecretKeyRef != nil:
		return fmt.Errorf("%s.secretKeyRef: %w outside Kubernetes; write %s.file, a path on the nodes", key, ErrUnsupported, key)
	case s.File == "" == (s.Value == ""):
		return fmt.Errorf("%w: %s wants either file or value", ErrInvalid, key)
	case len(s.Value) > 80:
		return fmt.Errorf("%w: %s.value is longer than the 80 bytes that the kernel takes", ErrInvalid, key)
	}
	return nil
}

// BGPPeer are peers beside the mesh: a router, or nodes of the cluster, which then have the nodes that peer with them as
// their peers too.
type BGPPeer struct {
	Node                string   `json:"node,omitempty"`         // which node has the peers; "" and no selector: every node
	NodeSelector        string   `json:"nodeSelector,omitempty"` // which nodes have them, in place of Node
	PeerIP              string   `json:"peerIP,omitempty"`       // "10.0.0.254" or "10.0.0.254:1790", "[2001:db8::1]:1790"
	ASNumber            ASNumber `json:"asNumber,omitempty"`
	PeerSelector        string   `json:"peerSelector,omitempty"` // which nodes the peers are, in place of PeerIP and ASNumber
	Filters             []string `json:"filters,omitempty"`      // BGPFilters, in the order in which they are asked
	Password            *Secret  `json:"password,omitempty"`
	SourceAddress       string   `json:"sourceAddress,omitempty"` // UseNodeIP (default) or None
	MaxRestartTime      Duration `json:"maxRestartTime,omitempty"`
	KeepOriginalNextHop bool     `json:"keepOriginalNextHop,omitempty"`
	TTLSecurity         int      `json:"ttlSecurity,omitempty"`  // hops (RFC 5082)
	Communities         []string `json:"communities,omitempty"`  // ours: added to what is announced
	AllowDefault        bool     `json:"allowDefault,omitempty"` // ours: take 0.0.0.0/0 and ::/0 from it
}

// Global tells whether every node has the peers.
func (p BGPPeer) Global() bool { return p.Node == "" && p.NodeSelector == "" }

// Has tells whether a node with that name and those labels has the peers.
func (p BGPPeer) Has(node string, labels map[string]string) bool {
	if p.Node != "" {
		return p.Node == node
	}
	return Selects(p.NodeSelector, labels)
}

// Peer is the peer's address; its port is 0 when none is written.
func (p BGPPeer) Peer() (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(p.PeerIP); err == nil {
		return netip.AddrPortFrom(a, 0), nil
	}
	a, err := netip.ParseAddrPort(p.PeerIP)
	if err != nil {
		return a, fmt.Errorf("%w: peerIP %q: neither an address nor address:port", ErrInvalid, p.PeerIP)
	}
	return a, nil
}

// Complete validates the peer.
func (p *BGPPeer) Complete(string) error {
	switch {
	case p.NodeSelector != "" && p.Node != "":
		return fmt.Errorf("%w: node and nodeSelector exclude each other", ErrInvalid)
	case p.PeerSelector != "" && (p.PeerIP != "" || p.ASNumber != 0):
		return fmt.Errorf("%w: peerSelector excludes peerIP and asNumber: the nodes that it selects say what they are", ErrInvalid)
	case p.PeerSelector == "" && p.PeerIP == "":
		return fmt.Errorf("%w: neither peerIP nor peerSelector says who the peer is", ErrInvalid)
	case p.PeerSelector == "" && p.ASNumber == 0:
		return fmt.Errorf("%w: asNumber is missing", ErrInvalid)
	case p.TTLSecurity < 0 || p.TTLSecurity > 254:
		return fmt.Errorf("%w: ttlSecurity %d: not between 1 and 254", ErrInvalid, p.TTLSecurity)
	}
	if p.PeerIP != "" {
		a, err := p.Peer()
		if err != nil {
			return err
		}
		if a.Addr().IsUnspecified() || a.Addr().IsMulticast() || a.Addr().IsLoopback() {
			return fmt.Errorf("%w: peerIP %s is no peer's address", ErrInvalid, a.Addr())
		}
	}
	if err := errors.Join(checkSelector("nodeSelector", p.NodeSelector), checkSelector("peerSelector", p.PeerSelector)); err != nil {
		return err
	}
	for _, c := range p.Communities {
		if err := checkCommunity("communities:", c); err != nil {
			return err
		}
	}
	switch p.SourceAddress {
	case "":
		p.SourceAddress = "UseNodeIP"
	case "UseNodeIP", "None":
	default:
		return fmt.Errorf("%w: sourceAddress %q: UseNodeIP or None", ErrInvalid, p.SourceAddress)
	}
	return p.Password.check("password")
}
