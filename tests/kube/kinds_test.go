package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/storetest"
	"github.com/caracal-net/caracal/tests/kube/apiserver"
)

// manifests is one of each kind, as people write them.
const manifests = `
apiVersion: v1
kind: Namespace
metadata: {name: web, labels: {team: a}, annotations: {cni.projectcalico.org/ipv4pools: '["pods"]', other: x}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: front, namespace: web, labels: {role: front}}
automountServiceAccountToken: false
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: web}
spec: {clusterIP: 10.96.0.80, selector: {app: front}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: web, labels: {app: front}}
spec: {serviceAccountName: front, nodeName: n1, containers: [{name: c, image: i, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: web}
spec: {hostNetwork: true, containers: [{name: c, image: i}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow, namespace: web}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: front}}}], ports: [{port: http}, {port: 90, endPort: 95}]}]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: allow, namespace: web}
spec: {order: 10, selector: app == 'front', ingress: [{action: Allow, protocol: TCP, destination: {ports: [80, "90:95"]}}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: deny}
spec: {order: 1000.5, types: [Ingress, Egress]}
---
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {name: office, namespace: web, labels: {net: office}}
spec: {nets: [192.0.2.0/24]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: all, labels: {net: all}}
spec: {nets: [198.51.100.0/24, "2001:db8::/32"]}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: security}
spec: {order: 5, defaultAction: Pass}
---
apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: open}
spec: {ingress: [{action: Allow}], labelsToApply: {a: b}}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: pods}
spec: {cidr: 10.244.0.0/16, natOutgoing: true, vxlanMode: CrossSubnet}
---
apiVersion: projectcalico.org/v3
kind: BGPConfiguration
metadata: {name: default}
spec: {asNumber: 64513, nodeToNodeMeshEnabled: false}
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {name: rack}
spec: {peerIP: 192.0.2.1, asNumber: 64514, nodeSelector: all()}
---
apiVersion: projectcalico.org/v3
kind: BGPFilter
metadata: {name: few}
spec: {exportV4: [{action: Reject, cidr: 10.0.0.0/8, matchOperator: In}]}
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: n1-cni-x-eth0, namespace: default}
spec: {node: n1, workload: x, interfaceName: cali0, ipNetworks: [10.244.0.5/32]}
---
apiVersion: caracal.dev/v1
kind: CaracalNode
metadata: {name: n1, labels: {rack: "1"}}
spec: {bgp: {asNumber: 64513, ipv4Address: 192.0.2.11/24}}
---
apiVersion: caracal.dev/v1
kind: AddressBlock
metadata: {name: 10.244.0.0-26}
spec: {cidr: 10.244.0.0/26, pool: 10.244.0.0/16, node: n1}
`

// What people write by kubectl is there, each kind under its keys, in the form in which the agents read it.
func everyKind(t *testing.T, s *apiserver.Server) {
	ctx := storetest.Context(t)
	k := open(t, s, kube.Config{})
	_, before, err := k.List(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	w, err := k.Watch(ctx, "/", before)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s.Kubectl(manifests, "apply", "-f", "-")

	kvs, at, err := k.List(ctx, "/")
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]store.KV)
	for _, kv := range kvs {
		got[kv.Key] = kv
		if kv.Revision > at {
			t.Errorf("%s of revision %d in a list of %d", kv.Key, kv.Revision, at)
		}
		if strings.HasPrefix(kv.Key, "/blocks/") {
			continue
		}
		var r api.Resource
		if err := json.Unmarshal(kv.Value, &r); err != nil || r.Key() != kv.Key {
			t.Errorf("%s is %s: %v", kv.Key, r, err)
		}
		if again, err := json.Marshal(r); err != nil || string(again) != string(kv.Value) {
			t.Errorf("%s: %s is not what the agents write: %s", kv.Key, kv.Value, again)
		}
	}
	for key, want := range map[string]string{
		"/blocks/10.244.0.0-26":                        `{"cidr":"10.244.0.0/26","pool":"10.244.0.0/16","node":"n1"}`,
		"/namespaces/web":                              `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"web","labels":{"kubernetes.io/metadata.name":"web","team":"a"},"annotations":{"cni.projectcalico.org/ipv4pools":"[\"pods\"]"}},"spec":{}}`,
		"/serviceaccounts/web/front":                   `{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"front","namespace":"web","labels":{"role":"front"}},"spec":{}}`,
		"/services/web/front":                          `{"apiVersion":"v1","kind":"Service","metadata":{"name":"front","namespace":"web"},"spec":{"ips":["10.96.0.80"],"ports":[{"name":"http","protocol":"TCP","port":80}]}}`,
		"/nodes/n1":                                    `{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"n1","labels":{"rack":"1"}},"spec":{"bgp":{"asNumber":64513,"ipv4Address":"192.0.2.11/24"}}}`,
		"/networkpolicies/web/allow":                   `{"apiVersion":"projectcalico.org/v3","kind":"NetworkPolicy","metadata":{"name":"allow","namespace":"web"},"spec":{"tier":"default","order":10,"selector":"app == 'front'","types":["Ingress"],"ingress":[{"action":"Allow","protocol":"TCP","destination":{"ports":[80,"90:95"]}}]}}`,
		"/networkpolicies.networking.k8s.io/web/allow": `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"allow","namespace":"web"},"spec":{"podSelector":{},"ingress":[{"ports":[{"protocol":"TCP","port":"http"},{"protocol":"TCP","port":90,"endPort":95}],"from":[{"podSelector":{"matchLabels":{"app":"front"}}}]}],"policyTypes":["Ingress"]}}`,
		"/globalnetworkpolicies/deny":                  "", "/networksets/web/office": "", "/globalnetworksets/all": "", "/tiers/security": "", "/profiles/open": "",
		"/ippools/pods": "", "/bgpconfigurations/default": "", "/bgppeers/rack": "", "/bgpfilters/few": "", "/workloadendpoints/default/n1-cni-x-eth0": "", "/pods/web/front": "",
	} {
		kv, ok := got[key]
		if !ok || want != "" && string(kv.Value) != want {
			t.Errorf("%s (there: %t): %s, want %s", key, ok, kv.Value, want)
		}
		one, err := k.Get(ctx, key)
		if err != nil || string(one.Value) != string(kv.Value) || one.Revision != kv.Revision {
			t.Errorf("get %s: %s at %d, listed %s at %d: %v", key, one.Value, one.Revision, kv.Value, kv.Revision, err)
		}
	}
	if _, err := k.Get(ctx, "/pods/web/host"); !errors.Is(err, store.ErrNotFound) || got["/pods/web/host"].Value != nil {
		t.Errorf("a pod on its node's own network is there: %v", err)
	}

	// The watch has told the same.
	told := make(map[string]store.KV)
	var last = make(map[string]store.Revision)
	for !converged(told, kvs, before) {
		e := storetest.Next(t, w)
		if told[e.Key] = e.KV; e.Deleted {
			t.Errorf("%s was deleted", e.Key)
		}
		kind := strings.SplitN(e.Key, "/", 3)[1]
		if e.Revision <= last[kind] {
			t.Errorf("%s at %d after %d", e.Key, e.Revision, last[kind])
		}
		last[kind] = e.Revision
	}

	// Each can be written by its own value, which changes nothing, and be deleted and created again.
	for key, kv := range got {
		kind := strings.SplitN(key, "/", 3)[1]
		if kind == "pods" || kind == "services" {
			for what, err := range map[string]error{"update": second(k.Update(ctx, key, kv.Value, kv.Revision)), "delete": k.Delete(ctx, key, 0)} {
				if !errors.Is(err, store.ErrInvalid) || !strings.Contains(err.Error(), "kubectl") {
					t.Errorf("%s %s: %v", what, key, err)
				}
			}
			continue
		}
		if at, err := k.Update(ctx, key, kv.Value, 0); err != nil || kind != "namespaces" && kind != "networkpolicies.networking.k8s.io" && at < kv.Revision {
			t.Errorf("update %s: %d, %v", key, at, err)
		}
		if kind == "namespaces" || kind == "serviceaccounts" {
			continue
		}
		now, err := k.Get(ctx, key)
		if err != nil || string(now.Value) != string(kv.Value) {
			t.Errorf("%s after an update: %s: %v", key, now.Value, err)
		}
		if err := k.Delete(ctx, key, now.Revision+1); !errors.Is(err, store.ErrConflict) {
			t.Errorf("delete %s at another revision: %v", key, err)
		}
		if err := k.Delete(ctx, key, now.Revision); err != nil {
			t.Errorf("delete %s: %v", key, err)
		}
		if _, err := k.Update(ctx, key, kv.Value, now.Revision); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("update %s, which is gone: %v", key, err)
		}
		if at, err := k.Create(ctx, key, kv.Value); err != nil || at <= now.Revision {
			t.Errorf("create %s: %d, %v", key, at, err)
		}
		if _, err := k.Create(ctx, key, kv.Value); !errors.Is(err, store.ErrExists) {
			t.Errorf("create %s twice: %v", key, err)
		}
	}
	for what, err := range map[string]error{
		"no resource":         second(k.Create(ctx, "/ippools/x", []byte("x"))),
		"another's key":       second(k.Create(ctx, "/ippools/x", got["/ippools/pods"].Value)),
		"no name":             second(k.Create(ctx, "/ippools/", got["/ippools/pods"].Value)),
		"no block":            second(k.Create(ctx, "/blocks/x", []byte(`{"cidr":"10.0.0.0/26","pod":"x"}`))),
		"no such namespace":   second(k.Create(ctx, "/networksets/nowhere/x", []byte(`{"apiVersion":"projectcalico.org/v3","kind":"NetworkSet","metadata":{"name":"x","namespace":"nowhere"},"spec":{}}`))),
		"a name with a colon": second(k.Create(ctx, "/tiers/a:b", []byte(`{"apiVersion":"projectcalico.org/v3","kind":"Tier","metadata":{"name":"a:b"},"spec":{}}`))),
	} {
		if !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// converged tells whether a watch has told all that is newer than a revision.
func converged(told map[string]store.KV, kvs []store.KV, after store.Revision) bool {
	return !slices.ContainsFunc(kvs, func(kv store.KV) bool {
		return kv.Revision > after && (told[kv.Key].Revision < kv.Revision || string(told[kv.Key].Value) != string(kv.Value))
	})
}

// kubectl shows of each kind what counts.
func columns(t *testing.T, s *apiserver.Server) {
	s.Kubectl("", "patch", "globalnetworkpolicy", "deny", "--subresource=status", "--type=merge", "-p",
		`{"status":{"conditions":[{"type":"Accepted","status":"True","reason":"InForce","message":"it is in force","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}`)
	for arg, want := range map[string][]string{
		"ippools":      {"NAME CIDR NAT BLOCK SIZE VXLAN DISABLED NODES ACCEPTED AGE", "pods 10.244.0.0/16 true 26 CrossSubnet"},
		"caracalnodes": {"NAME IPV4 IPV6 AS ACCEPTED AGE", "n1 192.0.2.11/24 64513"},
		"blocks":       {"NAME CIDR POOL NODE AGE", "10.244.0.0-26 10.244.0.0/26 10.244.0.0/16 n1"},
		"bgpconfig":    {"NAME AS MESH ACCEPTED AGE", "default 64513 false"},
		"bgppeers":     {"NAME PEER AS NODE NODES ACCEPTED AGE", "rack 192.0.2.1 64514 all()"},
		"networkpolicies.projectcalico.org -n web": {"NAME TIER ORDER SELECTOR ACCEPTED AGE", "allow default 10 app == 'front'"},
		"gnp":            {"NAME TIER ORDER SELECTOR ACCEPTED AGE", "deny default 1000.5 True"},
		"netsets -n web": {"NAME NETS ACCEPTED AGE", `office ["192.0.2.0/24"]`},
		"tiers":          {"NAME ORDER DEFAULT ACTION ACCEPTED AGE", "security 5 Pass"},
		"wep":            {"NAME NODE WORKLOAD NETWORKS INTERFACE AGE", `n1-cni-x-eth0 n1 x ["10.244.0.5/32"] cali0`},
		"caracal":        {"ippool.projectcalico.org/pods", "addressblock.caracal.dev/10.244.0.0-26"},
	} {
		out := s.Kubectl("", append([]string{"get"}, strings.Fields(arg)...)...)
		lines := strings.Split(out, "\n")
		for i, l := range lines {
			lines[i] = strings.Join(strings.Fields(l), " ")
		}
		for _, w := range want {
			if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, w) }) {
				t.Errorf("kubectl get %s: no %q:\n%s", arg, w, out)
			}
		}
	}
}

// The API itself refuses what is of another type.
func refused(t *testing.T, s *apiserver.Server) {
	k := open(t, s, kube.Config{})
	for what, want := range map[string]string{
		`{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"x"},"spec":{}}`:                                             "spec.cidr: Required value",
		`{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"x"},"spec":{"cidr":"10.0.0.0/16","vxlanMode":"always"}}`:    `supported values: "Always"`,
		`{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"x"},"spec":{"cidr":"10.0.0.0/16","natOutgoing":"yes"}}`:     "must be of type boolean",
		`{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"x"},"spec":{"ingress":[{"action":"Reject"}]}}`: `spec.ingress[0].action: Unsupported value`,
		`{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"x"},"spec":{"order":"first"}}`:                 "spec.order",
		`{"apiVersion":"caracal.dev/v1","kind":"AddressBlock","metadata":{"name":"x"}}`:                                                       "spec: Required value",
	} {
		if out, err := s.TryKubectl(what, "create", "-f", "-"); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v: %s", what, err, out)
		}
	}
	// What nothing here knows is kept, for the agents to refuse.
	s.Kubectl(`{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"x"},"spec":{"ingress":[{"action":"Allow","sauce":{}}]}}`, "create", "-f", "-")
	kv, err := k.Get(storetest.Context(t), "/globalnetworkpolicies/x")
	if err != nil || json.Unmarshal(kv.Value, &api.Resource{}) == nil || !strings.Contains(string(kv.Value), "sauce") {
		t.Errorf("a policy with an unknown field: %s, %v", kv.Value, err)
	}
	s.Kubectl("", "delete", "gnp", "x")
}

// A watch tells of a pod what is something to a network, once.
func pods(t *testing.T, s *apiserver.Server) {
	ctx := storetest.Context(t)
	k := open(t, s, kube.Config{})
	w := storetest.Follow(ctx, t, k, "/pods/web/")
	status := func(name, status string) {
		s.Kubectl("", "patch", "pod", "-n", "web", name, "--subresource=status", "--type=merge", "-p", `{"status":`+status+`}`)
	}
	next := func() (store.Event, *api.Pod) {
		e := storetest.Next(t, w)
		var r api.Resource
		if !e.Deleted {
			if err := json.Unmarshal(e.Value, &r); err != nil {
				t.Fatal(err)
			}
			return e, r.Spec.(*api.Pod)
		}
		return e, nil
	}
	create := func(name string, more string) {
		s.Kubectl(fmt.Sprintf(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":%q,"namespace":"web"},"spec":{%s"containers":[{"name":"c","image":"i"}]}}`, name, more), "create", "-f", "-")
	}
	create("host2", `"hostNetwork":true,`)
	status("host2", `{"podIPs":[{"ip":"192.0.2.11"}],"podIP":"192.0.2.11"}`)
	create("job", "")
	if e, p := next(); e.Key != "/pods/web/job" || len(p.IPs) != 0 {
		t.Errorf("created: %+v", e)
	}
	status("job", `{"phase":"Pending","message":"something"}`)
	status("job", `{"phase":"Running","podIPs":[{"ip":"10.244.0.9"}],"podIP":"10.244.0.9"}`)
	if e, p := next(); len(p.IPs) != 1 || p.IPs[0].String() != "10.244.0.9" {
		t.Errorf("running: %+v", e)
	}
	s.Kubectl("", "annotate", "pod", "-n", "web", "job", "other=x")
	s.Kubectl("", "label", "pod", "-n", "web", "job", "app=job")
	if e, _ := next(); !strings.Contains(string(e.Value), `"app":"job"`) {
		t.Errorf("labelled: %+v", e)
	}
	status("job", `{"phase":"Succeeded"}`)
	if e, _ := next(); !e.Deleted || e.Key != "/pods/web/job" || e.Value != nil {
		t.Errorf("succeeded: %+v", e)
	}
	if _, err := k.Get(ctx, "/pods/web/job"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("get: %v", err)
	}
	create("last", "")
	if e, _ := next(); e.Key != "/pods/web/last" {
		t.Errorf("an event that should not be: %+v", e)
	}
}

// What is a node's belongs to Kubernetes's Node, who so deletes it with that. A change leaves the rest of the object as it is.
func owners(t *testing.T, s *apiserver.Server) {
	ctx := storetest.Context(t)
	k := open(t, s, kube.Config{})
	s.Kubectl(`{"apiVersion":"v1","kind":"Node","metadata":{"name":"n2"}}`, "create", "-f", "-")
	uid := s.Kubectl("", "get", "node", "n2", "-o", "jsonpath={.metadata.uid}")
	block := []byte(`{"cidr":"10.244.1.0/26","pool":"10.244.0.0/16","node":"n2"}`)
	at, err := k.Create(ctx, "/blocks/10.244.1.0-26", block)
	if err != nil {
		t.Fatal(err)
	}
	node := []byte(`{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"n2"},"spec":{}}`)
	if _, err := k.Create(ctx, "/nodes/n2", node); err != nil {
		t.Fatal(err)
	}
	owner := func(object string) string {
		return s.Kubectl("", "get", object, "-o", `jsonpath={range .metadata.ownerReferences[*]}{.kind} {.name} {.uid}{end}`)
	}
	for _, object := range []string{"addressblock/10.244.1.0-26", "caracalnode/n2"} {
		if got := owner(object); got != "Node n2 "+uid {
			t.Errorf("%s belongs to %q", object, got)
		}
	}
	// To a node that Kubernetes does not know it can't belong.
	if at, err = k.Update(ctx, "/blocks/10.244.1.0-26", []byte(strings.ReplaceAll(string(block), "n2", "bare")), at); err != nil {
		t.Fatal(err)
	}
	if got := owner("addressblock/10.244.1.0-26"); got != "" {
		t.Errorf("the block of a node that is none of Kubernetes's belongs to %q", got)
	}
	s.Kubectl("", "annotate", "addressblock", "10.244.1.0-26", "note=x")
	if _, err := k.Update(ctx, "/blocks/10.244.1.0-26", block, at); !errors.Is(err, store.ErrConflict) {
		t.Errorf("update of what kubectl has changed: %v", err)
	}
	s.Kubectl("", "patch", "caracalnode", "n2", "--type=merge", "-p", `{"metadata":{"finalizers":["example.com/x"]}}`)
	if _, err := k.Update(ctx, "/nodes/n2", []byte(strings.Replace(string(node), `"spec":{}`, `"spec":{"bgp":{"asNumber":1}}`, 1)), 0); err != nil {
		t.Fatal(err)
	}
	if got := s.Kubectl("", "get", "caracalnode", "n2", "-o", "jsonpath={.metadata.finalizers} {.spec.bgp.asNumber}"); got != `["example.com/x"] 1` {
		t.Errorf("after an update: %s", got)
	}
	s.Kubectl("", "patch", "caracalnode", "n2", "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	s.Kubectl("", "delete", "caracalnode/n2", "addressblock/10.244.1.0-26", "node/n2")
}

// snapshot writes to one kind and then to another, again and again: no list shows the second one ahead of the first, or two behind.
func snapshot(t *testing.T, s *apiserver.Server) {
	k := open(t, s, kube.Config{})
	set := func(ctx context.Context, key, kind string, n int) error {
		_, name, _ := strings.Cut(key[1:], "/")
		_, err := k.Update(ctx, key, fmt.Appendf(nil, `{"apiVersion":"projectcalico.org/v3","kind":%q,"metadata":{"name":%q,"annotations":{"n":"%d"}},"spec":{}}`, kind, name, n), 0)
		return err
	}
	ctx, cancel := context.WithCancel(storetest.Context(t))
	written := make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			// Profiles are listed before tiers.
			if err := errors.Join(set(ctx, "/tiers/counter", "Tier", n), set(ctx, "/profiles/counter", "Profile", n)); err != nil {
				written <- err
				return
			}
		}
	}()
	for seen := 0; seen < 30; {
		kvs, _, err := k.List(ctx, "/")
		if err != nil {
			t.Fatal(err)
		}
		n := map[string]int{"/tiers/counter": -1, "/profiles/counter": -1}
		for _, kv := range kvs {
			var r api.Resource
			if _, ok := n[kv.Key]; ok && json.Unmarshal(kv.Value, &r) == nil {
				n[kv.Key], _ = strconv.Atoi(r.Metadata.Annotations["n"])
				seen++
			}
		}
		if tier, profile := n["/tiers/counter"], n["/profiles/counter"]; tier != profile && tier != profile+1 {
			t.Fatalf("tier %d and profile %d at once", tier, profile)
		}
	}
	cancel()
	<-written
	for _, key := range []string{"/tiers/counter", "/profiles/counter"} {
		if err := k.Delete(storetest.Context(t), key, 0); err != nil {
			t.Error(err)
		}
	}
}

// narrow asks with a role that allows less than is needed: the error says who may not do what, and what to do about it.
func narrow(t *testing.T, s *apiserver.Server) {
	ctx := storetest.Context(t)
	k := open(t, s, kube.Config{Kubeconfig: s.Kubeconfig("agent", "agents")})
	s.Kubectl(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: narrow}
rules:
- {apiGroups: [projectcalico.org, caracal.dev, networking.k8s.io, policy.networking.k8s.io], resources: ["*"], verbs: [list, get]}
- {apiGroups: [""], resources: [namespaces, serviceaccounts, services], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: narrow}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: narrow}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: agents}]
`, "apply", "-f", "-")
	denied := func(what string, err error, want ...string) {
		t.Helper()
		if !errors.Is(err, store.ErrDenied) {
			t.Errorf("%s: %v", what, err)
			return
		}
		for _, w := range append(want, "deploy/kubernetes/rbac.yaml") {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v: no %q", what, err, w)
			}
		}
	}
	// The authorizer hears of a new role a moment later.
	var err error
	for deadline := time.Now().Add(storetest.Deadline); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if _, _, err = k.List(ctx, "/services/"); err == nil {
			break
		}
	}
	_, at, err2 := k.List(ctx, "/services/")
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	_, _, err = k.List(ctx, "/")
	denied("list", err, `User "agent" cannot list resource "pods" in API group ""`, "needs the verb list on pods")
	_, err = k.Create(ctx, "/blocks/x", []byte(`{"cidr":"10.0.0.0/26","pool":"10.0.0.0/16","node":""}`))
	denied("create", err, "needs the verb create on addressblocks.caracal.dev")
	_, err = k.Get(ctx, "/pods/web/front")
	denied("get", err, "needs the verb get on pods")
	denied("delete", k.Delete(ctx, "/ippools/pods", 0), "needs the verb delete on ippools.projectcalico.org")
	w, err := k.Watch(ctx, "/services/", at)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	_, err = w.Next(ctx)
	denied("watch", err, "needs the verb watch on services")
	// The watch goes on when the role is mended.
	s.Kubectl("", "patch", "clusterrole", "narrow", "--type=json", "-p", `[{"op":"add","path":"/rules/-","value":{"apiGroups":[""],"resources":["services"],"verbs":["watch"]}}]`)
	s.Kubectl("", "create", "service", "clusterip", "mended", "--tcp=80", "-n", "web")
	for {
		e, err := w.Next(ctx)
		if err == nil && e.Key == "/services/web/mended" {
			break
		}
		if !errors.Is(err, store.ErrDenied) {
			t.Fatalf("%+v, %v", e, err)
		}
	}
	// Who is nobody, or speaks to somebody else than it believes.
	ca := filepath.Join(s.Dir, "ca.crt")
	_, err = open(t, s, kube.Config{Kubeconfig: "/dev/null", Endpoint: s.URL, CAFile: ca, Token: "wrong"}).Get(ctx, "/ippools/pods")
	if !errors.Is(err, store.ErrDenied) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("a wrong token: %v", err)
	}
	_, err = open(t, s, kube.Config{Kubeconfig: "/dev/null", Endpoint: s.URL, CAFile: filepath.Join(s.Dir, "admin.crt"), Token: "wrong"}).Get(ctx, "/ippools/pods")
	if !errors.Is(err, store.ErrTLS) {
		t.Errorf("another authority: %v", err)
	}
}

// definitions of kinds that a cluster may have or not.
const adminPolicies = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: adminnetworkpolicies.policy.networking.k8s.io
  annotations: {api-approved.kubernetes.io: https://github.com/kubernetes-sigs/network-policy-api/pull/30}
spec:
  group: policy.networking.k8s.io
  names: {kind: AdminNetworkPolicy, plural: adminnetworkpolicies, singular: adminnetworkpolicy, listKind: AdminNetworkPolicyList}
  scope: Cluster
  versions:
  - {name: v1alpha1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
`

// later watches kinds before they are served.
func later(t *testing.T, s *apiserver.Server) {
	ctx := storetest.Context(t)
	k := open(t, s, kube.Config{Look: 200 * time.Millisecond})
	const prefix, key = "/adminnetworkpolicies.policy.networking.k8s.io/", "/adminnetworkpolicies.policy.networking.k8s.io/first"
	w := storetest.Follow(ctx, t, k, "/")
	s.Kubectl(adminPolicies, "apply", "-f", "-")
	s.Kubectl("", "wait", "--for=condition=Established", "--timeout=60s", "crd/adminnetworkpolicies.policy.networking.k8s.io")
	policy := `{"apiVersion":"policy.networking.k8s.io/v1alpha1","kind":"AdminNetworkPolicy","metadata":{"name":"first"},"spec":{"priority":5,"subject":{"namespaces":{}},"ingress":[{"action":"Deny","from":[{"namespaces":{}}]}]}}`
	s.Kubectl(policy, "create", "-f", "-")
	for e := storetest.Next(t, w); e.Key != key; e = storetest.Next(t, w) {
		if strings.HasPrefix(e.Key, prefix) {
			t.Errorf("%+v", e)
		}
	}
	s.Kubectl("", "delete", "crd", "adminnetworkpolicies.policy.networking.k8s.io")
	for e := storetest.Next(t, w); e.Key != key || !e.Deleted; e = storetest.Next(t, w) {
	}
	if _, _, err := k.List(ctx, "/"); err != nil {
		t.Errorf("list: %v", err)
	}
}

// undefined asks an API that has nothing of ours.
func undefined(t *testing.T, s *apiserver.Server) {
	k := open(t, s, kube.Config{})
	ctx := storetest.Context(t)
	_, _, list := k.List(ctx, "/ippools/")
	_, get := k.Get(ctx, "/ippools/x")
	_, create := k.Create(ctx, "/blocks/x", []byte(`{"cidr":"10.0.0.0/26","pool":"10.0.0.0/16","node":""}`))
	for what, err := range map[string]error{"list": list, "get": get, "create": create} {
		if !errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), "kubectl apply -f deploy/kubernetes/crds.yaml") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// otherVersion asks for a kind of which another version is served.
func otherVersion(t *testing.T, s *apiserver.Server) {
	k := open(t, s, kube.Config{Timeout: time.Second})
	ctx := storetest.Context(t)
	w := storetest.Follow(ctx, t, k, "/tiers/")
	s.Kubectl("", "delete", "crd", "tiers.projectcalico.org")
	defer func() {
		s.Kubectl("", "delete", "crd", "tiers.projectcalico.org")
		define(t, s)
	}()
	s.Kubectl(`
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: tiers.projectcalico.org}
spec:
  group: projectcalico.org
  names: {kind: Tier, plural: tiers, singular: tier, listKind: TierList}
  scope: Cluster
  versions:
  - {name: v4, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
`, "create", "-f", "-")
	s.Kubectl("", "wait", "--for=condition=Established", "--timeout=60s", "crd/tiers.projectcalico.org")
	want := []string{"tiers.projectcalico.org/v3", "v4", "deploy/kubernetes/crds.yaml"}
	check := func(what string, err error) {
		t.Helper()
		for _, w := range want {
			if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v: no %q", what, err, w)
			}
		}
	}
	_, _, err := k.List(ctx, "/")
	check("list", err)
	for {
		_, err = w.Next(ctx)
		if err != nil {
			break
		}
	}
	check("watch", err)
}
