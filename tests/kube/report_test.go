package kube_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
)

// TestReports is what nodes tell of pods and policies.
func TestReports(t *testing.T) {
	t.Parallel()
	c := startAPI(t, apiserver.Options{})
	for _, test := range []struct {
		name string
		run  func(*testing.T, *cluster)
	}{{"announce", testAnnounce}, {"denied", testDenied}, {"hanging", testHangingEvents}, {"condition", testCondition}, {"event", testPolicyEvent}} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

// node opens the API as a node does.
func (c *cluster) node(t *testing.T, name string) *kube.Store {
	t.Helper()
	s, err := kube.Open(kube.Config{Kubeconfig: c.Kubeconfig(""), Node: name, QPS: -1})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

// Addresses are announced on the very pod, and not on one of its name that came later.
func testAnnounce(t *testing.T, c *cluster) {
	h := c.node(t, "h1")
	uid := c.pod(t, "default", "web-0", "h1", nil)
	addrs := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")}
	must(t, h.Announce(t.Context(), "default", "web-0", uid, addrs))
	kv, err := h.Get(t.Context(), "/pods/default/web-0")
	must(t, err)
	if !strings.Contains(string(kv.Value), `"podIPs":["10.0.0.1","2001:db8::1"]`) || !strings.Contains(string(kv.Value), `"creationTimestamp":"20`) {
		t.Errorf("%s", kv.Value)
	}
	if got := c.annotation(t, podPath("default", "web-0"), "cni.projectcalico.org/podIP"); got != "10.0.0.1/32" {
		t.Errorf("podIP: %s", got)
	}
	c.deletePod(t, "default", "web-0")
	if err := h.Announce(t.Context(), "default", "web-0", uid, addrs); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a pod that is gone: %v", err)
	}
	c.pod(t, "default", "web-0", "h1", nil)
	if err := h.Announce(t.Context(), "default", "web-0", uid, addrs); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("its successor: %v", err)
	}
	if got := c.annotation(t, podPath("default", "web-0"), "cni.projectcalico.org/podIP"); got != "" {
		t.Errorf("its successor has %s", got)
	}
	c.deletePod(t, "default", "web-0")
}

// A pod that can't be added says so, the same again counts, and many do not flood the API.
func testDenied(t *testing.T, c *cluster) {
	h := c.node(t, "h1")
	uid := c.pod(t, "default", "denied", "h1", nil)
	for range 5 {
		h.Denied("default", "denied", uid, "all pools are exhausted")
	}
	for i := range 50 {
		h.Denied("default", "denied", uid, fmt.Sprint("reason ", i))
	}
	eventually(t, "the events", func() error {
		if got := c.events(t, uid); !slices.Contains(got, "Warning NetworkDenied 5 h1 all pools are exhausted") || len(got) < 2 || len(got) > 10 {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
	c.deletePod(t, "default", "denied")
}

// An event does not wait for ever for an API that takes it and does not answer.
func testHangingEvents(t *testing.T, c *cluster) {
	p := newProxy(t, c.Server)
	given := make(chan time.Duration, 10)
	p.set(first(1, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // else the server does not hear that who asks is gone
		begin := time.Now()
		<-r.Context().Done()
		given <- time.Since(begin)
	}))
	const timeout = 300 * time.Millisecond
	h := open(t, c.Server, kube.Config{Kubeconfig: "/dev/null", Endpoint: p.url, Node: "h1", Timeout: timeout})
	h.Denied("default", "hanging", "uid", "all pools are exhausted")
	select {
	case after := <-given:
		if after < timeout/3 {
			t.Errorf("given up after %s", after)
		}
	case <-time.After(waitLimit):
		t.Error("it is waited for still")
	}
}

// Of many nodes that can't put a policy in force one says so, until the policy is another one or that node can.
func testCondition(t *testing.T, c *cluster) {
	const key = "/globalnetworkpolicies/bad"
	h1, h2 := c.node(t, "h1"), c.node(t, "h2")
	const path = "/apis/projectcalico.org/v3/globalnetworkpolicies/bad"
	apply := func(order string) {
		c.apply(t, `{apiVersion: projectcalico.org/v3, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {order: `+order+`, ingress: [{action: Allow}]}}`)
	}
	t.Cleanup(func() { c.remove(path) })
	check := func(want string) {
		t.Helper()
		if got := c.accepted(t, path); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	prefixes := []string{"/globalnetworkpolicies/", "/adminnetworkpolicies.policy.networking.k8s.io/", "/namespaces/"}
	reported := func(h *kube.Store, want ...string) {
		t.Helper()
		if got, err := h.Reported(t.Context(), prefixes); err != nil || !slices.Equal(got, want) {
			t.Errorf("reported %v (%v), want %v", got, err, want)
		}
	}
	problem := fmt.Errorf("GlobalNetworkPolicy bad: %w: there is no Tier none", api.ErrInvalid)
	full := errors.New("GlobalNetworkPolicy bad: map is full")
	if err := h1.Report(t.Context(), key, problem); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a policy that is not there: %v", err)
	}
	apply("1")
	must(t, h1.Report(t.Context(), key, nil))
	check("") // nobody says of what is good that it is
	must(t, h1.Report(t.Context(), key, problem))
	const first = "False Invalid 1 h1: GlobalNetworkPolicy bad: invalid resource: there is no Tier none"
	check(first)
	reported(h1, key)
	reported(h2)
	must(t, h2.Report(t.Context(), key, full))
	must(t, h2.Report(t.Context(), key, nil))
	check(first)
	must(t, h1.Report(t.Context(), key, nil))
	check("True Accepted 1 ")
	reported(h1)
	must(t, h2.Report(t.Context(), key, full))
	check("False NotInForce 1 h2: GlobalNetworkPolicy bad: map is full")
	apply("2")
	must(t, h1.Report(t.Context(), key, problem)) // what h2 said is of what it was before
	check("False Invalid 2 h1: GlobalNetworkPolicy bad: invalid resource: there is no Tier none")

	// All at once.
	apply("3")
	before := c.get(t, path)["metadata"].(m)["resourceVersion"]
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := c.node(t, fmt.Sprint("n", i)).Report(t.Context(), key, problem); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if after := c.get(t, path)["metadata"].(m)["resourceVersion"]; after == before || !strings.HasPrefix(c.accepted(t, path), "False Invalid 3 n") {
		t.Errorf("at %s, was at %s: %s", after, before, c.accepted(t, path))
	}

	// Who may not says what it lacks.
	may, err := kube.Open(kube.Config{Kubeconfig: c.Kubeconfig("reader"), Node: "h1", QPS: -1})
	must(t, err)
	defer may.Close()
	if err := may.Report(t.Context(), key, problem); !errors.Is(err, store.ErrDenied) || !strings.Contains(err.Error(), "the verb get on globalnetworkpolicies.projectcalico.org") {
		t.Error(err)
	}
}

// A policy that has no status gets an event, one of all nodes.
func testPolicyEvent(t *testing.T, c *cluster) {
	path := c.apply(t, `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: large, namespace: default}, spec: {podSelector: {}}}`)[0]
	defer c.remove(path)
	for _, name := range []string{"h1", "h2", "h1"} {
		must(t, c.node(t, name).Report(t.Context(), "/networkpolicies.networking.k8s.io/default/large", errors.New("map is full")))
	}
	if got, want := c.events(t, c.get(t, path)["metadata"].(m)["uid"].(string)), []string{"Warning NotInForce 1 h1 h1: map is full"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, waitLimit, what, fn)
}
