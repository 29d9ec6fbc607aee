package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/tests/bpffs"
)

// onHost calls fn with an agent that has maps of its own, in a network namespace with eth0, 192.0.2.1/24.
func onHost(t *testing.T, fn func(a *Agent) error) {
	t.Helper()
	root, name := bpffs.Mount(t), fmt.Sprintf("agent-%d", os.Getpid())
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Delete(name); err != nil {
			t.Error(err)
		}
	})
	err := netns.Do(netns.Path(name), func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		eth0 := &netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}
		addr, err := netlink.ParseAddr("192.0.2.1/24")
		if err != nil {
			return err
		}
		for _, do := range []func() error{
			func() error { return netlink.LinkAdd(eth0) },
			func() error { return netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "peer"}}) },
			func() error { return netlink.LinkSetUp(eth0) },
			func() error { return netlink.AddrAdd(eth0, addr) },
		} {
			if err := do(); err != nil {
				return err
			}
		}
		a := &Agent{Config: Config{Node: "h1", BPFFSDir: filepath.Join(root, "node"), StateDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}, wake: make(chan struct{}, 1)}
		if err := loader.Ensure(loader.Config{Dir: a.BPFFSDir, MaxFlows: 1024}); err != nil {
			return err
		}
		defer func() { _ = loader.Unload(a.BPFFSDir) }()
		if a.maps, err = maps.Open(a.BPFFSDir); err != nil {
			return err
		}
		defer a.maps.Close()
		a.routes = newRoutes(a)
		return fn(a)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestWithdrawnPool: a route that is withdrawn while a pool of the same prefix becomes known does not take the pool's along.
func TestWithdrawnPool(t *testing.T) {
	prefix := netip.MustParsePrefix("172.20.0.0/16")
	kind := func(a *Agent) maps.RouteKind {
		r, err := a.maps.Route(prefix)
		if err != nil {
			t.Error(err)
		}
		return r.Kind
	}
	onHost(t, func(a *Agent) error {
		v := &view{}
		a.routes.Learned(bgp.Route{Prefix: prefix, NextHop: netip.MustParseAddr("192.0.2.2")})
		if err := a.routes.sync(t.Context(), v, nil, tunnel{}); err != nil {
			return err
		}
		if got := kind(a); got != maps.RouteRemote {
			t.Errorf("as learned it is %s", got)
		}
		a.routes.pools = []api.IPPool{{CIDR: prefix}}
		a.routes.Withdrawn(prefix) // after a sync has written what was learned, before it writes the pools
		if err := a.routes.putPools(t.Context(), nil, nil); err != nil {
			return err
		}
		if got := kind(a); got != maps.RoutePool {
			t.Errorf("as the pool's it is %s", got)
		}
		for range 2 {
			if err := a.routes.sync(t.Context(), &view{pools: a.routes.pools}, nil, tunnel{}); err != nil {
				return err
			}
			if got := kind(a); got != maps.RoutePool {
				t.Errorf("once it was withdrawn it is %s", got)
			}
		}
		kernel, err := a.routes.listKernel()
		if _, there := kernel[prefix]; there {
			t.Error("the kernel has the route still")
		}
		return err
	})
}

// TestLeftRoute: what an earlier agent, or Calico, has learned stays until all peers have told theirs; and that to a block of a node whose
// first agent has still to begin until that one has had the time to.
func TestLeftRoute(t *testing.T) {
	prefix, next := netip.MustParsePrefix("10.244.1.0/26"), netip.MustParseAddr("192.0.2.2")
	claimed := map[netip.Prefix]Claim{prefix: {Block: Block{CIDR: prefix, Node: "h2"}}}
	known := map[string]*api.Node{"h2": {BGP: &api.NodeBGP{}}}
	late := time.Now().Add(-bgp.DefaultRestartTime)
	onHost(t, func(a *Agent) error {
		for _, test := range []struct {
			name        string
			first, then view
			begun       time.Time
			stays       bool
		}{
			{name: "nobody's"},
			{name: "a peer's", first: view{blocks: claimed, nodes: known}, then: view{blocks: claimed, nodes: known}},
			{name: "no peer's yet", first: view{blocks: claimed}, then: view{blocks: claimed}, stays: true},
			{name: "a new peer's", first: view{blocks: claimed}, then: view{blocks: claimed, nodes: known}, stays: true},
			{name: "an old peer's", first: view{blocks: claimed}, then: view{blocks: claimed, nodes: known}, begun: late},
			{name: "its own", first: view{blocks: map[netip.Prefix]Claim{prefix: {Block: Block{CIDR: prefix, Node: "h1"}}}}},
		} {
			a.routes = newRoutes(a)
			a.routes.Learned(bgp.Route{Prefix: prefix, NextHop: next})
			if err := a.routes.sync(t.Context(), &view{}, nil, tunnel{}); err != nil {
				return err
			}
			a.routes = newRoutes(a) // another agent
			if err := a.routes.sync(t.Context(), &test.first, nil, tunnel{}); err != nil {
				return err
			}
			if there := hasRoute(t, a, prefix); !there {
				t.Errorf("%s: it is gone before anybody was heard", test.name)
			}
			if !test.begun.IsZero() {
				a.routes.begun["h2"] = test.begun
			}
			a.routes.heardAll()
			for range 2 {
				if err := a.routes.sync(t.Context(), &test.then, nil, tunnel{}); err != nil {
					return err
				}
				if there := hasRoute(t, a, prefix); there != test.stays {
					t.Errorf("%s: stays %v, want %v", test.name, there, test.stays)
				}
			}
			a.routes.Withdrawn(prefix)
			if err := a.routes.sync(t.Context(), &view{}, nil, tunnel{}); err != nil {
				return err
			}
		}
		return nil
	})
}

// hasRoute tells whether the maps have a route, and the kernel too.
func hasRoute(t *testing.T, a *Agent, prefix netip.Prefix) bool {
	t.Helper()
	r, err := a.maps.Route(prefix)
	if err != nil && !errors.Is(err, maps.ErrNotFound) {
		t.Error(err)
	}
	kernel, err := a.routes.listKernel()
	if err != nil {
		t.Error(err)
	}
	_, there := kernel[prefix]
	if there != (r.Kind == maps.RouteRemote) {
		t.Errorf("the kernel has it: %v, the maps have %s", there, r.Kind)
	}
	return there
}
