package kube

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/caracal-net/caracal/api"
)

func kindOf(t testing.TB, prefix string) *kind {
	t.Helper()
	i := slices.IndexFunc(kinds, func(k *kind) bool { return k.prefix == prefix })
	if i < 0 {
		t.Fatalf("no kind has keys that begin with %s", prefix)
	}
	return kinds[i]
}

// Each key is of one kind, and a prefix covers those that it may begin keys of.
func TestKinds(t *testing.T) {
	for key, want := range map[string]string{
		"/pods/web/a":            "pods",
		"/blocks/10.0.0.0-26":    "addressblocks.caracal.dev",
		"/nodes/n1":              "caracalnodes.caracal.dev",
		"/networkpolicies/web/a": "networkpolicies.projectcalico.org",
		"/networkpolicies.networking.k8s.io/web/a":           "networkpolicies.networking.k8s.io",
		"/clusternetworkpolicies.policy.networking.k8s.io/a": "clusternetworkpolicies.policy.networking.k8s.io",
		"/other/x": "entries.caracal.dev",
		"/pods":    "entries.caracal.dev",
	} {
		if got := space("").kind(key).String(); got != want {
			t.Errorf("%s is one of the %s, want %s", key, got, want)
		}
		if got := space("/x").kind(key); got != entries {
			t.Errorf("%s of another space is one of the %s", key, got)
		}
	}
	for prefix, want := range map[string]int{
		"": len(kinds), "/": len(kinds), "/pods/": 1, "/pods/web/": 1, "/networkpolicies": 3, "/other/": 1,
	} {
		if got := space("").covered(prefix); len(got) != want {
			t.Errorf("%q covers %v", prefix, got)
		}
	}
	for _, key := range []string{"/ippools/", "/ippools/a/b", "/pods/a", "/pods//a", "/tiers/..", "/tiers/a%2fb"} {
		if _, _, err := space("").kind(key).name(key); err == nil {
			t.Errorf("%s has a name", key)
		}
	}
}

func TestPod(t *testing.T) {
	web := func(change func(p *corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "web", Name: "a", UID: "u", ResourceVersion: "7", Labels: map[string]string{"app": "a"},
				Annotations: map[string]string{annotationPrefix + "ipv4pools": `["p"]`, "other": "x"}},
			Spec: corev1.PodSpec{NodeName: "n1", ServiceAccountName: "default", Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
				{Name: "http", ContainerPort: 80}, {ContainerPort: 81}, {Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP}}}}},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "2001:db8::1"}}},
		}
		change(p)
		return p
	}
	plain := &api.Pod{Node: "n1", ServiceAccount: "default", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")},
		Ports: []api.EndpointPort{{Name: "http", Protocol: api.TCP, Port: 80}, {Name: "dns", Protocol: api.UDP, Port: 53}}}
	for name, test := range map[string]struct {
		change func(p *corev1.Pod)
		want   []string // its addresses; nil: it is not there
	}{
		"running": {func(*corev1.Pod) {}, []string{"10.0.0.1", "2001:db8::1"}},
		"announced": {func(p *corev1.Pod) {
			p.Annotations[podIPsAnnotation], p.Status.PodIPs = "10.0.0.9/32, 2001:db8::9/128", nil
		}, []string{"10.0.0.9", "2001:db8::9"}},
		"announced badly":  {func(p *corev1.Pod) { p.Annotations[podIPsAnnotation], p.Status.PodIPs = "x,/32", nil }, []string{}},
		"claimed":          {func(p *corev1.Pod) { p.Annotations[podIPsAnnotation] = "10.0.0.9/32" }, []string{"10.0.0.1", "2001:db8::1"}},
		"no address yet":   {func(p *corev1.Pod) { p.Status.PodIPs = nil }, []string{}},
		"its node's":       {func(p *corev1.Pod) { p.Spec.HostNetwork = true }, nil},
		"succeeded":        {func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, nil},
		"failed":           {func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, nil},
		"an address twice": {func(p *corev1.Pod) { p.Status.PodIPs[1].IP = "::ffff:10.0.0.1" }, []string{"10.0.0.1"}},
	} {
		kv, there, err := space("").read(kindOf(t, "/pods/"), web(test.change))
		if err != nil || there != (test.want != nil) {
			t.Errorf("%s: there %t, %v", name, there, err)
		}
		if !there {
			continue
		}
		var r api.Resource
		if err := json.Unmarshal(kv.Value, &r); err != nil || r.Key() != "/pods/web/a" || kv.Key != r.Key() || kv.Revision != 7 {
			t.Errorf("%s: %+v of %s at %d: %v", name, r, kv.Key, kv.Revision, err)
			continue
		}
		p := *plain
		p.Announced = name == "announced"
		p.IPs = nil
		for _, a := range test.want {
			p.IPs = append(p.IPs, netip.MustParseAddr(a))
		}
		if diff := cmp.Diff(&p, r.Spec, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if r.Metadata.UID != "u" || r.Metadata.Labels["app"] != "a" || r.Metadata.Annotations["other"] != "" || r.Metadata.Annotations[annotationPrefix+"ipv4pools"] == "" {
			t.Errorf("%s: %+v", name, r.Metadata)
		}
	}
}

func TestService(t *testing.T) {
	proxied := corev1.LoadBalancerIPModeProxy
	ports := []corev1.ServicePort{{Name: "http", Port: 80, NodePort: 30080}, {Port: 53, Protocol: corev1.ProtocolUDP}}
	for name, test := range map[string]struct {
		service corev1.Service
		want    string
	}{
		"cluster IPs": {corev1.Service{Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.9", ClusterIPs: []string{"10.96.0.9", "2001:db8::9"}, Ports: ports}},
			`{"ips":["10.96.0.9","2001:db8::9"],"ports":[{"name":"http","protocol":"TCP","port":80,"nodePort":30080},{"protocol":"UDP","port":53}]}`},
		"headless":      {corev1.Service{Spec: corev1.ServiceSpec{ClusterIP: "None", ClusterIPs: []string{"None"}}}, `{}`},
		"external name": {corev1.Service{Spec: corev1.ServiceSpec{Type: "ExternalName", ExternalIPs: []string{"192.0.2.1"}, Ports: ports}}, `{}`},
		"outside": {corev1.Service{Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.9", ExternalIPs: []string{"192.0.2.1"}}, Status: corev1.ServiceStatus{
			LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "192.0.2.2"}, {IP: "::"}, {IP: "192.0.2.3", IPMode: &proxied}, {Hostname: "x"}}}}},
			`{"ips":["10.96.0.9","192.0.2.1","192.0.2.2"]}`},
	} {
		got, err := json.Marshal(service(&test.service))
		if err != nil || string(got) != test.want {
			t.Errorf("%s: %s, want %s: %v", name, got, test.want, err)
		}
	}
}

// checkRead reads an object as the store does. Its value is JSON, and where it is a resource, writing that says the same again.
func checkRead(t *testing.T, k *kind, o runtime.Object) {
	kv, there, err := space("").read(k, o)
	if err != nil || !there {
		return
	}
	if !strings.HasPrefix(kv.Key, k.prefix) || k != entries && !json.Valid(kv.Value) {
		t.Fatalf("%s: %q", kv.Key, kv.Value)
	}
	var r api.Resource
	if json.Unmarshal(kv.Value, &r) != nil || k.readOnly || r.Key() != kv.Key {
		return
	}
	w, err := space("").write(k, kv.Key, r.Metadata.Name, kv.Value)
	if err != nil {
		t.Fatalf("what was read can't be written: %v: %s", err, kv.Value)
	}
	if !k.custom {
		return
	}
	again, _, err := space("").read(k, &object{ObjectMeta: metav1.ObjectMeta{Name: r.Metadata.Name, Namespace: r.Metadata.Namespace, ResourceVersion: "1",
		Labels: w.Labels, Annotations: w.Annotations}, Spec: w.Spec})
	if err != nil || !bytes.Equal(again.Value, kv.Value) {
		t.Fatalf("read again as %s, was %s: %v", again.Value, kv.Value, err)
	}
}

func FuzzPod(f *testing.F) {
	f.Add([]byte(`{"metadata":{"namespace":"web","name":"a","resourceVersion":"1","annotations":{"cni.projectcalico.org/podIPs":"10.0.0.1/32"}},` +
		`"spec":{"containers":[{"ports":[{"name":"a","containerPort":80}]}]},"status":{"podIPs":[{"ip":"10.0.0.1"}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var p corev1.Pod
		if json.Unmarshal(data, &p) == nil {
			checkRead(t, kindOf(t, "/pods/"), &p)
			if err := pod(&p).Complete(""); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzService(f *testing.F) {
	f.Add([]byte(`{"metadata":{"namespace":"web","name":"a","resourceVersion":"1"},"spec":{"clusterIP":"None","clusterIPs":["10.0.0.1"],` +
		`"ports":[{"port":80,"nodePort":30000,"protocol":"TCP"}]},"status":{"loadBalancer":{"ingress":[{"ip":"::1"}]}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s corev1.Service
		if json.Unmarshal(data, &s) == nil {
			checkRead(t, kindOf(t, "/services/"), &s)
			if err := service(&s).Complete(""); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzObject(f *testing.F) {
	for i, spec := range []string{
		`{"cidr":"10.0.0.0/26","pool":"10.0.0.0/16","node":"n1"}`, `{"cidr":"10.0.0.0/16","vxlanMode":"Always"}`, `{"bgp":{"asNumber":"1.1"}}`,
		`{"tier":"x","ingress":[{"action":"Allow","protocol":"TCP","destination":{"ports":[80,"a","1:2"]}}]}`, `{"key":"/x","value":"AA=="}`,
		`{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"10.0.0.0/8"}}]}]}`,
	} {
		f.Add(uint8(i), []byte(`{"apiVersion":"a/b","kind":"C","metadata":{"namespace":"web","name":"a","resourceVersion":"1","labels":{"a":"b"}},"spec":`+spec+`}`))
	}
	f.Fuzz(func(t *testing.T, which uint8, data []byte) {
		var o object
		if json.Unmarshal(data, &o) != nil {
			return
		}
		for _, k := range kinds {
			if k.custom {
				checkRead(t, k, &o)
			}
		}
	})
}
