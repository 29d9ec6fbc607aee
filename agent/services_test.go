package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/tests/bpffs"
)

// serviceKV is a Service as the store has it.
func serviceKV(t *testing.T, name string, labels map[string]string, spec api.Service) store.KV {
	t.Helper()
	r := api.Resource{Kind: kindOf(t, "Service"), Metadata: api.Metadata{Name: name, Namespace: "default", Labels: labels}, Spec: &spec}
	value, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return store.KV{Key: r.Key(), Value: value}
}

func kindOf(t *testing.T, name string) api.Kind {
	t.Helper()
	i := slices.IndexFunc(api.Kinds, func(k api.Kind) bool { return k.Name == name })
	if i < 0 {
		t.Fatalf("no kind %s", name)
	}
	return api.Kinds[i]
}

// What the store says of Services is in the kernel's map, and stays there until it says something else.
func TestServices(t *testing.T) {
	dir := filepath.Join(bpffs.Mount(t), "node")
	name := fmt.Sprintf("cag-%d", os.Getpid())
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Delete(name); err != nil {
			t.Error(err)
		}
	})
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := loader.Ensure(loader.Config{Dir: dir, MaxFlows: 64}); err != nil {
		t.Fatal(err)
	}
	m, err := maps.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	a := &Agent{Config: Config{StateDir: t.TempDir(), BPFFSDir: dir, Log: slog.New(slog.DiscardHandler)}, maps: m, problems: make(map[string]Problem)}
	s := newServices(a)
	sync := func() error { return ns.Do(func() error { return s.sync(t.Context()) }) }
	want := func(what string, want ...maps.Service) {
		t.Helper()
		got, err := m.Services()
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("%s: %+v, want %+v (%v)", what, got, want, err)
		}
	}
	if err := sync(); err != nil {
		t.Fatal(err)
	}
	want("before the store was heard")

	v4, v6 := netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00::a")
	dns := serviceKV(t, "dns", nil, api.Service{IPs: []netip.Addr{v4, v6}, Ports: []api.ServicePort{{Protocol: api.UDP, Port: 53}, {Protocol: api.TCP, Port: 53, NodePort: 30053}}})
	headless := serviceKV(t, "headless", nil, api.Service{Ports: []api.ServicePort{{Protocol: api.TCP, Port: 80}}})
	elsewhere := serviceKV(t, "elsewhere", map[string]string{"service.kubernetes.io/service-proxy-name": "mine"}, api.Service{IPs: []netip.Addr{v4}, Ports: []api.ServicePort{{Protocol: api.TCP, Port: 81}}})
	all := []maps.Service{
		{Protocol: "tcp", Port: 30053, Name: "default/dns"},
		{Address: v4, Protocol: "tcp", Port: 53, Name: "default/dns"}, {Address: v4, Protocol: "udp", Port: 53, Name: "default/dns"},
		{Address: v6, Protocol: "tcp", Port: 53, Name: "default/dns"}, {Address: v6, Protocol: "udp", Port: 53, Name: "default/dns"},
	}
	s.list([]store.KV{dns, headless, elsewhere})
	before, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := sync(); err != nil {
		t.Fatal(err)
	}
	want("listed", all...)
	for range 2 {
		if err := sync(); err != nil {
			t.Fatal(err)
		}
	}
	if after, err := m.State(); err != nil || after.Epoch != before.Epoch+1 {
		t.Errorf("epoch %d, want %d: %v", after.Epoch, before.Epoch+1, err)
	}

	// What can't be read is a problem, and the others are there.
	bad := store.KV{Key: "/services/default/bad", Value: []byte(`{`)}
	s.hear(store.Event{KV: bad})
	if err := sync(); err == nil {
		t.Error("no problem with what can't be read")
	}
	want("with another that can't be read", slices.Insert(slices.Clone(all), 0, maps.Others)...)
	s.hear(store.Event{KV: bad, Deleted: true})
	if err := sync(); err != nil {
		t.Error(err)
	}

	// Of one that multiplies addresses with ports there is a part, the cluster's address in it, and the others are all there.
	many := api.Service{IPs: []netip.Addr{netip.MustParseAddr("10.96.0.9"), netip.IPv4Unspecified(), netip.IPv6Unspecified()}}
	for i := range 3000 {
		many.Ports = append(many.Ports, api.ServicePort{Protocol: api.TCP, Port: uint16(1 + i)})
	}
	for a := netip.MustParseAddr("203.0.113.0"); len(many.IPs) < 10000; a = a.Next() {
		many.IPs = append(many.IPs, a)
	}
	huge := serviceKV(t, "huge", nil, many)
	s.hear(store.Event{KV: huge})
	if err := sync(); err == nil || !strings.Contains(err.Error(), "/services/default/huge: 3000 ports at 10000 addresses") {
		t.Errorf("no problem with a Service of %d ports at %d addresses: %v", len(many.Ports), len(many.IPs), err)
	}
	if got, err := m.Services(); err != nil || len(got) != len(all)+maxPerService+1 || got[0] != maps.Others {
		t.Errorf("%d entries, want %d and that there are others: %v", len(got), len(all)+maxPerService, err)
	}
	for _, entry := range []maps.Service{all[1], {Address: many.IPs[0], Protocol: "tcp", Port: 3000, Name: "default/huge"}} {
		if got, err := m.FindService(netip.AddrPortFrom(entry.Address, entry.Port), entry.Protocol, false); err != nil || got != entry {
			t.Errorf("%+v, want %+v: %v", got, entry, err)
		}
	}
	s.hear(store.Event{KV: huge, Deleted: true})
	if err := sync(); err != nil {
		t.Error(err)
	}
	want("without it", all...)

	// Many of them, though none has too much, do not fit: each lacks its last ones, and one that has few lacks none.
	many.Ports = many.Ports[:64]
	room, err := m.ServiceRoom()
	if err != nil {
		t.Fatal(err)
	}
	var large []store.KV
	for i := range room/maxPerService + 1 {
		many.IPs = nil
		for k := range maxPerService / len(many.Ports) {
			many.IPs = append(many.IPs, netip.AddrFrom4([4]byte{10, 97, byte(i), byte(k)}))
		}
		large = append(large, serviceKV(t, fmt.Sprintf("a%02d", i), nil, many))
		s.hear(store.Event{KV: large[i]})
	}
	if err := sync(); !errors.Is(err, maps.ErrFull) || !errors.As(err, new(inputError)) || !strings.Contains(err.Error(), "default/a00 (") || strings.Contains(err.Error(), "default/dns") {
		t.Errorf("with too many: %v", err)
	}
	got, err := m.Services()
	if err != nil || len(got) != room || got[0] != maps.Others {
		t.Fatalf("%d entries, want %d and that there are others: %v", len(got), room, err)
	}
	for _, entry := range all {
		if !slices.Contains(got, entry) {
			t.Errorf("%+v is not there", entry)
		}
	}
	for _, kv := range large {
		s.hear(store.Event{KV: kv, Deleted: true})
	}
	if err := sync(); err != nil {
		t.Error(err)
	}
	want("without them", all...)

	// Ports of the host that pods are published at.
	db, err := node.Open(t.Context(), a.StateDir, a.nodeOptions())
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *node.Tx) error {
		return tx.PutEndpoint(node.Endpoint{
			Key: node.Key{Network: "n", ContainerID: "c", IfName: "eth0"}, PodNamespace: "default", PodName: "web",
			Ports: []node.HostPort{{Protocol: "tcp", IP: netip.IPv4Unspecified(), Port: 8080}},
		})
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if err := sync(); err != nil {
		t.Fatal(err)
	}
	want("with a host port", slices.Insert(slices.Clone(all), 0, maps.Service{Protocol: "tcp", Port: 8080, Name: "default/web"})...)

	s.hear(store.Event{KV: dns, Deleted: true})
	if err := sync(); err != nil {
		t.Fatal(err)
	}
	want("deleted")

	// Loaded programs of an earlier build, which has no to_host, get the Services all the same, and the node is ready: they are
	// replaced when all agents are.
	if err := os.Remove(bpf.ProgramPath(dir, bpf.DataplaneProgToHost)); err != nil {
		t.Fatal(err)
	}
	s.hear(store.Event{KV: dns})
	if err := sync(); !errors.As(err, new(inputError)) || !strings.Contains(err.Error(), "caracalctl upgrade") {
		t.Errorf("with an earlier build's programs: %v", err)
	}
	want("with an earlier build's programs", slices.Insert(slices.Clone(all), 0, maps.Service{Protocol: "tcp", Port: 8080, Name: "default/web"})...)
}
