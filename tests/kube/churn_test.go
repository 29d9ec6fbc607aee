//go:build cluster

package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/enforce"
	kernel "github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/tools/lab"
)

const (
	churnPolicies   = 200
	churnNamespaces = 4
	churnRounds     = 10
)

// churn is what changes, and what the API has of it.
type churn struct {
	*podLab
	r         *rand.Rand
	resources map[string]api.Resource // by key
	pods      map[string]*lab.Pod     // on h2, by namespace and name
}

// TestChurn changes 200 policies while pods come, go and change their labels. What is always denied is denied to each pod when its ADD
// returns, and what is always allowed is allowed throughout; whenever all has been heard the maps say of each pair of pods what the
// evaluator says of all resources; and in the end nothing is left.
func TestChurn(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	c := &churn{newPodLab(t), rand.New(rand.NewPCG(seed, 0)), make(map[string]api.Resource), make(map[string]*lab.Pod)}
	c.startAgents(t)
	for i := range churnNamespaces {
		c.namespace(t, fmt.Sprint("ns", i), map[string]string{"room": fmt.Sprint("r", i%2)})
	}
	c.namespace(t, "default", nil)
	c.policy(t, denyAll+"---\n"+allowHTTP)
	c.note(t, denyAll+"---\n"+allowHTTP)
	c.run(t, "default", "client", app("client"))
	c.run(t, "default", "web", app("web"))
	c.run(t, "default", "other", app("other"))
	client, web, other := c.pods["default/client"], c.pods["default/web"], c.pods["default/other"]
	becomes(t, other, web, 80, false)
	becomes(t, client, web, 80, true)
	for i := range churnPolicies {
		c.change(t, i)
	}
	slowest := time.Duration(0)
	for round := range churnRounds {
		var wg sync.WaitGroup
		plan := c.r.Perm(churnPolicies)[:40]
		wg.Go(func() {
			for _, i := range plan {
				c.change(t, i)
			}
		})
		over := make(chan struct{})
		var watched sync.WaitGroup
		watched.Go(func() { // what never changes
			for {
				select {
				case <-over:
					return
				default:
				}
				if !allowed(client, web, 80, patience) || allowed(other, web, 80, silence) || allowed(client, web, 81, silence) {
					t.Errorf("round %d: what is not touched is judged otherwise", round)
					return
				}
			}
		})
		for range 8 {
			slowest = max(slowest, c.churnPod(t, other, client))
		}
		wg.Wait()
		close(over)
		watched.Wait()
		c.compare(t)
		if t.Failed() {
			return
		}
	}
	t.Logf("slowest ADD %s", slowest)
	c.empty(t)
}

var churnMu sync.Mutex // of resources and r

func (c *churn) note(t testing.TB, text string) {
	t.Helper()
	all, err := manifest.Parse([]byte(text))
	must(t, err)
	churnMu.Lock()
	defer churnMu.Unlock()
	for _, r := range all {
		c.resources[r.Key()] = r
	}
}

func (c *churn) namespace(t testing.TB, name string, labels map[string]string) {
	t.Helper()
	if name != "default" {
		c.create(t, "/api/v1/namespaces", m{"metadata": m{"name": name, "labels": labels}})
	}
	text, err := json.Marshal(labels)
	must(t, err)
	c.note(t, "{apiVersion: v1, kind: Namespace, metadata: {name: "+name+", labels: "+string(text)+"}}")
}

func (c *churn) pick(from ...string) string {
	churnMu.Lock()
	defer churnMu.Unlock()
	return from[c.r.IntN(len(from))]
}

// change makes a policy another one, or deletes it.
func (c *churn) change(t testing.TB, i int) {
	namespace, name := fmt.Sprint("ns", i%churnNamespaces), fmt.Sprint("p", i)
	path := "/apis/networking.k8s.io/v1/namespaces/" + namespace + "/networkpolicies/" + name
	key := "/networkpolicies.networking.k8s.io/" + namespace + "/" + name
	churnMu.Lock()
	_, there := c.resources[key]
	churnMu.Unlock()
	if there && c.pick("delete", "change", "change") == "delete" {
		c.request(t, "DELETE", path, "application/json", m{})
		churnMu.Lock()
		delete(c.resources, key)
		churnMu.Unlock()
		return
	}
	label := func() string {
		return c.pick("{}", "{matchLabels: {app: a}}", "{matchLabels: {app: b}}", "{matchExpressions: [{key: app, operator: NotIn, values: [c]}]}")
	}
	peer := func() string {
		return c.pick("{podSelector: "+label()+"}", "{namespaceSelector: {matchLabels: {room: r0}}}", "{namespaceSelector: {}, podSelector: "+label()+"}", "{ipBlock: {cidr: 10.244.0.0/25}}")
	}
	rules := func(direction, end string) string {
		return fmt.Sprintf("%s: [{%s: [%s, %s], ports: [{port: %s}]}, {%s: [%s]}]", direction, end, peer(), peer(), c.pick("80", "81", "web"), end, peer())
	}
	text := fmt.Sprintf("{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: %s, namespace: %s}, spec: {podSelector: %s, policyTypes: [%s], %s}}", name, namespace,
		label(), c.pick("Ingress", "Egress, Ingress"), c.pick(rules("ingress", "from"), rules("ingress", "from")+", "+rules("egress", "to")))
	c.apply(t, text)
	c.note(t, text)
}

// run adds a pod to h2.
func (c *churn) run(t testing.TB, namespace, name string, labels map[string]string) time.Duration {
	t.Helper()
	uid := c.pod(t, namespace, name, "h2", labels)
	began := time.Now()
	pod, err := c.Host(2).AddPod(t.Context(), name, lab.PodOptions{Namespace: namespace, UID: uid})
	took := time.Since(began)
	must(t, err)
	serve(t, pod, 80)
	serve(t, pod, 81)
	c.keep(namespace, name, uid, pod, labels)
	return took
}

// keep notes what the API has of a pod.
func (c *churn) keep(namespace, name, uid string, pod *lab.Pod, labels map[string]string) {
	kind, _ := api.FindKind("Pod")
	churnMu.Lock()
	defer churnMu.Unlock()
	c.pods[namespace+"/"+name] = pod
	r := api.Resource{Kind: kind, Metadata: api.Metadata{Name: name, Namespace: namespace, UID: uid, Labels: labels}, Spec: &api.Pod{Node: "h2", IPs: []netip.Addr{pod.Addr()}}}
	c.resources[r.Key()] = r
}

// churnPod has a pod come, go, or change its label; one that comes to the namespace where all but one thing is denied is under that.
func (c *churn) churnPod(t testing.TB, other, client *lab.Pod) time.Duration {
	t.Helper()
	namespace := c.pick("ns0", "ns1", "ns2", "ns3", "default")
	name := namespace + "-" + c.pick("0", "1", "2") // a host of a lab has each name once
	labels := app(c.pick("a", "b", "c"))
	if namespace == "default" {
		labels = app("web")
	}
	full := namespace + "/" + name
	pod, there := c.pods[full]
	switch {
	case there && namespace != "default" && c.pick("label", "end") == "label":
		c.patch(t, podPath(namespace, name), m{"metadata": m{"labels": labels}})
		c.keep(namespace, name, c.resources["/pods/"+full].Metadata.UID, pod, labels)
		return 0
	case there:
		c.endPod(t, namespace, name)
		return 0
	}
	took := c.run(t, namespace, name, labels)
	if namespace == "default" {
		check(t, other, c.pods[full], 80, false)
		check(t, client, c.pods[full], 81, false)
		check(t, client, c.pods[full], 80, true)
	}
	return took
}

func (c *churn) endPod(t testing.TB, namespace, name string) {
	t.Helper()
	full := namespace + "/" + name
	must(t, c.Host(2).DelPod(t.Context(), c.pods[full].Name))
	c.deletePod(t, namespace, name)
	churnMu.Lock()
	defer churnMu.Unlock()
	delete(c.pods, full)
	delete(c.resources, "/pods/"+full)
}

// compare waits until the maps of h2 say what the evaluator says.
func (c *churn) compare(t testing.TB) {
	t.Helper()
	var local []node.Endpoint
	db, err := node.OpenReadOnly(t.Context(), c.Host(2).StateDir(), node.Options{BootIDFile: c.Host(2).BootIDFile()})
	must(t, err)
	must(t, errors.Join(db.View(func(tx *node.Tx) (err error) {
		local, err = tx.AllEndpoints()
		return err
	}), db.Close()))
	model, err := enforce.Model("h2", slices.Collect(maps.Values(c.resources)), local)
	must(t, err)
	k, err := kernel.Open(c.Host(2).BPFDir())
	must(t, err)
	defer k.Close()
	eventually(t, "the maps say what policy says", func() error { return disagree(model, k, local) })
}

func disagree(model *policy.Model, k *kernel.Maps, local []node.Endpoint) error {
	pods, err := k.Pods()
	if err != nil {
		return err
	}
	at := make(map[netip.Addr]kernel.Pod)
	for _, p := range pods {
		for _, a := range p.Addresses {
			at[a] = p
		}
	}
	if len(pods) != len(local) {
		return fmt.Errorf("%d pods in the maps, %d are recorded", len(pods), len(local))
	}
	for _, e := range local {
		for _, o := range local {
			if e.Key == o.Key {
				continue
			}
			for _, port := range []uint16{80, 81, 82} {
				packet := policy.Packet{Protocol: 6, Source: e.Addrs[0], Destination: o.Addrs[0], SourcePort: 40000, TargetPort: port}
				want := model.Flow(packet).Action()
				got := policy.Allow
				for _, end := range []struct {
					id     uint32
					remote netip.Addr
				}{{at[e.Addrs[0]].PolicyEgress, o.Addrs[0]}, {at[o.Addrs[0]].PolicyIngress, e.Addrs[0]}} {
					if end.id == 0 {
						continue
					}
					peer, err := k.Peer(end.remote)
					if err != nil {
						return err
					}
					row, err := k.Decide(end.id, peer.Identity, packet.Protocol, port, packet.SourcePort)
					if err != nil && !errors.Is(err, kernel.ErrNotFound) {
						return err
					}
					if err != nil || row.Action != kernel.PolicyAllow {
						got = policy.Deny
					}
				}
				if got != want {
					return fmt.Errorf("%s to %s port %d: the maps say %s, policy %s", e.PodName, o.PodName, port, got, want)
				}
			}
		}
	}
	return nil
}

// empty deletes all, and makes sure that nothing is left on h2.
func (c *churn) empty(t testing.TB) {
	t.Helper()
	for full := range maps.Clone(c.pods) {
		namespace, name, _ := strings.Cut(full, "/")
		c.endPod(t, namespace, name)
	}
	for i := range churnPolicies {
		c.remove(fmt.Sprintf("/apis/networking.k8s.io/v1/namespaces/ns%d/networkpolicies/p%d", i%churnNamespaces, i))
	}
	k, err := kernel.Open(c.Host(2).BPFDir())
	must(t, err)
	defer k.Close()
	eventually(t, "nothing is left", func() error {
		pods, err1 := k.Pods()
		rows, err2 := k.Policy()
		peers, err3 := k.Peers()
		held, err4 := c.Host(2).Exec(t.Context(), "caracalctl", "ipam", "check")
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			return err
		}
		kept, _, err := enforce.Resources(context.Background(), c.Host(2).StateDir())
		if err != nil {
			return err
		}
		var left []string
		for _, r := range kept {
			if r.Kind.Name == "Pod" || r.Kind.Name == "NetworkPolicy" && r.Metadata.Namespace != "default" {
				left = append(left, r.String())
			}
		}
		if len(pods)+len(rows)+len(peers)+len(left) > 0 {
			return fmt.Errorf("%d pods, %d rows, %d prefixes, %v; %s", len(pods), len(rows), len(peers), left, held)
		}
		return nil
	})
}
