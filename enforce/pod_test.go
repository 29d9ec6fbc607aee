package enforce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

// pod is a Pod of Kubernetes's in namespace default; its labels are its name's unless others are given.
func pod(name, uid, nodeName, addr string, labels map[string]string) api.Resource {
	spec := &api.Pod{Node: nodeName, ServiceAccount: "default"}
	if addr != "" {
		spec.IPs = []netip.Addr{netip.MustParseAddr(addr)}
	}
	k, _ := api.FindKind("Pod")
	return api.Resource{Kind: k, Metadata: api.Metadata{Name: name, Namespace: "default", UID: uid, Labels: labels, Created: "2026-01-01T00:00:00Z"}, Spec: spec}
}

// addPodOf is addPod for the Pod of a uid.
func (h *host) addPodOf(name, uid, addr string) node.Endpoint {
	h.Helper()
	e := h.addPod("default", name, addr, map[string]string{"app": "not-from-kubernetes"})
	e.PodUID = uid
	h.pods[len(h.pods)-1] = e
	return e
}

func label(app string) map[string]string { return map[string]string{"app": app} }

// What Kubernetes says of a pod counts: of one of this node and of another's, at once, and by its uid.
func TestPods(t *testing.T) {
	const web, client, far = "10.0.0.1", "10.0.0.2", "10.0.1.1"
	h := newHost(t, loader.Config{})
	h.p.Replace(append(parse(t, denyAll+"---"+allowHTTP), pod("web", "u1", "h1", "", label("web"))))
	h.addPodOf("web", "u1", web)
	e := h.addPodOf("client", "u2", client)
	h.commit()
	h.check(client, web, 80, policy.Deny)
	if !h.p.Awaits(e) {
		t.Error("a pod is judged of whose Pod nothing is known")
	}
	if _, is := h.p.Pod(e); is {
		t.Error("it has policy")
	}
	// A Pod of its name that was there before, or comes later, is another one.
	h.p.Put(pod("client", "u0", "h1", client, label("client")))
	h.commit()
	h.check(client, web, 80, policy.Deny)
	h.p.Put(pod("client", "u2", "h1", "", label("client")))
	h.commit()
	h.check(client, web, 80, policy.Allow)
	h.check(client, web, 81, policy.Deny)

	// Labels that change.
	h.p.Put(pod("client", "u2", "h1", "", label("other")))
	h.commit()
	h.check(client, web, 80, policy.Deny)
	h.p.Put(pod("client", "u2", "h1", "", label("client")))
	h.commit()
	h.check(client, web, 80, policy.Allow)

	// Another node's.
	h.check(far, web, 80, policy.Deny)
	h.p.Put(pod("far", "u3", "h2", far, label("client")))
	h.commit()
	h.check(far, web, 80, policy.Allow)
	h.p.Put(pod("far", "u3", "h2", far, label("other")))
	h.commit()
	h.check(far, web, 80, policy.Deny)
	h.p.Put(pod("far", "u3", "h2", far, label("client")))
	h.commit()
	h.delete("pod", "default", "far")
	h.commit()
	h.check(far, web, 80, policy.Deny)

	// What Kubernetes forgets, or has another of the same name for elsewhere, stays what it was until its containers are gone.
	h.p.Put(pod("web", "u9", "h2", "10.0.1.9", label("client")))
	h.delete("pod", "default", "client")
	h.commit()
	h.check(client, web, 80, policy.Allow)
	h.check("10.0.1.9", web, 80, policy.Allow)
	h.check(client, web, 81, policy.Deny)
	h.pods = h.pods[:1]
	h.commit()
	h.check(client, web, 80, policy.Deny)
}

// Who begins anew knows the Pods that there were, and judges none that it does not know.
func TestPodsWithoutAgent(t *testing.T) {
	const web, client, unseen = "10.0.0.1", "10.0.0.2", "10.0.0.3"
	h := newHost(t, loader.Config{})
	h.p.Replace(append(parse(t, denyAll+"---"+allowHTTP), pod("web", "u1", "h1", "", label("web")), pod("client", "u2", "h1", "", label("client"))))
	h.addPodOf("web", "u1", web)
	h.commit()
	h.kill()
	h.cfg.Node = "" // as the plugin
	h.load()
	h.addPodOf("client", "u2", client)
	e := h.addPodOf("unseen", "u3", unseen)
	h.commit()
	h.check(client, web, 80, policy.Allow)
	h.check(client, web, 81, policy.Deny)
	if !h.p.Awaits(e) {
		t.Error("a pod is judged of whose Pod nothing is known")
	}
	for _, test := range []struct {
		policy string
		want   bool
	}{{"", true}, {"deny-all", false}} { // which says something about any pod
		if test.policy != "" {
			h.delete(netpol, "default", test.policy)
			h.commit()
		}
		if selects, err := Selects(context.Background(), h.cfg.Dir, e); err != nil || selects != test.want {
			t.Errorf("without %q: selects it: %v, %v", test.policy, selects, err)
		}
	}
}

// A pod that a kubelet reads from a file has one uid there and another in Kubernetes.
func TestMirrorPod(t *testing.T) {
	h := newHost(t, loader.Config{})
	mirror := pod("web", "u1", "h1", "", label("web"))
	mirror.Metadata.Annotations = map[string]string{MirrorAnnotation: "hash"}
	h.p.Replace(append(parse(t, denyAll), mirror))
	if e := h.addPodOf("web", "hash", "10.0.0.1"); h.p.Awaits(e) {
		t.Error("it is awaited")
	}
	h.commit()
	h.check("10.0.0.2", "10.0.0.1", 80, policy.Deny)
}

// An address that two Pods have is the younger one's, and a problem only when it stays so.
func TestContestedPods(t *testing.T) {
	const web, far = "10.0.0.1", "10.0.1.1"
	h := newHost(t, loader.Config{})
	old, young := pod("old", "u2", "h2", far, label("client")), pod("young", "u3", "h3", far, label("other"))
	young.Metadata.Created = "2026-01-02T00:00:00Z"
	h.p.Replace(append(parse(t, denyAll+"---"+allowHTTP), pod("web", "u1", "h1", "", label("web")), old, young))
	h.addPodOf("web", "u1", web)
	h.commit()
	h.check(far, web, 80, policy.Deny)
	if err := h.p.Trouble(); err != nil {
		t.Error(err)
	}
	h.p.model.contested[netip.MustParseAddr(far)] = time.Now().Add(-contestedFor)
	if err := h.p.Trouble(); err == nil || !strings.Contains(err.Error(), "Pod default/old: 10.0.1.1 is Pod default/young's") {
		t.Error(err)
	}
	h.delete("pod", "default", "young")
	h.commit()
	h.check(far, web, 80, policy.Allow)
	claims := pod("claims", "u4", "h3", far, label("other")) // by an annotation, which anybody can write
	claims.Metadata.Created, claims.Spec.(*api.Pod).Announced = "2026-01-03T00:00:00Z", true
	h.p.Put(claims)
	h.commit()
	h.check(far, web, 80, policy.Allow)
	for want, other := range map[string]api.Resource{"default/pod:young": young, "default/pod:old": claims} {
		m, err := Model("h1", []api.Resource{old, other}, nil)
		if err != nil || m.At(netip.MustParseAddr(far)).ID != want {
			t.Errorf("%+v, want %s, %v", m.At(netip.MustParseAddr(far)), want, err)
		}
	}
}

// What changes about a Pod costs its own conversion, however many there are.
func BenchmarkPodChange(b *testing.B) {
	h := newHost(b, loader.Config{})
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	all := somePolicies(b, 200)
	for i := range 5000 {
		r := pod(fmt.Sprintf("app%d-5d4f8c7b9-%05d", i%50, i), fmt.Sprintf("0b7f6e1c-7f0e-4a52-9c1d-%012d", i), fmt.Sprint("h", 2+i/100), fmt.Sprintf("10.%d.%d.%d", 1+i/65536, i/256%256, i%256), map[string]string{
			"app": fmt.Sprint("app", i%50), "pod-template-hash": fmt.Sprint("5d4f8c7b", i%50), "app.kubernetes.io/name": "shop", "app.kubernetes.io/part-of": "shop",
		})
		r.Metadata.Namespace = fmt.Sprint("ns", i%20)
		all = append(all, r)
	}
	for i := range 100 {
		h.addPodOf(fmt.Sprint("local", i), fmt.Sprint("u", i), fmt.Sprintf("10.9.0.%d", i))
		all = append(all, pod(fmt.Sprint("local", i), fmt.Sprint("u", i), "h1", "", label(fmt.Sprint("app", i%50))))
	}
	h.p.Replace(all)
	all = nil
	h.commit()
	megabytes := float64(heap()-before) / 1e6
	for n := 0; b.Loop(); n++ {
		h.p.Put(pod("local7", "u7", "h1", "", label(fmt.Sprint("app", n%50))))
		if _, err := h.p.Commit(context.Background()); err != nil && !errors.Is(err, ErrRefused) {
			b.Fatal(err)
		}
	}
	b.ReportMetric(megabytes, "MB")
}
