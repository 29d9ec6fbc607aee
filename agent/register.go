package agent

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// InstanceAnnotation is on a Node resource: which host's agent it belongs to. Two hosts of one name are told apart by it.
const InstanceAnnotation = "caracal.dev/instance"

// labelsAnnotation is on a Node resource: the names of the labels that its agent was told to give it, between commas. One that
// it is not told of any more is taken away again; an operator's labels stay.
const labelsAnnotation = "caracal.dev/labels"

const instanceSetting = "agent/instance"

// ErrName says that another host has this node's name or address.
var ErrName = errors.New("another host has it")

// errTaken is ErrName of the name.
var errTaken = fmt.Errorf("%w", ErrName)

// register makes sure that this node's resource is in the store and says where it is, and returns it. wrote: it is not what v
// says of it.
func (a *Agent) register(ctx context.Context, v *view) (self *api.Node, wrote bool, err error) {
	instance, err := a.instance(ctx)
	if err != nil {
		return nil, false, err
	}
	core, err := a.core()
	if err != nil {
		return nil, false, err
	}
	kind, err := api.FindKind("Node")
	if err != nil {
		return nil, false, err
	}
	key := kind.Key("", a.Node)
	kv, exists := a.cluster.get(key)
	meta := api.Metadata{Name: a.Node}
	self = &api.Node{}
	if exists {
		var r api.Resource // of this revision, which v may be behind
		err := json.Unmarshal(kv.Value, &r)
		spec, ok := r.Spec.(*api.Node)
		if err != nil || !ok {
			return nil, false, fmt.Errorf("its resource in the store can't be read; mend or remove it (%s)", a.removal(a.Node))
		}
		meta, self = r.Metadata, spec
		if was := meta.Annotations[InstanceAnnotation]; was != "" && was != instance {
			return nil, false, fmt.Errorf("name %s: %w (instance %s, this is %s); give this host another name (--node-name), or if that host is gone for good, remove it (%s)", a.Node, errTaken, was, instance, a.removal(a.Node))
		}
	}
	ip4, ip6, err := a.addresses(core)
	if err != nil {
		return nil, false, err
	}
	var renamed error
	for name, n := range v.nodes {
		if name == a.Node || n.BGP == nil {
			continue
		}
		for _, pair := range [][2]netip.Prefix{{ip4, n.BGP.IPv4Address}, {ip6, n.BGP.IPv6Address}} {
			if ours := pair[0].Addr(); ours.IsValid() && ours == pair[1].Addr() {
				if v.meta[name].Annotations[InstanceAnnotation] == instance {
					renamed = fmt.Errorf("this host was node %s before, which has address %s still; if it is %s now, remove that node (%s)", name, ours, a.Node, a.removal(name))
					continue
				}
				return nil, false, fmt.Errorf("address %s: %w: node %s; give one of them another, or remove that node (%s)", ours, ErrName, name, a.removal(name))
			}
		}
	}
	if renamed != nil {
		return nil, false, renamed
	}
	if !exists {
		if err := a.inherits(ctx, v); err != nil {
			return nil, false, err
		}
	}
	b := api.NodeBGP{}
	if self.BGP != nil {
		b = *self.BGP
	}
	b.IPv4Address, b.IPv6Address = ip4, ip6
	labels, annotations := a.label(meta, core)
	annotations[InstanceAnnotation] = instance
	if core != nil {
		if annotations[uidAnnotation] != core.UID {
			if err := a.reown(ctx, v); err != nil {
				return nil, false, err
			}
		}
		annotations[uidAnnotation] = core.UID
		if err := followBGP(core, annotations, &b); err != nil {
			return nil, false, err
		}
	}
	if exists && maps.Equal(labels, meta.Labels) && maps.Equal(annotations, meta.Annotations) && self.BGP != nil && *self.BGP == b {
		return self, false, nil
	}
	self.BGP, meta.Labels, meta.Annotations = &b, labels, annotations
	text, err := json.Marshal(api.Resource{Kind: kind, Metadata: meta, Spec: self})
	if err != nil {
		return nil, false, err
	}
	revision, err := a.put(ctx, key, text, kv, exists)
	if err != nil {
		return nil, false, err
	}
	a.cluster.wrote(store.KV{Key: key, Value: text, Revision: revision})
	a.Log.Info("registered", "node", a.Node, "ipv4", ip4, "ipv6", ip6)
	return self, true, nil
}

// removal is the command that removes a node which is gone for good.
func (a *Agent) removal(name string) string {
	if a.Kubernetes != nil {
		return "kubectl delete node " + name
	}
	return "caracalctl delete node " + name
}

// label returns what the node's labels and annotations are to be; core is its Node in Kubernetes, nil if there is none.
func (a *Agent) label(meta api.Metadata, core *api.CoreNode) (labels, annotations map[string]string) {
	labels, annotations = make(map[string]string), make(map[string]string)
	maps.Copy(labels, meta.Labels)
	maps.Copy(annotations, meta.Annotations)
	for key := range strings.SplitSeq(annotations[labelsAnnotation], ",") {
		delete(labels, key)
	}
	own := make(map[string]string)
	if core != nil {
		maps.Copy(own, core.Labels)
	}
	maps.Copy(own, a.Labels)
	maps.Copy(labels, own)
	delete(annotations, labelsAnnotation)
	if len(own) > 0 {
		annotations[labelsAnnotation] = strings.Join(slices.Sorted(maps.Keys(own)), ",")
	}
	return labels, annotations
}

func (a *Agent) put(ctx context.Context, key string, value []byte, old store.KV, exists bool) (store.Revision, error) {
	if exists {
		return a.store.Update(ctx, key, value, old.Revision)
	}
	return a.store.Create(ctx, key, value)
}

// instance is this host's own mark, made once.
func (a *Agent) instance(ctx context.Context) (id string, err error) {
	if a.mark != "" {
		return a.mark, nil
	}
	defer func() {
		if err == nil {
			a.mark = id
		}
	}()
	db, err := node.Open(ctx, a.StateDir, a.nodeOptions())
	if err != nil {
		return "", err
	}
	defer db.Close()
	if err := db.View(func(tx *node.Tx) error { id = tx.Setting(instanceSetting); return nil }); err != nil || id != "" {
		return id, err
	}
	b := make([]byte, 8)
	rand.Read(b) // never fails
	id = hex.EncodeToString(b)
	return id, db.Update(func(tx *node.Tx) error { return tx.PutSetting(instanceSetting, id) })
}

// addresses are this node's for its peers: the configured ones, those that its Node in Kubernetes says, or those that are found. One that was found and is not there
// is kept for a while: with its link it goes, and it comes back later than the others (RFC 4862), while without it all BGP
// sessions would begin anew.
func (a *Agent) addresses(core *api.CoreNode) (ip4, ip6 netip.Prefix, err error) {
	if a.IPv4.IsValid() || a.IPv6.IsValid() {
		return a.IPv4, a.IPv6, nil
	}
	ip4, ip6, err = findAddresses()
	if core != nil {
		var errCore error
		if ip4, ip6, errCore = preferCore(core, ip4, ip6); errCore != nil {
			return ip4, ip6, errCore
		}
		if ip4.IsValid() || ip6.IsValid() { // a default route is not needed to find these
			err = nil
		}
	}
	if err != nil {
		return ip4, ip6, err
	}
	had := a.found
	if had[0].IsValid() && !ip4.IsValid() || had[1].IsValid() && !ip6.IsValid() {
		if a.missing.IsZero() {
			a.missing = time.Now()
		}
		if time.Since(a.missing) < missingFor {
			return cmp.Or(ip4, had[0]), cmp.Or(ip6, had[1]), nil
		}
	}
	a.found, a.missing = [2]netip.Prefix{ip4, ip6}, time.Time{}
	return ip4, ip6, nil
}

// findAddresses finds the first global ones of the interface with the default route.
func findAddresses() (ip4, ip6 netip.Prefix, err error) {
	for _, to := range []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:ffff:ffff::1")} {
		routes, err := netlink.RouteGet(to.AsSlice())
		if err != nil || len(routes) == 0 {
			continue
		}
		l, err := netlink.LinkByIndex(routes[0].LinkIndex)
		if err != nil || l.Attrs().Name == "lo" {
			continue
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, family) })
			if err != nil {
				return ip4, ip6, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
			}
			for _, found := range addrs {
				p, ok := prefixOf(found)
				switch {
				case !ok || !p.Addr().IsGlobalUnicast():
				case p.Addr().Is4() && !ip4.IsValid():
					ip4 = p
				case p.Addr().Is6() && !ip6.IsValid():
					ip6 = p
				}
			}
		}
		if ip4.IsValid() || ip6.IsValid() {
			return ip4, ip6, nil
		}
	}
	return ip4, ip6, errors.New("no address of this host for its peers was found: there is no default route; give one (--ip 10.0.0.1/24)")
}

func prefixOf(a netlink.Addr) (netip.Prefix, bool) {
	addr, ok := netip.AddrFromSlice(a.IP)
	bits, _ := a.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits), ok
}
