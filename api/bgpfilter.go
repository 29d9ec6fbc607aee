package api

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// BGPFilter says which routes are told to the peers that name it, and which are taken from them. The first rule that matches
// decides; what none matches is accepted.
type BGPFilter struct {
	ExportV4 []BGPFilterRule `json:"exportV4,omitempty"`
	ImportV4 []BGPFilterRule `json:"importV4,omitempty"`
	ExportV6 []BGPFilterRule `json:"exportV6,omitempty"`
	ImportV6 []BGPFilterRule `json:"importV6,omitempty"`
}

// BGPFilterRule matches a route by all that it says.
type BGPFilterRule struct {
	CIDR          netip.Prefix         `json:"cidr,omitzero"`
	MatchOperator string               `json:"matchOperator,omitempty"` // Equal, NotEqual, In or NotIn the CIDR
	PrefixLength  *BGPPrefixLength     `json:"prefixLength,omitempty"`  // with In and NotIn
	Source        string               `json:"source,omitempty"`        // RemotePeers: told by a peer, not our own
	PeerType      string               `json:"peerType,omitempty"`      // eBGP or iBGP: what the peer is that names the filter
	Communities   *BGPCommunityMatch   `json:"communities,omitempty"`
	ASPathPrefix  []ASNumber           `json:"asPathPrefix,omitempty"` // what its AS path begins with
	Action        string               `json:"action"`                 // Accept or Reject
	Operations    []BGPFilterOperation `json:"operations,omitempty"`   // on what is accepted
	Interface     string               `json:"interface,omitempty"`    // refused
	Priority      *int                 `json:"priority,omitempty"`     // refused
}

// BGPPrefixLength limits the lengths of masks, both included; nil: the CIDR's own, and all of an address. A shorter one than
// the CIDR's own is the CIDR's own.
type BGPPrefixLength struct {
	Min *int `json:"min,omitempty"`
	Max *int `json:"max,omitempty"`
}

// BGPCommunityMatch is one community that a route has.
type BGPCommunityMatch struct {
	Values []string `json:"values"`
}

// BGPFilterOperation changes a route: it is one of its fields.
type BGPFilterOperation struct {
	AddCommunity  *BGPAddCommunity  `json:"addCommunity,omitempty"`
	PrependASPath *BGPPrependASPath `json:"prependASPath,omitempty"`
	SetPriority   *BGPSetPriority   `json:"setPriority,omitempty"` // refused
}

// BGPAddCommunity is a community to add.
type BGPAddCommunity struct {
	Value string `json:"value"`
}

// BGPPrependASPath are ASs to put before the AS path, as they will stand there.
type BGPPrependASPath struct {
	Prefix []ASNumber `json:"prefix"`
}

// BGPSetPriority is Calico's; routes have no priority here.
type BGPSetPriority struct {
	Value int `json:"value"`
}

// Complete validates the filter.
func (f *BGPFilter) Complete(string) error {
	for _, list := range []struct {
		key   string
		rules []BGPFilterRule
		v6    bool
	}{{"exportV4", f.ExportV4, false}, {"importV4", f.ImportV4, false}, {"exportV6", f.ExportV6, true}, {"importV6", f.ImportV6, true}} {
		for i, r := range list.rules {
			if err := r.check(list.v6); err != nil {
				return fmt.Errorf("%s[%d]: %w", list.key, i, err)
			}
		}
	}
	return nil
}

func (r BGPFilterRule) check(v6 bool) error {
	switch {
	case r.Action != "Accept" && r.Action != "Reject":
		return fmt.Errorf("%w: action %q: Accept or Reject", ErrInvalid, r.Action)
	case r.Interface != "":
		return fmt.Errorf("interface: %w; match the route by its cidr", ErrUnsupported)
	case r.Priority != nil:
		return fmt.Errorf("priority: %w: routes have none here", ErrUnsupported)
	case r.Source != "" && r.Source != "RemotePeers":
		return fmt.Errorf("%w: source %q: RemotePeers, or none for all", ErrInvalid, r.Source)
	case r.PeerType != "" && r.PeerType != "eBGP" && r.PeerType != "iBGP":
		return fmt.Errorf("%w: peerType %q: eBGP, iBGP, or none for both", ErrInvalid, r.PeerType)
	case r.Communities != nil && len(r.Communities.Values) != 1:
		return fmt.Errorf("%w: communities.values: one is to be there", ErrInvalid)
	case len(r.Operations) > 0 && r.Action == "Reject":
		return fmt.Errorf("%w: operations on what is rejected", ErrInvalid)
	}
	if r.Communities != nil {
		if err := checkCommunity("communities.values", r.Communities.Values[0]); err != nil {
			return err
		}
	}
	if err := r.checkCIDR(v6); err != nil {
		return err
	}
	prepended := 0
	for i, o := range r.Operations {
		if err := o.check(); err != nil {
			return fmt.Errorf("operations[%d]: %w", i, err)
		}
		if o.PrependASPath != nil {
			prepended += len(o.PrependASPath.Prefix)
		}
	}
	if prepended > 10 {
		return fmt.Errorf("%w: operations: %d ASs to prepend are more than 10", ErrInvalid, prepended)
	}
	return nil
}

func (r BGPFilterRule) checkCIDR(v6 bool) error {
	operators := map[string]bool{"Equal": true, "NotEqual": true, "In": true, "NotIn": true}
	switch {
	case !r.CIDR.IsValid() && (r.MatchOperator != "" || r.PrefixLength != nil):
		return fmt.Errorf("%w: cidr is missing", ErrInvalid)
	case !r.CIDR.IsValid():
		return nil
	case r.CIDR.Addr().Is6() != v6 || r.CIDR.Addr().Is4In6():
		return fmt.Errorf("%w: cidr %s is of the other family", ErrInvalid, r.CIDR)
	case r.CIDR != r.CIDR.Masked():
		return fmt.Errorf("%w: cidr %s: bits are set behind the prefix; write %s", ErrInvalid, r.CIDR, r.CIDR.Masked())
	case !operators[r.MatchOperator]:
		return fmt.Errorf("%w: matchOperator %q: Equal, NotEqual, In or NotIn", ErrInvalid, r.MatchOperator)
	case r.PrefixLength != nil && r.MatchOperator != "In" && r.MatchOperator != "NotIn":
		return fmt.Errorf("%w: prefixLength goes with matchOperator In or NotIn", ErrInvalid)
	}
	if low, high := r.Lengths(); low > high || high > r.CIDR.Addr().BitLen() {
		return fmt.Errorf("%w: prefixLength %d to %d: nothing in %s has that", ErrInvalid, low, high, r.CIDR)
	}
	return nil
}

// Lengths are the masks' lengths that the rule's CIDR stands for, both included.
func (r BGPFilterRule) Lengths() (low, high int) {
	low, high = r.CIDR.Bits(), r.CIDR.Addr().BitLen()
	switch {
	case r.MatchOperator == "Equal" || r.MatchOperator == "NotEqual":
		high = low
	case r.PrefixLength != nil:
		if r.PrefixLength.Min != nil {
			low = max(low, *r.PrefixLength.Min)
		}
		if r.PrefixLength.Max != nil {
			high = *r.PrefixLength.Max
		}
	}
	return low, high
}

func (o BGPFilterOperation) check() error {
	switch {
	case o.SetPriority != nil:
		return fmt.Errorf("setPriority: %w: routes have none here", ErrUnsupported)
	case (o.AddCommunity != nil) == (o.PrependASPath != nil):
		return fmt.Errorf("%w: one of addCommunity and prependASPath is to be there", ErrInvalid)
	case o.AddCommunity != nil:
		return checkCommunity("addCommunity.value", o.AddCommunity.Value)
	case len(o.PrependASPath.Prefix) == 0:
		return fmt.Errorf("%w: prependASPath.prefix is empty", ErrInvalid)
	}
	return nil
}

// checkCommunity refuses what is neither a community (RFC 1997) nor a large one (RFC 8092).
func checkCommunity(key, c string) error {
	parts := strings.Split(c, ":")
	bits := map[int]int{2: 16, 3: 32}[len(parts)]
	for _, part := range parts {
		if _, err := strconv.ParseUint(part, 10, max(bits, 1)); err != nil || bits == 0 {
			return fmt.Errorf("%w: %s %q: write 65001:100, or 65001:1:2 for a large one", ErrInvalid, key, c)
		}
	}
	return nil
}

// BGPCommunity is a community's name.
type BGPCommunity struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// BGPPrefixAdvertisement adds communities to what is announced of a prefix, to every peer.
type BGPPrefixAdvertisement struct {
	CIDR        netip.Prefix `json:"cidr"`
	Communities []string     `json:"communities"` // values, or names
}

// Advertised are the communities of each prefix, by value.
func (c BGPConfiguration) Advertised() ([]BGPPrefixAdvertisement, error) {
	named := make(map[string]string)
	for _, k := range c.Communities {
		if err := checkCommunity("communities: value", k.Value); err != nil {
			return nil, err
		}
		if k.Name == "" || strings.Contains(k.Name, ":") || named[k.Name] != "" {
			return nil, fmt.Errorf("%w: communities: name %q: it must be there once and have no ':'", ErrInvalid, k.Name)
		}
		named[k.Name] = k.Value
	}
	var all []BGPPrefixAdvertisement
	for _, p := range c.PrefixAdvertisements {
		if !p.CIDR.IsValid() || p.CIDR != p.CIDR.Masked() || p.CIDR.Addr().Is4In6() {
			return nil, fmt.Errorf("%w: prefixAdvertisements: cidr %s is no network", ErrInvalid, p.CIDR)
		}
		values := []string{}
		for _, v := range p.Communities {
			if !strings.Contains(v, ":") {
				if named[v] == "" {
					return nil, fmt.Errorf("%w: prefixAdvertisements: community %q has no value; name it in communities", ErrInvalid, v)
				}
				v = named[v]
			}
			if err := checkCommunity("prefixAdvertisements: communities:", v); err != nil {
				return nil, err
			}
			values = append(values, v)
		}
		all = append(all, BGPPrefixAdvertisement{p.CIDR, values})
	}
	return all, nil
}
