package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/bolt"
)

// TestPublish: the store has each pod once, is written when something differs and never else, and what is another node's, or
// was added by people, stays.
func TestPublish(t *testing.T) {
	ctx := t.Context()
	s, err := bolt.Open(t.TempDir(), bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	agents := make(map[string]*Agent)
	for _, name := range []string{"h1", "h2"} {
		a := &Agent{Config: Config{Node: name, Log: slog.New(slog.DiscardHandler)}, store: s}
		a.policies = newPolicies(a)
		agents[name] = a
	}
	pod := func(id, addr string) node.Endpoint {
		return node.Endpoint{
			Key: node.Key{Network: "n", ContainerID: id, IfName: "eth0"}, PodName: "p-" + id, PodNamespace: "web",
			Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Labels: map[string]string{"app": id},
		}
	}
	// publish makes pods those of a node, which knows what the store has.
	publish := func(name string, pods ...node.Endpoint) error {
		p := agents[name].policies
		have, err := Endpoints(ctx, s, name)
		if err != nil {
			t.Fatal(err)
		}
		p.published = make(map[string]Published)
		for _, e := range have {
			p.published[e.Key] = e
		}
		p.named, p.listed, p.podsKnown, p.stale, p.pods = true, true, true, true, pods
		return p.publish(ctx)
	}
	revision := func() store.Revision {
		_, r, err := s.List(ctx, "/")
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	names := func(node string) (all []string) {
		have, err := Endpoints(ctx, s, node)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range have {
			all = append(all, e.Resource.Spec.(*api.WorkloadEndpoint).Pod)
		}
		slices.Sort(all)
		return all
	}
	a, b, c := pod("a", "192.0.2.1"), pod("b", "192.0.2.2"), pod("a", "192.0.2.3") // of another node, with the same container id
	if err := errors.Join(publish("h1", a, b), publish("h2", c)); err != nil {
		t.Fatal(err)
	}
	before := revision()
	if err := errors.Join(publish("h1", a, b), publish("h2", c)); err != nil || revision() != before {
		t.Errorf("the same again: revision %d, was %d (%v)", revision(), before, err)
	}

	key := policyKinds["workloadendpoints"].Key("web", enforce.EndpointName("h1", a.Key))
	edit := func(fn func(*api.Resource)) {
		t.Helper()
		kv, err := s.Get(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		var r api.Resource
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			t.Fatal(err)
		}
		fn(&r)
		text, err := json.Marshal(r)
		if err == nil {
			_, err = s.Update(ctx, key, text, kv.Revision)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	edit(func(r *api.Resource) { r.Metadata.Labels["tier"], r.Metadata.Labels["app"] = "gold", "lie" })
	if err := publish("h1", a, b); err != nil {
		t.Fatal(err)
	}
	edit(func(r *api.Resource) {
		if r.Metadata.Labels["tier"] != "gold" || r.Metadata.Labels["app"] != "a" {
			t.Errorf("labels %v", r.Metadata.Labels)
		}
	})
	// A label that the pod brings no more goes, what people added stays.
	a.Labels = nil
	if err := publish("h1", a, b); err != nil {
		t.Fatal(err)
	}
	edit(func(r *api.Resource) {
		if len(r.Metadata.Labels) != 1 || r.Metadata.Labels["tier"] != "gold" {
			t.Errorf("labels %v", r.Metadata.Labels)
		}
	})
	if err := publish("h1", b); err != nil || !slices.Equal(names("h1"), []string{"p-b"}) || !slices.Equal(names("h2"), []string{"p-a"}) {
		t.Errorf("%v and %v (%v)", names("h1"), names("h2"), err)
	}

	// One of our name that says to be another node's is not ours to write.
	if err := publish("h1", a, b); err != nil {
		t.Fatal(err)
	}
	edit(func(r *api.Resource) { r.Spec.(*api.WorkloadEndpoint).Node = "h3" })
	before = revision()
	if err := publish("h1", a, b); !errors.Is(err, store.ErrExists) || !strings.Contains(err.Error(), "n/a/eth0") || revision() != before {
		t.Errorf("%v", err)
	}
	if agents["h1"].policies.named = false; agents["h1"].policies.publish(ctx) != nil || revision() != before {
		t.Error("a node whose name is another host's publishes")
	}
}

// What is asked on the socket before policy is loaded, or by mistake, has an answer.
func TestPolicySocket(t *testing.T) {
	a := &Agent{Config: Config{Node: "h1"}}
	a.policies = newPolicies(a)
	mux := http.NewServeMux()
	a.policies.handle(mux)
	for _, test := range []struct{ method, path, body, want string }{
		{"GET", "/v1/policy", "", `200 {"known":false,`},
		{"GET", "/v1/policy/rules", "", "200 {}"},
		{"POST", "/v1/policy/endpoint", "{", "400 an endpoint of node.db is expected: unexpected EOF"},
		{"POST", "/v1/policy/endpoint", `{"network":"a/b","containerID":"c","ifName":"d"}`, "400 an endpoint of node.db is expected: attachment"},
		{"POST", "/v1/policy/endpoint", `{"network":"` + strings.Repeat("a", maxEndpoint) + `"}`, "400 an endpoint of node.db is expected: http: request body too large"},
		{"GET", "/v1/policy/endpoint", "", "405 "},
	} {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), test.method, test.path, strings.NewReader(test.body)))
		if got := fmt.Sprint(w.Code, " ", w.Body); !strings.HasPrefix(got, test.want) {
			t.Errorf("%s %s: %s, want %s", test.method, test.path, got, test.want)
		}
	}
}

// TestReadPodsSameTime: Linux before 6.13 gives writes of one tick of its clock the same time. Of two the second is not missed.
func TestReadPodsSameTime(t *testing.T) {
	a := newFlowTable(t, 100)
	a.StateDir, a.Node = t.TempDir(), "h1"
	p, err := enforce.Load(context.Background(), enforce.Config{Dir: a.StateDir, Maps: a.maps, Node: a.Node, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	k := &keeper{policies: newPolicies(a), p: p}
	at := time.Now().Add(time.Hour) // however long this takes, it is not over
	for i, id := range []string{"one", "two"} {
		db, err := node.Open(context.Background(), a.StateDir, node.Options{})
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *node.Tx) error {
			return tx.PutEndpoint(node.Endpoint{
				Key: node.Key{Network: "net", ContainerID: id, IfName: "eth0"}, HostIfName: "cali" + id, Netns: "/run/netns/" + id, IPAM: "host-local",
				MAC: "02:00:00:00:00:01", HostMAC: "ee:ee:ee:ee:ee:ee", Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})}, MTU: 1500,
			})
		})
		if err := errors.Join(err, db.Close(), os.Chtimes(filepath.Join(a.StateDir, "node.db"), at, at)); err != nil {
			t.Fatal(err)
		}
		if err := k.readPods(context.Background()); err != nil {
			t.Fatal(err)
		}
		if len(k.pods) != i+1 {
			t.Errorf("%d pods are known, want %d", len(k.pods), i+1)
		}
	}
}

// TestMovedPod: a Pod that came again on another node is none of this one's, also when its end was not heard by itself.
func TestMovedPod(t *testing.T) {
	a := newFlowTable(t, 100)
	a.StateDir, a.Node = t.TempDir(), "h1"
	p, err := enforce.Load(t.Context(), enforce.Config{Dir: a.StateDir, Maps: a.maps, Node: a.Node, Kubernetes: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	k := &keeper{policies: newPolicies(a), p: p, unreadable: make(map[string]error)}
	k.list(nil)
	for i, test := range []struct {
		node, uid string
		want      bool
	}{{"h1", "first", true}, {"h2", "second", false}, {"h1", "third", true}} {
		text, err := json.Marshal(api.Resource{Kind: podKind, Metadata: api.Metadata{Name: "db-0", Namespace: "web", UID: test.uid}, Spec: &api.Pod{Node: test.node}})
		if err != nil {
			t.Fatal(err)
		}
		k.hear(store.Event{KV: store.KV{Key: podKind.Key("web", "db-0"), Value: text, Revision: store.Revision(i + 1)}})
		k.take()
		if _, is := k.mine[podKind.Key("web", "db-0")]; is != test.want {
			t.Errorf("on %s with uid %s: this node's: %t", test.node, test.uid, is)
		}
	}
}
