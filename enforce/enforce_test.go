package enforce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/tests/bpffs"
)

// host is a node with real maps and a policy.
type host struct {
	testing.TB
	cfg  Config
	p    *Policy
	pods []node.Endpoint
}

func newHost(t testing.TB, cfg loader.Config) *host {
	t.Helper()
	dir := bpffs.Mount(t)
	cfg.Dir, cfg.NodeID = filepath.Join(dir, "node"), "h1"
	if err := loader.Ensure(cfg); err != nil {
		t.Fatal(err)
	}
	m, err := maps.Open(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	h := &host{TB: t, cfg: Config{Dir: t.TempDir(), Maps: m, Node: "h1"}}
	h.load()
	return h
}

func (h *host) load() {
	h.Helper()
	var err error
	if h.p, err = Load(context.Background(), h.cfg); err != nil {
		h.Fatal(err)
	}
	p := h.p
	h.Cleanup(func() { p.lock.Unlock() })
}

// kill ends the policy as a signal would.
func (h *host) kill() { h.p.lock.Unlock() }

// addPod puts a pod into the maps, as ADD does, and into what node.db would say.
func (h *host) addPod(namespace, name, addr string, labels map[string]string) node.Endpoint {
	h.Helper()
	i := len(h.pods) + 1
	e := node.Endpoint{
		Key: node.Key{Network: "net", ContainerID: fmt.Sprint(name, "-", i), IfName: "eth0"}, PodNamespace: namespace, PodName: name,
		Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Labels: labels,
	}
	h.pods = append(h.pods, e)
	if err := h.cfg.Maps.PutPod(maps.Pod{IfIndex: uint32(i), Addresses: e.Addrs}); err != nil {
		h.Fatal(err)
	}
	return e
}

func (h *host) put(yaml string) {
	h.Helper()
	for _, r := range parse(h.TB, yaml) {
		h.p.Put(r)
	}
}

func (h *host) commit() Result {
	h.Helper()
	h.p.SetLocal(h.pods)
	r, err := h.p.Commit(context.Background())
	if err != nil {
		h.Fatal(err)
	}
	return r
}

// check says what the maps make of TCP from one pod to another.
func (h *host) check(from, to string, port uint16, want policy.Action) {
	h.Helper()
	k, err := readKernel(h.cfg.Maps)
	if err != nil {
		h.Fatal(err)
	}
	tables := k.tables()
	pods, err := h.cfg.Maps.Pods()
	if err != nil {
		h.Fatal(err)
	}
	a, b := netip.MustParseAddr(from), netip.MustParseAddr(to)
	packet := policy.Packet{Protocol: 6, Source: a, Destination: b, SourcePort: 40000, TargetPort: port}
	got := policy.Allow
	judge := func(id uint32, remote netip.Addr) {
		if tables.Lookup(id, remote, packet).Action != policy.Allow { // none: no rows
			got = policy.Deny
		}
	}
	for _, pod := range pods {
		for _, address := range pod.Addresses {
			if address == a {
				judge(pod.PolicyEgress, b)
			}
			if address == b {
				judge(pod.PolicyIngress, a)
			}
		}
	}
	if got != want {
		h.Errorf("%s to %s port %d: %s, want %s", from, to, port, got, want)
	}
}

func parse(t testing.TB, yaml string) []api.Resource {
	t.Helper()
	all, err := manifest.Parse([]byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

const denyAll = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all}
spec: {podSelector: {}, policyTypes: [Ingress]}
`

const allowHTTP = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-http}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]}
`

func kind(t testing.TB, word string) api.Kind {
	t.Helper()
	k, err := api.FindKind(word)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

const netpol = "networkpolicies.networking.k8s.io"

func TestCommit(t *testing.T) {
	const web, client, other = "10.0.0.1", "10.0.0.2", "10.0.0.3"
	h := newHost(t, loader.Config{})
	h.addPod("", "web", web, map[string]string{"app": "web"})
	h.addPod("", "client", client, map[string]string{"app": "client"})
	h.addPod("", "other", other, nil)
	if _, err := h.p.Commit(context.Background()); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
	h.p.Replace(nil)
	if r := h.commit(); r.Changed {
		t.Errorf("without policy: %+v", r)
	}
	if _, err := os.Stat(filepath.Join(h.cfg.Dir, fileName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without policy: policy.db: %v", err)
	}
	h.put(denyAll)
	h.commit()
	h.check(client, web, 80, policy.Deny)
	h.put(allowHTTP)
	h.commit()
	h.check(client, web, 80, policy.Allow)
	h.check(client, web, 81, policy.Deny)
	h.check(other, web, 80, policy.Deny)
	if r := h.commit(); r.Changed {
		t.Errorf("the same again: %+v", r)
	}

	// Another that is killed and begins anew writes nothing.
	if err := h.p.Tidy(); err != nil {
		t.Fatal(err)
	}
	h.kill()
	h.load()
	if r := h.commit(); r.Changed {
		t.Errorf("after a restart: %+v", r)
	}
	if _, err := Load(context.Background(), h.cfg); !errors.Is(err, ErrHeld) {
		t.Error(err)
	}
	// A pod whose ids are others is mended.
	if err := h.cfg.Maps.PutPod(maps.Pod{IfIndex: 1, Addresses: h.pods[0].Addrs, PolicyIngress: maps.PolicyUnknown}); err != nil {
		t.Fatal(err)
	}
	h.check(client, web, 80, policy.Deny)
	h.commit()
	h.check(client, web, 80, policy.Allow)

	h.p.Delete(kind(t, netpol), "default", "deny-all")
	h.commit()
	h.check(client, other, 80, policy.Allow)
	h.check(other, web, 80, policy.Deny)
	h.p.Delete(kind(t, netpol), "default", "allow-http")
	h.commit()
	h.check(other, web, 80, policy.Allow)
	if k, err := readKernel(h.cfg.Maps); err != nil || len(k.rows)+len(k.peers) > 0 {
		t.Errorf("left in the maps: %+v (%v)", k, err)
	}
}

// TestProfiles: a pod that names a profile is judged by it, without any policy; as long as there is no such profile it is cut off.
func TestProfiles(t *testing.T) {
	const one, two, other = "10.0.0.1", "10.0.0.2", "10.0.0.3"
	h := newHost(t, loader.Config{})
	h.addPod("", "one", one, nil)
	h.addPod("", "two", two, nil)
	h.addPod("", "other", other, nil)
	for i := range 2 {
		h.pods[i].Profiles = []string{"docker.net"}
	}
	h.p.Replace(nil)
	h.commit()
	h.check(other, one, 80, policy.Deny)
	h.check(two, one, 80, policy.Deny)
	h.put(`apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: docker.net}
spec:
  labelsToApply: {docker.caracal.dev/net: ""}
  ingress: [{action: Allow, source: {selector: has(docker.caracal.dev/net)}}]
  egress: [{action: Allow}]
`)
	h.commit()
	h.check(two, one, 80, policy.Allow)
	h.check(other, one, 80, policy.Deny)
	h.check(one, other, 80, policy.Allow)

	// Who has only what was saved judges alike.
	if err := h.p.Tidy(); err != nil {
		t.Fatal(err)
	}
	if selects, err := Selects(t.Context(), h.cfg.Dir, h.pods[0]); err != nil || !selects {
		t.Errorf("what was saved is about a pod of the profile: %t, %v", selects, err)
	}
	h.kill()
	h.load()
	if r := h.commit(); r.Changed {
		t.Errorf("after a restart: %+v", r)
	}
	h.p.Delete(kind(t, "profiles"), "", "docker.net")
	h.commit()
	h.check(two, one, 80, policy.Deny)
}

func TestEndpointName(t *testing.T) {
	names := make(map[string]bool)
	for _, k := range []node.Key{
		{Network: "n", ContainerID: "c", IfName: "eth0"}, {Network: "n", ContainerID: "C", IfName: "eth0"}, {Network: "m", ContainerID: "c", IfName: "eth0"},
		{Network: "n", ContainerID: strings.Repeat("x_.", 100), IfName: "eth0.100"}, {Network: "n", ContainerID: "é", IfName: "☃"},
	} {
		for _, node := range []string{"h1", "h2", strings.Repeat("h.", 120) + "h"} {
			name := EndpointName(node, k)
			r := Endpoint(node, nodeEndpoint(k), nil)
			text, err := r.MarshalJSON()
			var back api.Resource
			if err == nil {
				err = back.UnmarshalJSON(text)
			}
			if err != nil || names[name] {
				t.Errorf("%s: %v", name, err)
			}
			names[name] = true
		}
	}
}

func nodeEndpoint(k node.Key) node.Endpoint { return node.Endpoint{Key: k} }
