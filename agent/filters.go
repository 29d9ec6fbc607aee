package agent

import (
	"fmt"
	"net/netip"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/bgp"
)

// filter are the speaker's filters of a peer that names BGPFilters.
func (v *view) filter(names []string, internal bool) (in, out []bgp.Filter, err error) {
	for _, name := range names {
		f := v.filters[name]
		if f == nil {
			return nil, nil, fmt.Errorf("there is no BGPFilter %s: without it there is no session; apply it, or don't name it", name)
		}
		in = append(append(in, rules(f.ImportV4, all4, internal, false)...), rules(f.ImportV6, all6, internal, false)...)
		out = append(append(out, rules(f.ExportV4, all4, internal, true)...), rules(f.ExportV6, all6, internal, true)...)
	}
	return in, out, nil
}

var all4, all6 = netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")

// rules are those of one family and direction that are for a peer of the same AS, or for one of another.
func rules(list []api.BGPFilterRule, family netip.Prefix, internal, export bool) (all []bgp.Filter) {
	for _, r := range list {
		if r.PeerType != "" && (r.PeerType == "iBGP") != internal {
			continue
		}
		f := bgp.Filter{Prefix: family, Max: family.Addr().BitLen(), FromPeers: export && r.Source == "RemotePeers"}
		if r.CIDR.IsValid() {
			f.Prefix = r.CIDR
			f.Min, f.Max = r.Lengths()
			f.Outside = r.MatchOperator == "NotEqual" || r.MatchOperator == "NotIn"
		}
		if r.Communities != nil {
			f.Communities = r.Communities.Values
		}
		f.ASPath = numbers(r.ASPathPrefix)
		if r.Action == "Accept" {
			f.Action = bgp.Accept
		}
		for _, o := range r.Operations {
			if o.AddCommunity != nil {
				f.AddCommunities = append(f.AddCommunities, o.AddCommunity.Value)
			}
			if o.PrependASPath != nil { // a later one stands before an earlier one
				f.Prepend = append(numbers(o.PrependASPath.Prefix), f.Prepend...)
			}
		}
		all = append(all, f)
	}
	return all
}

func numbers(all []api.ASNumber) (n []uint32) {
	for _, a := range all {
		n = append(n, uint32(a))
	}
	return n
}

// advertised adds the communities that the cluster's prefixes have for every peer.
func advertised(v *view) (all []bgp.Filter) {
	list, _ := v.bgp.Advertised() // checked when it was read
	for _, p := range list {
		all = append(all, bgp.Filter{
			Prefix: p.CIDR, Min: p.CIDR.Bits(), Max: p.CIDR.Addr().BitLen(), Action: bgp.Continue, AddCommunities: p.Communities,
		})
	}
	return all
}
