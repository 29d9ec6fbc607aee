package bgp

import (
	"net/netip"

	apipb "github.com/osrg/gobgp/v3/api"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

var (
	family4 = &apipb.Family{Afi: apipb.Family_AFI_IP, Safi: apipb.Family_SAFI_UNICAST}
	family6 = &apipb.Family{Afi: apipb.Family_AFI_IP6, Safi: apipb.Family_SAFI_UNICAST}
)

func family(a netip.Addr) *apipb.Family {
	if a.Is4() {
		return family4
	}
	return family6
}

// ownPath is our path to a prefix of ours.
func (s *Speaker) ownPath(p netip.Prefix) *apipb.Path {
	next := netip.IPv4Unspecified() // GoBGP puts the session's own address in its place
	if p.Addr().Is6() {
		next = netip.IPv6Unspecified()
		if s.config.NextHop6.IsValid() {
			next = s.config.NextHop6
		}
	}
	return &apipb.Path{
		Family: family(p.Addr()),
		Nlri:   pack(&apipb.IPAddressPrefix{Prefix: p.Addr().String(), PrefixLen: uint32(p.Bits())}),
		Pattrs: []*anypb.Any{pack(&apipb.OriginAttribute{Origin: 0}), pack(&apipb.NextHopAttribute{NextHop: next.String()})},
	}
}

// pack can't fail for messages that this package makes: their strings are UTF-8.
func pack(m proto.Message) *anypb.Any {
	a, err := anypb.New(m)
	if err != nil {
		panic(err)
	}
	return a
}

// pathPrefix is the prefix that a path leads to. False for what is not a unicast prefix, as End-of-RIB.
func pathPrefix(p *apipb.Path) (netip.Prefix, bool) {
	var nlri apipb.IPAddressPrefix
	if p.Nlri == nil || p.Nlri.UnmarshalTo(&nlri) != nil {
		return netip.Prefix{}, false
	}
	a, err := netip.ParseAddr(nlri.Prefix)
	if err != nil {
		return netip.Prefix{}, false
	}
	prefix, err := a.Prefix(int(nlri.PrefixLen))
	return prefix, err == nil
}

// pathFrom is the peer that a path came from; not valid for our own.
func pathFrom(p *apipb.Path) netip.Addr {
	a, _ := netip.ParseAddr(p.NeighborIp)
	return a
}

// readPath reads what we use of a path.
func (s *Speaker) readPath(prefix netip.Prefix, p *apipb.Path) *path {
	r := &path{
		Route:     Route{Prefix: prefix, From: pathFrom(p), Stale: p.Stale},
		localPref: 100, // unless the path says something else
		internal:  p.SourceAsn == s.config.ASN,
		id:        addr(p.SourceId),
	}
	for _, attribute := range p.Pattrs {
		m, err := attribute.UnmarshalNew()
		if err != nil {
			continue
		}
		switch m := m.(type) {
		case *apipb.OriginAttribute:
			r.origin = m.Origin
		case *apipb.LocalPrefAttribute:
			r.localPref = m.LocalPref
		case *apipb.MultiExitDiscAttribute:
			r.med = m.Med
		case *apipb.NextHopAttribute:
			r.NextHop = addr(m.NextHop)
		case *apipb.MpReachNLRIAttribute:
			if len(m.NextHops) > 0 { // the second, if any, is the first's link-local twin (RFC 2545)
				r.NextHop = addr(m.NextHops[0])
			}
		case *apipb.AsPathAttribute:
			for _, segment := range m.Segments {
				r.ASPath = append(r.ASPath, segment.Numbers...)
				if segment.Type == apipb.AsSegment_AS_SET {
					r.length++
				} else {
					r.length += len(segment.Numbers)
				}
			}
		case *apipb.CommunitiesAttribute:
			for _, c := range m.Communities {
				r.Communities = append(r.Communities, formatCommunity(c))
			}
		case *apipb.LargeCommunitiesAttribute:
			for _, c := range m.Communities {
				r.Communities = append(r.Communities, formatLargeCommunity(c.GlobalAdmin, c.LocalData1, c.LocalData2))
			}
		}
	}
	return r
}

func addr(s string) netip.Addr {
	a, _ := netip.ParseAddr(s)
	return a.Unmap()
}
