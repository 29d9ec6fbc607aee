package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// The policies of the README, as people apply them.
const denyAll = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all, namespace: default}
spec: {podSelector: {}, policyTypes: [Ingress]}
`

const allowHTTP = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-http, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}, {namespaceSelector: {matchLabels: {team: shop}}}]
    ports: [{protocol: TCP, port: 80}]
`

// podLab is a cluster whose pods are a lab's:
//
//	     h1                    h2
//	kube-apiserver etcd
//	caracald  near         caracald  web, ...
//	      |                     |
//	      +------- switch ------+
type podLab struct {
	*cluster
	*lab.Lab
}

func newPodLab(t testing.TB) *podLab {
	t.Helper()
	return newPodLabOf(t, testenv.Bin(t, "caracal"))
}

// newPodLabOf has a plugin, and arguments for kube-apiserver.
func newPodLabOf(t testing.TB, caracal string, args ...string) *podLab {
	t.Helper()
	testenv.NeedRoot(t)
	l := lab.New(t, lab.Config{Hosts: 2, Cluster: true, Caracal: caracal})
	o := apiserver.On(l.Host(1))
	o.Args = args
	c := startAPI(t, o)
	must(t, os.WriteFile(filepath.Join(l.Dir, "caracalctl.cfg"), []byte("apiVersion: v1\nkind: calicoApiConfig\nspec: {datastoreType: kubernetes, kubeconfig: "+c.Kubeconfig("")+"}\n"), 0o600))
	for _, h := range l.Hosts() {
		c.create(t, "/api/v1/nodes", m{"metadata": m{"name": h.Name}})
	}
	c.create(t, "/apis/projectcalico.org/v3/ippools", m{"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": m{"name": "v4"}, "spec": m{"cidr": "10.244.0.0/16"}})
	return &podLab{c, l}
}

// startAgents starts the agents, and waits until each has the other's routes.
func (p *podLab) startAgents(t testing.TB) {
	t.Helper()
	for _, h := range p.Hosts() {
		must(t, h.StartAgent(t.Context()))
	}
	for _, h := range p.Hosts() {
		eventually(t, h.Name+" has routes", func() error {
			out, err := h.Exec(t.Context(), "caracalctl", "node", "status", "-o", "json")
			if err == nil && !strings.Contains(out, `"Established"`) {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
	}
}

// run is what scheduler, kubelet and runtime do for a pod.
func (p *podLab) run(t testing.TB, host int, namespace, name string, labels map[string]string) *lab.Pod {
	t.Helper()
	h := p.Host(host)
	uid := p.pod(t, namespace, name, h.Name, labels)
	return p.add(t, host, name, lab.PodOptions{Namespace: namespace, UID: uid})
}

// add adds a pod, which serves ports 80 and 81.
func (p *podLab) add(t testing.TB, host int, name string, o lab.PodOptions) *lab.Pod {
	t.Helper()
	pod, err := p.Host(host).AddPod(t.Context(), name, o)
	must(t, err)
	t.Cleanup(func() { _ = p.Host(host).DelPod(context.Background(), name) }) // it may be gone
	for _, port := range []int{80, 81} {
		serve(t, pod, port)
	}
	return pod
}

// end is what a kubelet does with a pod that was deleted.
func (p *podLab) end(t testing.TB, pod *lab.Pod, namespace string) {
	t.Helper()
	must(t, pod.Host().DelPod(t.Context(), pod.Name))
	p.deletePod(t, namespace, pod.Name)
}

func podPath(namespace, name string) string {
	return "/api/v1/namespaces/" + namespace + "/pods/" + name
}

func serve(t testing.TB, p *lab.Pod, port int) {
	t.Helper()
	var l net.Listener
	must(t, p.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go testenv.Echo(l)
}

// How long is waited for what is to come, and for what is not.
const (
	patience = 10 * time.Second
	silence  = 250 * time.Millisecond
)

func dial(from *lab.Pod, to netip.Addr, port int, within time.Duration) (c net.Conn, err error) {
	err = from.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", fmt.Sprintf("%s:%d", to, port), within)
		return err
	})
	return c, err
}

// allowed tells whether a pod can open a connection.
func allowed(from, to *lab.Pod, port int, within time.Duration) bool {
	c, err := dial(from, to.Addr(), port, within)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// check wants a verdict now.
func check(t testing.TB, from, to *lab.Pod, port int, want bool) {
	t.Helper()
	within := silence
	if want {
		within = patience
	}
	if got := allowed(from, to, port, within); got != want {
		t.Errorf("%s to %s port %d: allowed %v, want %v", from.Name, to.Name, port, got, want)
	}
}

// becomes waits for a verdict.
func becomes(t testing.TB, from, to *lab.Pod, port int, want bool) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s to %s port %d allowed: %v", from.Name, to.Name, port, want), func() error {
		if allowed(from, to, port, silence) != want {
			return errors.New("it is not")
		}
		return nil
	})
}

// echo says something on a connection and waits for the answer.
func echo(c net.Conn, within time.Duration) error {
	_ = c.SetDeadline(time.Now().Add(within))
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 1))
	return err
}

func app(name string) map[string]string { return map[string]string{"app": name} }

// policy applies policies, which are gone with the test.
func (p *podLab) policy(t testing.TB, text string) {
	t.Helper()
	for _, path := range p.apply(t, text) {
		t.Cleanup(func() { p.remove(path) })
	}
}

// TestPods is policy of Kubernetes's pods on one lab: most of what it takes is to build that.
func TestPods(t *testing.T) {
	t.Parallel()
	p := newPodLab(t)
	p.startAgents(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *podLab)
	}{
		{"walk", testWalk}, {"labels", testLabels}, {"successor", testSuccessor}, {"unseen", testUnseen}, {"refused", testRefused}, {"away", testAway},
	} {
		if !t.Run(test.name, func(t *testing.T) { test.run(t, p) }) {
			break // what it left is in the others' way
		}
	}
}

// deny-all and allow-http by kubectl, for pods of both hosts; pods that come are under them when ADD returns.
func testWalk(t *testing.T, p *podLab) {
	client := p.run(t, 1, "default", "client", app("client"))
	web := p.run(t, 2, "default", "web", app("web"))
	becomes(t, client, web, 80, true)
	check(t, client, web, 81, true)
	p.Kubectl(denyAll, "apply", "-f", "-")
	becomes(t, client, web, 81, false)
	check(t, client, web, 80, false)
	p.Kubectl(allowHTTP, "apply", "-f", "-")
	becomes(t, client, web, 80, true)
	check(t, client, web, 81, false)
	for i := range 2 {
		late := p.run(t, 2, "default", fmt.Sprint("late", i), app("web"))
		check(t, client, late, 81, false)
		near := p.run(t, 2, "default", fmt.Sprint("near", i), app([]string{"client", "other"}[i%2]))
		check(t, near, late, 81, false)
		check(t, near, late, 80, i%2 == 0)
		p.end(t, near, "default")
		p.end(t, late, "default")
	}
	// The addresses are on the Pods before a kubelet says them, and how the command line calls pods.
	if got := p.annotation(t, podPath("default", "web"), "cni.projectcalico.org/podIPs"); got != web.Addr().String()+"/32" {
		t.Errorf("podIPs: %q", got)
	}
	if got := p.get(t, "/apis/projectcalico.org/v3/workloadendpoints")["items"].([]any); len(got) > 0 {
		t.Errorf("published: %v", got)
	}
	for _, h := range p.Hosts() {
		out, err := h.Exec(t.Context(), "caracalctl", "why", "default/client", "default/web:80")
		if err != nil || !strings.Contains(out, "allow-http") || !strings.Contains(out, "default/client") || strings.Contains(out, "pod:") {
			t.Errorf("%s: why: %v\n%s", h.Name, err, out)
		}
	}
	p.Kubectl(denyAll+"---\n"+allowHTTP, "delete", "-f", "-")
	becomes(t, client, web, 81, true)
	p.end(t, client, "default")
	p.end(t, web, "default")
}

// Labels that change cut flows, and mend them: of a pod, of its namespace.
func testLabels(t *testing.T, p *podLab) {
	p.create(t, "/api/v1/namespaces", m{"metadata": m{"name": "clients", "labels": m{"team": "shop"}}})
	near := p.run(t, 2, "default", "near", app("client"))
	far := p.run(t, 1, "clients", "far", app("any"))
	web := p.run(t, 2, "default", "web", app("web"))
	p.policy(t, denyAll+"---\n"+allowHTTP)
	becomes(t, near, web, 81, false)
	for _, test := range []struct {
		from    *lab.Pod
		path    string
		no, yes m
	}{
		{near, podPath("default", "near"), m{"app": "other"}, m{"app": "client"}},
		{far, "/api/v1/namespaces/clients", m{"team": "other"}, m{"team": "shop"}},
		{near, podPath("default", "web"), m{"app": "other"}, m{"app": "web"}},
	} {
		becomes(t, test.from, web, 80, true)
		flow, err := dial(test.from, web.Addr(), 80, patience)
		must(t, err)
		defer flow.Close()
		must(t, echo(flow, patience))
		p.patch(t, test.path, m{"metadata": m{"labels": test.no}})
		becomes(t, test.from, web, 80, false)
		if err := echo(flow, silence); err == nil {
			t.Errorf("%s: a flow goes on that is denied by now", test.path)
		}
		p.patch(t, test.path, m{"metadata": m{"labels": test.yes}})
		becomes(t, test.from, web, 80, true)
	}
	p.end(t, near, "default")
	p.end(t, far, "clients")
	p.end(t, web, "default")
}

// A pod that comes again under its name, with other labels, is never taken for the one before.
func testSuccessor(t *testing.T, p *podLab) {
	client := p.run(t, 1, "default", "client", app("client"))
	p.policy(t, denyAll+"---\n"+allowHTTP)
	for i := range 4 {
		is := []string{"web", "other"}[i%2]
		db := p.run(t, 2, "default", "db-0", app(is))
		check(t, client, db, 81, false)
		if is == "web" {
			becomes(t, client, db, 80, true) // when h1 has the route, if the block is new
		} else {
			check(t, client, db, 80, false)
		}
		p.end(t, db, "default")
	}
	p.end(t, client, "default")
}

// A pod of which the agent has not heard waits for it, and when nothing comes gets what the configuration says.
func testUnseen(t *testing.T, p *podLab) {
	client := p.run(t, 2, "default", "client", app("client"))
	p.create(t, "/api/v1/namespaces", m{"metadata": m{"name": "free"}})
	p.policy(t, denyAll+"---\n"+allowHTTP)
	other := p.run(t, 2, "default", "probe", app("web"))
	becomes(t, client, other, 81, false)
	becomes(t, client, other, 80, true)

	// What the API says does not reach h2 for a while.
	mend := p.cut(t, p.Host(2))
	uid := p.pod(t, "default", "late", "h2", app("web"))
	added := make(chan *lab.Pod)
	began := time.Now()
	go func() {
		defer close(added)
		pod, err := p.Host(2).AddPod(t.Context(), "late", lab.PodOptions{UID: uid})
		if err != nil {
			t.Error(err)
			return
		}
		added <- pod
	}()
	select {
	case <-added:
		t.Errorf("ADD of a pod that the agent does not know took %s", time.Since(began))
	case <-time.After(300 * time.Millisecond):
	}
	mend()
	late := <-added
	took := time.Since(began)
	serve(t, late, 80)
	serve(t, late, 81)
	check(t, client, late, 80, true)
	check(t, client, late, 81, false)
	t.Logf("heard of after 300 ms: added after %s", took)
	p.end(t, late, "default")

	// One of which nothing comes: cut off where policy has something to say whatever its labels are, else open.
	for _, test := range []struct {
		namespace, unknown string
		want               bool
	}{{"default", "allow", false}, {"free", "allow", true}, {"free", "deny", false}} {
		p.unknown(t, test.unknown)
		began := time.Now()
		never := p.add(t, 2, "never", lab.PodOptions{Namespace: test.namespace})
		if took := time.Since(began); took < time.Second || took > 30*time.Second {
			t.Errorf("%+v: ADD took %s", test, took)
		}
		check(t, client, never, 80, test.want)
		must(t, never.Host().DelPod(t.Context(), "never"))
	}
	p.unknown(t, "allow")
	p.end(t, client, "default")
	p.end(t, other, "default")
}

// unknown sets what pods on h2 get whose policy is not known.
func (p *podLab) unknown(t testing.TB, value string) {
	t.Helper()
	file := p.Host(2).ConfFile()
	text, err := os.ReadFile(file)
	must(t, err)
	var list m
	must(t, json.Unmarshal(text, &list))
	list["plugins"].([]any)[0].(m)["policy"] = m{"unknown": value}
	text, err = json.Marshal(list)
	must(t, err)
	must(t, os.WriteFile(file, text, 0o600))
}

// What can't be put in force or added is said of where people look, and the policy before stays in force.
func testRefused(t *testing.T, p *podLab) {
	client := p.run(t, 2, "default", "client", app("client"))
	web := p.run(t, 2, "default", "web", app("web"))
	policy := func(tier, action string) string {
		return `{apiVersion: projectcalico.org/v3, kind: GlobalNetworkPolicy, metadata: {name: rule}, spec: {order: 1, tier: ` + tier + `, selector: app == 'web', ingress: [{action: ` + action + `}]}}`
	}
	condition := func(want string) {
		t.Helper()
		eventually(t, want, func() error {
			got := p.accepted(t, "/apis/projectcalico.org/v3/globalnetworkpolicies/rule")
			if !strings.Contains(got, want) {
				return fmt.Errorf("%q", got)
			}
			return nil
		})
	}
	p.policy(t, policy("default", "Deny"))
	becomes(t, client, web, 80, false)
	p.apply(t, policy("none", "Allow"))
	condition("there is no Tier none")
	condition("False Invalid")
	check(t, client, web, 80, false)
	// That is told, but no reason for a rollout to wait.
	if out, err := p.Host(1).Exec(t.Context(), "curl", "-sSf", "http://127.0.0.1:9099/readiness"); err != nil || !strings.Contains(out, "ok\npolicy: ") {
		t.Errorf("%s%v", out, err)
	}
	p.apply(t, policy("default", "Allow"))
	condition("True Accepted")
	becomes(t, client, web, 80, true)

	uid := p.pod(t, "default", "twin", "h2", nil)
	began := time.Now()
	if pod, err := p.Host(2).AddPod(t.Context(), "twin", lab.PodOptions{UID: uid, IPs: []netip.Addr{web.Addr()}}); err == nil {
		t.Errorf("%s has %s", pod.Name, web.Addr())
	}
	t.Logf("denied after %s", time.Since(began))
	eventually(t, "the event", func() error {
		if got := fmt.Sprint(p.events(t, uid)); !strings.Contains(got, "NetworkDenied") || !strings.Contains(got, web.Addr().String()) {
			return errors.New(got)
		}
		return nil
	})
	p.deletePod(t, "default", "twin")
	p.end(t, client, "default")
	p.end(t, web, "default")
}

// While the API is away what was heard last stays in force, also for pods that come, with an agent that begins anew and without one.
func testAway(t *testing.T, p *podLab) {
	ctx := t.Context()
	client := p.run(t, 2, "default", "client", app("client"))
	p.policy(t, denyAll+"---\n"+allowHTTP)
	probe := p.run(t, 2, "default", "probe", app("web"))
	becomes(t, client, probe, 81, false)
	becomes(t, client, probe, 80, true)
	uids := make(map[string]string)
	for _, name := range []string{"first", "second", "third"} {
		uids[name] = p.pod(t, "default", name, "h2", app("web"))
	}
	p.awaitPolicyDB(t, uids)
	flow, err := dial(client, probe.Addr(), 80, patience)
	must(t, err)
	defer flow.Close()
	p.Stop()
	try := func(name string) {
		t.Helper()
		began := time.Now()
		pod := p.add(t, 2, name, lab.PodOptions{UID: uids[name]})
		t.Logf("%s: added after %s", name, time.Since(began))
		check(t, client, pod, 80, true)
		check(t, client, pod, 81, false)
		must(t, echo(flow, patience))
	}
	try("first")
	must(t, p.Host(2).Signal(ctx, "caracald", 9))
	try("second")
	must(t, p.Host(2).StartAgent(ctx))
	try("third")
	p.Restart()
	for name := range uids {
		eventually(t, name+" is announced", func() error {
			if p.annotation(t, podPath("default", name), "cni.projectcalico.org/podIPs") == "" {
				return errors.New("it is not")
			}
			return nil
		})
	}
}

// awaitPolicyDB waits until h2 has heard of Pods, and keeps them.
func (p *podLab) awaitPolicyDB(t testing.TB, uids map[string]string) {
	t.Helper()
	eventually(t, "h2 keeps the Pods", func() error {
		text, err := os.ReadFile(filepath.Join(p.Host(2).StateDir(), "policy.db"))
		for _, uid := range uids {
			if err == nil && !strings.Contains(string(text), uid) {
				err = fmt.Errorf("not %s", uid)
			}
		}
		return err
	})
}

// cut keeps what the API says from a host until mend is called.
func (p *podLab) cut(t testing.TB, h *lab.Host) (mend func()) {
	t.Helper()
	route := func(do string) {
		t.Helper()
		_, err := p.Host(1).Exec(t.Context(), "ip", "route", do, "blackhole", h.Addr().String()+"/32")
		must(t, err)
	}
	route("add")
	return func() {
		t.Helper()
		route("del")
	}
}
