package enforce

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	kernelmaps "github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

func (h *host) delete(word, namespace, name string) {
	h.Helper()
	h.p.Delete(kind(h.TB, word), namespace, name)
}

// refused commits what was noted, which ends in an error that says all of want; the rest is in force.
func (h *host) refused(want ...string) {
	h.Helper()
	h.p.SetLocal(h.pods)
	_, err := h.p.Commit(context.Background())
	if !errors.Is(err, ErrRefused) {
		h.Fatalf("%v, want %v", err, ErrRefused)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) || !slices.ContainsFunc(h.p.State().Refused, func(s string) bool { return strings.Contains(s, w) }) {
			h.Errorf("%v\nand %q\nwant %s", err, h.p.State().Refused, w)
		}
	}
}

func global(name, spec string) string {
	return "---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: " + name + "}\nspec: " + spec + "\n"
}

// What is compiled wrongly is not put in force, and what came with it is.
func TestMiscompiled(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{})
	h.addPod("", "web", web, nil)
	h.addPod("", "client", client, nil)
	h.p.Replace(nil)
	h.put(global("a", "{order: 2, ingress: [{action: Deny, protocol: TCP, destination: {ports: [80]}}, {action: Allow}]}"))
	h.commit()
	h.p.proof = func(m *policy.Model, tables *policy.Tables, d *policy.Delta, limit time.Duration) (int, error) {
		for _, r := range tables.Rules {
			if r.Policy == "GlobalNetworkPolicy b" {
				return 1, &policy.Disagreement{Endpoint: h.p.Node, Rule: r.RuleRef}
			}
		}
		return policy.Prove(m, tables, d, limit)
	}
	h.put(global("b", "{order: 1, ingress: [{action: Allow}]}") + global("c", "{order: 1, ingress: [{action: Deny, protocol: TCP, destination: {ports: [81]}}]}"))
	h.refused("GlobalNetworkPolicy b", "a mistake of Caracal's")
	h.check(client, web, 80, policy.Deny)
	h.check(client, web, 81, policy.Deny)
	h.check(client, web, 82, policy.Allow)
}

// What can't be put in force stays as it was, alone, and is in force when what it lacked is there.
func TestRefused(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{MaxPolicy: 300})
	h.addPod("", "web", web, map[string]string{"app": "web"})
	h.addPod("", "client", client, nil)
	h.p.Replace(nil)
	h.put(global("a", "{selector: app == 'web', ingress: [{action: Deny, protocol: TCP, destination: {ports: [80]}}, {action: Allow}]}"))
	h.commit()
	h.check(client, web, 80, policy.Deny)
	h.check(client, web, 81, policy.Allow)

	// A tier that is not there, together with something good.
	h.put(global("a", "{tier: none, selector: app == 'web', ingress: [{action: Allow}]}") + global("b", "{order: 1, ingress: [{action: Deny, protocol: TCP, destination: {ports: [81]}}]}"))
	h.refused("GlobalNetworkPolicy a", "there is no Tier none")
	h.check(client, web, 80, policy.Deny)
	h.check(client, web, 81, policy.Deny)
	// Whoever comes next begins with what was in force, and refuses the same again.
	if err := h.p.Tidy(); err != nil {
		t.Fatal(err)
	}
	h.kill()
	h.load()
	if r := h.commit(); r.Changed {
		t.Errorf("after a restart: %+v", r)
	}
	h.put(global("a", "{tier: none, selector: app == 'web', ingress: [{action: Allow}]}"))
	h.refused("GlobalNetworkPolicy a")
	h.put("apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: none}\nspec: {order: 1}")
	h.p.retry = h.p.retry.Add(-retryRefused)
	h.commit()
	h.check(client, web, 80, policy.Allow)
	h.check(client, web, 81, policy.Allow)
	if err := h.p.Trouble(); err != nil {
		t.Error(err)
	}
	// The tier stays as long as the policy is in it.
	h.delete("tier", "", "none")
	h.refused("Tier none", "GlobalNetworkPolicy a")
	h.check(client, web, 81, policy.Allow)
	h.delete("gnp", "", "a")
	h.p.retry = h.p.retry.Add(-retryRefused)
	h.commit()
	h.check(client, web, 81, policy.Deny)

	// More than the maps have room for.
	ports := make([]string, 400)
	for i := range ports {
		ports[i] = fmt.Sprint(1000 + 2*i)
	}
	h.put(global("b", "{order: 1, ingress: [{action: Allow, protocol: TCP, destination: {ports: ["+strings.Join(ports, ",")+"]}}, {action: Allow, protocol: TCP, destination: {ports: [81]}}]}") +
		global("c", "{order: 2, ingress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]}"))
	h.refused("GlobalNetworkPolicy b", "map is full", "there is room for 300")
	h.check(client, web, 81, policy.Deny)
	h.check(client, web, 80, policy.Allow)
	if rows, err := h.cfg.Maps.Policy(); err != nil || len(rows) > 20 {
		t.Errorf("%d rows are left (%v)", len(rows), err)
	}

	// Or than anybody knew.
	h.p.room.rows *= 100
	h.p.retry = h.p.retry.Add(-retryRefused)
	for range 2 {
		if _, err := h.p.Commit(context.Background()); !errors.Is(err, kernelmaps.ErrFull) || !strings.Contains(err.Error(), "GlobalNetworkPolicy b") {
			t.Errorf("%v", err)
		}
		h.check(client, web, 81, policy.Deny)
		h.check(client, web, 80, policy.Allow)
	}
	h.p.room.rows /= 100

	// Something that no table can say of one pod: a rule that tells its addresses apart.
	h.put(global("b", "{order: 1, ingress: [{action: Deny, protocol: TCP, destination: {ports: [81]}}]}"))
	h.commit()
	h.put(global("d", "{order: 1, ingress: [{action: Allow, destination: {nets: [10.9.0.0/16]}}]}"))
	h.commit()
	two := h.addPod("", "two", "10.9.0.1", nil)
	two.Addrs = append(two.Addrs, netip.MustParseAddr("10.8.0.1"))
	h.pods[len(h.pods)-1] = two
	h.refused("pod net/two-3/eth0")
	if _, ok := h.p.Pod(two); ok {
		t.Error("the pod that was refused has policy ids")
	}
	h.check(client, web, 81, policy.Deny)
	h.pods = h.pods[:len(h.pods)-1]
	h.commit()
	if err := h.p.Trouble(); err != nil {
		t.Error(err)
	}
}

// Labels of a namespace, a service account and a profile, and what people add to a pod in the store, concern pods at once.
func TestContext(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{})
	e := h.addPod("web", "web", web, map[string]string{"app": "web"})
	h.addPod("clients", "client", client, map[string]string{"app": "client"})
	h.p.Replace(nil)
	for _, test := range []struct{ selector, give, word, namespace, name string }{
		{"pcns.room == 'a'", "apiVersion: v1\nkind: Namespace\nmetadata: {name: web, labels: {room: a}}", "ns", "", "web"},
		{"color == 'red'", published("h1", e, "{color: red, app: lie}", "{node: h1, serviceAccountName: robot, profiles: [p], ports: [{name: http, protocol: TCP, port: 80}], ipNetworks: [192.0.2.1]}"), "wep", "web", EndpointName("h1", e.Key)},
		{"pcsa.role == 'x'", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: robot, namespace: web, labels: {role: x}}", "sa", "web", "robot"},
		{"given == 'yes'", "apiVersion: projectcalico.org/v3\nkind: Profile\nmetadata: {name: p}\nspec: {labelsToApply: {given: 'yes'}, ingress: [{action: Allow}], egress: [{action: Allow}]}", "profile", "", "p"},
	} {
		h.put(global("p", "{selector: \""+test.selector+"\", ingress: [{action: Deny, destination: {}}]}"))
		h.put(published("h1", e, "{app: lie}", "{node: h1, serviceAccountName: robot, profiles: [p], ipNetworks: [192.0.2.1]}"))
		h.put("apiVersion: projectcalico.org/v3\nkind: Profile\nmetadata: {name: p}\nspec: {ingress: [{action: Allow}], egress: [{action: Allow}]}")
		h.commit()
		h.check(client, web, 80, policy.Allow)
		h.put(test.give)
		h.commit()
		h.check(client, web, 80, policy.Deny)
		if test.word != "profile" { // without which the pod may do nothing
			h.delete(test.word, test.namespace, test.name)
			h.commit()
			h.check(client, web, 80, policy.Allow)
		}
	}
	h.put(published("h1", e, "{app: lie}", "{node: h1}") + global("p", "{selector: app == 'lie', ingress: [{action: Deny}]}"))
	h.commit()
	h.check(client, web, 80, policy.Allow) // its own labels it brings itself

	// Another node's endpoint that says to have a pod's address has none; of two others' the younger one has it.
	h.put(other("x", "10.0.0.2", "2026-01-01T00:00:00Z", "{bad: 'yes'}") + other("why", "10.1.0.1", "2026-01-01T00:00:00Z", "{bad: 'yes'}") + other("zed", "10.1.0.1", "2026-01-02T00:00:00Z", "{}"))
	h.put(global("p", "{selector: app == 'web', ingress: [{action: Deny, source: {selector: bad == 'yes'}}, {action: Allow}]}"))
	h.commit()
	h.check(client, web, 80, policy.Allow)
	h.check("10.1.0.1", web, 80, policy.Allow)
	if refused := strings.Join(h.p.State().Refused, "\n"); !strings.Contains(refused, "WorkloadEndpoint web/x: 10.0.0.2 is WorkloadEndpoint clients/h1-") || !strings.Contains(refused, "WorkloadEndpoint web/why: 10.1.0.1 is WorkloadEndpoint web/zed's") {
		t.Error(refused)
	}
	h.delete("wep", "web", "zed")
	h.commit()
	h.check("10.1.0.1", web, 80, policy.Deny)
}

// A pod that is cut off until its policy is in force is not waited for, with or without new rows.
func TestNewPod(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{})
	h.p.Replace(parse(t, denyAll+"---"+allowHTTP))
	h.addPod("", "web", web, map[string]string{"app": "web"})
	h.commit()
	for i, app := range []string{"client", "web", "client"} {
		e := h.addPod("", app, fmt.Sprintf("10.0.0.%d", 2+i), map[string]string{"app": app})
		unknown := uint32(kernelmaps.PolicyUnknown)
		if err := h.cfg.Maps.PutPod(kernelmaps.Pod{IfIndex: uint32(2 + i), Addresses: e.Addrs, PolicyIngress: unknown, PolicyEgress: unknown}); err != nil {
			t.Fatal(err)
		}
		h.check(e.Addrs[0].String(), web, 80, policy.Deny)
		h.p.PutLocal(e)
		r, err := h.p.Commit(context.Background())
		if err != nil || r.Pods != 1 || r.PeersDeleted+r.RowsDeleted > 0 {
			t.Errorf("%s: %+v (%v)", app, r, err)
		}
		for range 2 {
			h.check(client, web, 80, policy.Allow)
			h.check(client, web, 81, policy.Deny)
			if _, err := h.cfg.Maps.Flip(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// What DEL takes out of the maps is there again when the attachment is added again before anybody has noticed, with the same address
// and labels; and when a pod of another node turns out to have the address.
func TestAgain(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{})
	h.p.Replace(parse(t, global("p", "{selector: app == 'web', ingress: [{action: Deny, source: {selector: bad == 'yes'}}, {action: Allow}]}")))
	h.addPod("", "web", web, map[string]string{"app": "web"})
	e := h.addPod("", "client", client, map[string]string{"bad": "yes"})
	h.commit()
	h.check(client, web, 80, policy.Deny)

	at := commit.PodOf(e, 2)
	if err := commit.RemovePod(h.cfg.Maps, at); err != nil {
		t.Fatal(err)
	}
	at.Policy = &policy.PodPolicies{Egress: kernelmaps.PolicyUnknown, Ingress: kernelmaps.PolicyUnknown}
	if err := commit.AddPod(h.cfg.Maps, at); err != nil {
		t.Fatal(err)
	}
	h.pods[1].Created = time.Now()
	h.commit()
	h.check(client, web, 80, policy.Deny)

	h.put(other("moved", client, "2026-01-01T00:00:00Z", "{bad: 'yes'}"))
	h.commit()
	if err := commit.RemovePod(h.cfg.Maps, at); err != nil {
		t.Fatal(err)
	}
	h.pods = h.pods[:1]
	h.commit()
	h.check(client, web, 80, policy.Deny)
}

// What was refused is not forgotten when it could be in force and can't be written.
func TestRefusedNotForgotten(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{})
	h.addPod("", "web", web, map[string]string{"app": "web"})
	h.addPod("", "client", client, nil)
	h.p.Replace(nil)
	h.put(global("a", "{tier: late, selector: app == 'web', ingress: [{action: Deny}]}"))
	h.refused("GlobalNetworkPolicy a")
	h.put("apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: late}\nspec: {order: 1}")
	h.p.retry = time.Time{}
	lock, err := node.LockNode(context.Background(), h.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := h.p.Commit(ctx); !errors.Is(err, node.ErrLocked) {
		t.Errorf("%v, want %v", err, node.ErrLocked)
	}
	lock.Unlock()
	h.commit()
	h.check(client, web, 80, policy.Deny)
	if err := h.p.Trouble(); err != nil {
		t.Error(err)
	}
}

// When the disk is full no change of policy is in force, since the next process would not know of it; but pods that come have the
// policy that there is. When there is room again all is in force.
func TestFullDisk(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{})
	h.kill()
	if err := unix.Mount("tmpfs", h.cfg.Dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(h.cfg.Dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	h.load()
	h.p.Replace(parse(t, global("p", "{selector: app == 'web', ingress: [{action: Deny}]}")))
	h.addPod("", "client", client, nil)
	h.commit()

	ballast := filepath.Join(h.cfg.Dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	for i := range 50 {
		h.put(global(fmt.Sprint("q", i), "{order: 1, selector: \""+strings.Repeat("app == 'web' || ", 100)+"app == 'web'\", ingress: [{action: Allow}]}"))
	}
	e := h.addPod("", "web", web, map[string]string{"app": "web"})
	h.p.SetLocal(h.pods)
	if _, err := h.p.Commit(context.Background()); !errors.Is(err, unix.ENOSPC) || errors.Is(err, ErrRefused) {
		t.Errorf("%v, want %v", err, unix.ENOSPC)
	}
	if _, known := h.p.Pod(e); !known {
		t.Error("the pod's policy is not known")
	}
	h.check(client, web, 80, policy.Deny)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	h.commit()
	h.check(client, web, 80, policy.Allow)
	if err := h.p.Close(); err != nil {
		t.Fatal(err)
	}
	h.load()
	if r := h.commit(); r.Changed {
		t.Errorf("after a restart: %+v", r)
	}
}

func published(nodeName string, e node.Endpoint, labels, spec string) string {
	return fmt.Sprintf("---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {name: %s, namespace: %s, labels: %s}\nspec: %s\n", EndpointName(nodeName, e.Key), namespace(e), labels, spec)
}

func other(name, addr, created, labels string) string {
	return fmt.Sprintf("---\napiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {name: %s, namespace: web, creationTimestamp: '%s', labels: %s}\nspec: {node: h2, ipNetworks: [%s]}\n", name, created, labels, addr)
}

// A policy.db that can't be read is put aside, and nothing is done until somebody says what there is. Ids that are lost, or
// that the maps have with another meaning, do no harm.
func TestLost(t *testing.T) {
	const web, client = "10.0.0.1", "10.0.0.2"
	h := newHost(t, loader.Config{})
	h.addPod("", "web", web, map[string]string{"app": "web"})
	h.addPod("", "client", client, map[string]string{"app": "client"})
	h.p.Replace(nil)
	h.put(denyAll + "---" + allowHTTP)
	h.commit()
	right := func() {
		t.Helper()
		h.check(client, web, 80, policy.Allow)
		h.check(client, web, 81, policy.Deny)
		h.check(web, client, 80, policy.Deny)
	}
	h.kill() // the ids were not saved
	h.load()
	h.commit()
	right()
	if err := h.p.Close(); err != nil {
		t.Fatal(err)
	}
	rows, err := h.cfg.Maps.Policy()
	if err != nil {
		t.Fatal(err)
	}
	for i := range rows { // somebody else's, of the same ids
		rows[i].Action = kernelmaps.PolicyDeny
	}
	if err := h.cfg.Maps.PutPolicy(rows); err != nil {
		t.Fatal(err)
	}
	h.load()
	h.commit()
	right()
	h.kill()

	if err := os.WriteFile(filepath.Join(h.cfg.Dir, fileName), []byte("spoilt"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Resources(context.Background(), h.cfg.Dir); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	h.load()
	h.p.SetLocal(h.pods)
	if _, err := h.p.Commit(context.Background()); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
	right()
	if _, err := os.Stat(filepath.Join(h.cfg.Dir, brokenName)); err != nil {
		t.Error(err)
	}
	h.p.Replace(parse(t, denyAll))
	h.commit()
	h.check(client, web, 80, policy.Deny)
	if all, _, err := Resources(context.Background(), h.cfg.Dir); err != nil || len(all) != 1 {
		t.Errorf("%v (%v)", all, err)
	}
}

// Whatever changes, in whatever order, with whoever is killed in between: the maps say what the evaluator says of all
// resources at once.
func TestChanges(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	h := newHost(t, loader.Config{})
	h.p.Replace(nil)
	all := make(map[string]api.Resource)
	var addrs []string
	for i := range 4 {
		addrs = append(addrs, fmt.Sprintf("10.0.0.%d", i+1))
		h.addPod(pick(r, "a", "b"), fmt.Sprint("pod", i), addrs[i], map[string]string{"app": pick(r, "u", "v", "w")})
	}
	everyone := h.pods
	for i := range 4 {
		addrs = append(addrs, fmt.Sprintf("10.1.0.%d", i+1))
	}
	label := func() string {
		return pick(r, "app == 'u'", "app == 'v'", "has(app)", "pcns.room == 'r'", "all()", "app != 'w'")
	}
	change := func() {
		name, namespace := pick(r, "p", "q", "s"), pick(r, "a", "b")
		texts := []string{
			fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {room: %s}}", namespace, pick(r, "r", "t")),
			fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: own}\nspec: {order: %d, defaultAction: %s}", r.IntN(3)*1_000_000, pick(r, "Pass", "Deny")),
			global(name, fmt.Sprintf("{order: %d, tier: %s, selector: \"%s\", types: [Ingress, Egress], ingress: [{action: %s, source: {selector: \"%s\"}, protocol: TCP, destination: {ports: [%d]}}, {action: %s, source: {nets: [10.1.0.0/30]}}], egress: [{action: %s, destination: {selector: \"%s\"}}]}",
				r.IntN(3), pick(r, "default", "own"), label(), pick(r, "Allow", "Deny", "Pass"), label(), 80+r.IntN(2), pick(r, "Allow", "Deny", "Pass"), pick(r, "Allow", "Deny", "Pass"), label())),
			fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s, namespace: %s}\nspec: {podSelector: {matchLabels: {app: %s}}, ingress: [{from: [{namespaceSelector: {matchLabels: {room: r}}}, {podSelector: {}}], ports: [{port: %d}]}]}", name, namespace, pick(r, "u", "v"), 80+r.IntN(2)),
			other(name, pick(r, addrs[4:]...), "2026-01-01T00:00:00Z", "{app: "+pick(r, "u", "v", "w")+"}"),
			fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: GlobalNetworkSet\nmetadata: {name: %s, labels: {app: %s}}\nspec: {nets: [%s/32, 10.1.0.0/31]}", name, pick(r, "u", "v"), pick(r, addrs...)),
		}
		res := parse(t, pick(r, texts...))[0]
		if _, there := all[res.Key()]; there && r.IntN(2) == 0 {
			delete(all, res.Key())
			h.p.Delete(res.Kind, res.Metadata.Namespace, res.Metadata.Name)
			return
		}
		all[res.Key()] = res
		h.p.Put(res)
	}
	for range 60 {
		for range 1 + r.IntN(4) {
			change()
		}
		was := h.pods
		h.pods = slices.DeleteFunc(slices.Clone(everyone), func(node.Endpoint) bool { return r.IntN(8) == 0 })
		for i, e := range everyone { // those that come are removed and added as DEL and ADD do
			key := func(other node.Endpoint) bool { return other.Key == e.Key }
			if slices.ContainsFunc(h.pods, key) && !slices.ContainsFunc(was, key) {
				m, unknown := h.cfg.Maps, uint32(kernelmaps.PolicyUnknown)
				err := errors.Join(m.RemovePeers([]netip.Prefix{netip.PrefixFrom(e.Addrs[0], 32)}),
					m.PutPod(kernelmaps.Pod{IfIndex: uint32(i + 1), Addresses: e.Addrs, PolicyIngress: unknown, PolicyEgress: unknown}))
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		if r.IntN(10) == 0 {
			if r.IntN(2) == 0 {
				if err := h.p.Tidy(); err != nil {
					t.Fatal(err)
				}
			}
			h.kill()
			h.load()
			h.p.Replace(slices.Collect(maps.Values(all)))
		}
		h.p.SetLocal(h.pods)
		h.p.retry = h.p.retry.Add(-retryRefused)
		if _, err := h.p.Commit(context.Background()); err != nil && !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		if r.IntN(2) == 0 { // the next epoch says the same
			if _, err := h.cfg.Maps.Flip(); err != nil {
				t.Fatal(err)
			}
		}
		// What is refused is left as it was; the model that counts is of what is in force.
		var inForce []api.Resource
		for _, th := range h.p.model.inForce {
			if th.resource != nil {
				inForce = append(inForce, *th.resource)
			}
		}
		saved, _, err := Resources(context.Background(), h.cfg.Dir)
		if err != nil && !errors.Is(err, ErrNoDatabase) || err == nil && len(saved) != len(inForce) {
			t.Fatalf("%d resources are saved, %d in force (%v)", len(saved), len(inForce), err)
		}
		m, err := Model("h1", inForce, h.pods)
		if err != nil && !strings.Contains(err.Error(), "already") { // two may have an address
			t.Fatal(err)
		}
		if err != nil {
			continue
		}
		for _, from := range addrs {
			for _, to := range addrs {
				if from == to {
					continue
				}
				for _, port := range []uint16{80, 81} {
					want := policy.Allow
					packet := policy.Packet{Protocol: 6, Source: netip.MustParseAddr(from), Destination: netip.MustParseAddr(to), SourcePort: 40000, TargetPort: port}
					for _, e := range h.pods {
						id := EndpointID("h1", e)
						if e.Addrs[0] == packet.Source && m.Evaluate(id, policy.Egress, packet).Action != policy.Allow || e.Addrs[0] == packet.Destination && m.Evaluate(id, policy.Ingress, packet).Action != policy.Allow {
							want = policy.Deny
						}
					}
					if slices.ContainsFunc(everyone, func(e node.Endpoint) bool {
						return (e.Addrs[0] == packet.Source || e.Addrs[0] == packet.Destination) && !slices.ContainsFunc(h.pods, func(p node.Endpoint) bool { return p.Key == e.Key })
					}) {
						continue // a pod that is gone but for its entry in caracal_pods
					}
					h.check(from, to, port, want)
				}
			}
		}
		if t.Failed() {
			return
		}
	}
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// Whatever is in policy.db, reading it is an error or what was written.
func FuzzResources(f *testing.F) {
	dir := f.TempDir()
	text, err := parse(f, denyAll)[0].MarshalJSON()
	if err != nil {
		f.Fatal(err)
	}
	if err := save(context.Background(), dir, "h1", map[string][]byte{"/x": text}, &policy.Numbers{}, writing); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(0, []byte{1})
	f.Add(4096, []byte("garbage"))
	f.Add(len(whole)-10, []byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, at int, with []byte) {
		dir := t.TempDir()
		data := slices.Clone(whole)
		if at < 0 || at > len(data) {
			at = len(data)
		}
		copy(data[at:], with)
		if len(with)%2 == 0 {
			data = data[:at]
		}
		if err := os.WriteFile(filepath.Join(dir, fileName), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Resources(context.Background(), dir); err != nil && !errors.Is(err, ErrCorrupt) && !strings.Contains(err.Error(), "version") {
			t.Error(err)
		}
	})
}
