package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/bgp"
)

// peer makes the BGP speaker's peers and announcements equal to what the cluster says.
func (a *Agent) peer(ctx context.Context, v *view, self *api.Node, own []netip.Prefix) error {
	if err := a.speak(ctx, v, self); err != nil {
		return err
	}
	peers, err := a.peers(v, self)
	// Announced first: a new peer then hears everything before its end-of-RIB.
	return errors.Join(err, a.speaker.Announce(own), a.speaker.SetPeers(peers))
}

// speak starts the speaker, again when what it is to its peers has changed.
func (a *Agent) speak(ctx context.Context, v *view, self *api.Node) error {
	c := bgp.Config{ASN: uint32(asNumber(v, self)), RouterID: routerID(self), ListenPort: a.BGPPort, Log: a.Log}
	if c.ListenPort == 0 {
		c.ListenPort = v.bgp.ListenPort
	}
	for _, p := range []netip.Prefix{self.BGP.IPv4Address, self.BGP.IPv6Address} {
		if p.IsValid() {
			c.ListenAddresses = append(c.ListenAddresses, p.Addr())
		}
	}
	if a.speaker != nil && fmt.Sprint(c) == fmt.Sprint(a.spoken) {
		return nil
	}
	if a.speaker != nil {
		a.Log.Info("BGP starts again", "as", c.ASN, "router id", c.RouterID, "port", c.ListenPort)
		err := a.speaker.Close(true)
		a.speaker = nil
		if err != nil {
			return err
		}
		a.routes.restart()
	}
	speaker, err := bgp.Start(context.WithoutCancel(ctx), c, a.routes)
	if err != nil {
		return err
	}
	a.speaker, a.spoken = speaker, c
	go func() {
		select {
		case <-speaker.Synced():
			a.routes.heardAll()
		case <-ctx.Done():
		}
	}()
	return nil
}

func asNumber(v *view, n *api.Node) api.ASNumber {
	if n.BGP != nil && n.BGP.ASNumber != 0 {
		return n.BGP.ASNumber
	}
	return v.bgp.ASNumber
}

// routerID is the node's IPv4 address; one without is given a number made of its IPv6 address.
func routerID(n *api.Node) netip.Addr {
	if a := n.BGP.IPv4Address.Addr(); a.IsValid() {
		return a
	}
	b := n.BGP.IPv6Address.Addr().As16()
	return netip.AddrFrom4([4]byte{b[12] | 1, b[13], b[14], b[15]})
}

// peers are the mesh's and the configured ones.
func (a *Agent) peers(v *view, self *api.Node) ([]bgp.Peer, error) {
	var all []bgp.Peer
	var errs []error
	add := func(p bgp.Peer) {
		if !slices.ContainsFunc(all, func(o bgp.Peer) bool { return o.Address == p.Address && o.Port == p.Port }) {
			all = append(all, p)
		}
	}
	for name, p := range v.peers {
		if p.Node != "" && p.Node != a.Node {
			continue
		}
		peer, err := configured(p, self)
		if err != nil {
			errs = append(errs, fmt.Errorf("peer %s: %w", name, err))
			continue
		}
		if peer.Address == self.BGP.IPv4Address.Addr() || peer.Address == self.BGP.IPv6Address.Addr() {
			continue // every node's peer is one of the nodes: this one
		}
		add(peer)
	}
	if v.bgp.Mesh() {
		password, err := secret(v.bgp.NodeMeshPassword)
		errs = append(errs, err)
		for name, n := range v.nodes {
			if name == a.Node || n.BGP == nil {
				continue
			}
			for _, pair := range [][2]netip.Prefix{{self.BGP.IPv4Address, n.BGP.IPv4Address}, {self.BGP.IPv6Address, n.BGP.IPv6Address}} {
				ours, theirs := pair[0].Addr(), pair[1].Addr()
				if !ours.IsValid() || !theirs.IsValid() {
					continue
				}
				add(bgp.Peer{
					Address: theirs, Port: v.bgp.ListenPort, ASN: uint32(asNumber(v, n)), Kind: bgp.Mesh, Source: ours, Password: password,
					Passive:     ours.Less(theirs), // one of the two dials, so that no two connections meet
					RestartTime: time.Duration(v.bgp.NodeMeshMaxRestartTime),
				})
			}
		}
	}
	slices.SortFunc(all, func(x, y bgp.Peer) int { return x.Address.Compare(y.Address) })
	return all, errors.Join(errs...)
}

func configured(p *api.BGPPeer, self *api.Node) (bgp.Peer, error) {
	at, err := p.Peer()
	if err != nil {
		return bgp.Peer{}, err
	}
	peer := bgp.Peer{
		Address: at.Addr(), Port: int(at.Port()), ASN: uint32(p.ASNumber), Kind: bgp.Global, Communities: p.Communities,
		TTLSecurity: p.TTLSecurity, AllowDefault: p.AllowDefault, RestartTime: time.Duration(p.MaxRestartTime),
		NextHopSelf: !p.KeepOriginalNextHop,
	}
	if p.Node != "" {
		peer.Kind = bgp.Node
	}
	if p.SourceAddress == "UseNodeIP" {
		peer.Source = self.BGP.IPv4Address.Addr()
		if at.Addr().Is6() {
			peer.Source = self.BGP.IPv6Address.Addr()
		}
	}
	peer.Password, err = secret(p.Password)
	return peer, err
}

func secret(s *api.Secret) (string, error) {
	if s == nil || s.File == "" {
		if s == nil {
			return "", nil
		}
		return s.Value, nil
	}
	b, err := os.ReadFile(s.File)
	if err != nil {
		return "", fmt.Errorf("password: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}
