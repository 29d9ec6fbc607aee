//go:build cluster

package kubernetes

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/netpol"
	"github.com/caracal-net/caracal/tests/testenv"
)

var (
	updateTable = flag.Bool("update", false, "write docs/networkpolicy.md as this run is")
	tableProxy  = flag.String("proxy", "nftables", "kube-proxy's mode in TestNetworkPolicy: nftables or iptables")
)

// settled is how long a cluster may take to do what a step wants: each look at it takes up to 2 s, and a node looks once a minute for
// kinds that the API has not had.
const settled = 90 * time.Second

// adminKinds define the kinds of the network policy API (sigs.k8s.io/network-policy-api), which no cluster brings, without their schemas.
var adminKinds = func() string {
	var b strings.Builder
	for _, k := range [][3]string{{"AdminNetworkPolicy", "adminnetworkpolicies", "v1alpha1"}, {"BaselineAdminNetworkPolicy", "baselineadminnetworkpolicies", "v1alpha1"},
		{"ClusterNetworkPolicy", "clusternetworkpolicies", "v1alpha2"}} {
		fmt.Fprintf(&b, `---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: %[2]s.policy.networking.k8s.io, annotations: {api-approved.kubernetes.io: "https://github.com/kubernetes-sigs/network-policy-api"}}
spec:
  group: policy.networking.k8s.io
  scope: Cluster
  names: {kind: %[1]s, plural: %[2]s, singular: %[4]s}
  versions: [{name: %[3]s, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]
`, k[0], k[1], k[2], strings.ToLower(k[0]))
	}
	return b.String()
}()

// arena is a cluster with the pods of the table.
type arena struct {
	*cluster
	pods      map[string]*pod
	addresses map[string]netip.Addr // of pods and nodes
	services  map[string]netip.Addr // by the pod that is behind
	labelled  map[string][]string   // labels that a situation gave, to be taken away
	left      int                   // situations that -run leaves out
}

// TestNetworkPolicy holds a cluster against the table of situations, directly and through Services, and writes what came of it into
// docs/networkpolicy.md.
func TestNetworkPolicy(t *testing.T) {
	c := start(t, options{proxy: *tableProxy})
	c.apply(adminKinds)
	a := newArena(c)
	all, err := netpol.Situations(a.addresses)
	must(t, err)
	var table strings.Builder
	for i, s := range all {
		fmt.Fprintf(&table, "| %d | %s | %s |\n", i+1, s.Title(), a.try(t, s))
	}
	if a.left == 0 {
		a.compare(t, table.String())
	}
}

func newArena(c *cluster) *arena {
	a := &arena{cluster: c, pods: make(map[string]*pod), addresses: make(map[string]netip.Addr), services: make(map[string]netip.Addr), labelled: make(map[string][]string)}
	for _, n := range c.nodes {
		a.addresses[n.name] = n.Addr()
	}
	probe := testenv.Build(c.t, "./tests/kubernetes/netprobe")
	for _, n := range c.nodes {
		text, err := os.ReadFile(probe)
		must(c.t, err)
		must(c.t, os.WriteFile(n.Path("/usr/local/bin/netprobe"), text, 0o755))
	}
	var manifests strings.Builder
	for _, ns := range netpol.Namespaces {
		c.apply(fmt.Sprintf("{apiVersion: v1, kind: Namespace, metadata: {name: %[1]q, labels: {ns: %[1]q}}}", ns)) // y is a word of YAML's
		c.accounted(ns)
		for _, name := range netpol.Pods {
			full := ns + "/" + name
			var ports, services []string
			for _, port := range netpol.Ports {
				protocol, number, _ := strings.Cut(port, "/")
				ports = append(ports, fmt.Sprintf("{name: %s, protocol: %s, containerPort: %s}", netpol.PortName(port), protocol, number))
				services = append(services, fmt.Sprintf("{name: %s, protocol: %s, port: %s, targetPort: %[3]s}", netpol.PortName(port), protocol, number))
			}
			fmt.Fprintf(&manifests, `---
apiVersion: v1
kind: Pod
metadata: {namespace: %[1]q, name: %[2]s, labels: {pod: %[2]s}}
spec:
  nodeName: %[3]s
  hostname: %[1]s-%[2]s
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: %[4]s
    command: [sh, -c, "agnhost netexec --http-port=80 --udp-port=80 & exec agnhost netexec --http-port=81 --udp-port=81"]
    ports: [%[5]s]
---
apiVersion: v1
kind: Service
metadata: {namespace: %[1]q, name: %[2]s}
spec: {selector: {pod: %[2]s}, ports: [%[6]s]}
`, ns, name, netpol.NodeOf(full), agnhost, strings.Join(ports, ", "), strings.Join(services, ", "))
		}
	}
	c.apply(manifests.String())
	for _, full := range netpol.AllPods() {
		ns, name, _ := strings.Cut(full, "/")
		a.pods[full] = c.pod(ns, name)
		a.addresses[full] = a.pods[full].addrs[0]
		service, err := netip.ParseAddr(c.kubectl(c.t.Context(), "get", "-n", ns, "service", name, "-o", "jsonpath={.spec.clusterIP}"))
		must(c.t, err)
		a.services[full] = service
	}
	return a
}

// try plays one situation, and says what came of it: two cells of the table.
func (a *arena) try(t *testing.T, s netpol.Situation) string {
	if s.SCTP {
		return "not run | not run"
	}
	if s.API != "" && !a.served(s.API) {
		return "not run | not run"
	}
	var direct, service []string
	ran := false
	t.Run(s.Title(), func(t *testing.T) {
		ran = true
		defer a.restore()
		for i, step := range s.Steps {
			a.change(step)
			want, err := step.Wanted(netpol.Ports)
			must(t, err)
			wrong, wrongService := a.settle(t.Context(), want)
			for how, wrong := range map[string][]string{"directly": wrong, "by Service": wrongService} {
				if wrong != nil {
					t.Errorf("step %d, %s: %d of %d are not as wanted:\n%s", i+1, how, len(wrong), len(want), strings.Join(wrong[:min(len(wrong), 12)], "\n"))
				}
			}
			direct, service = append(direct, wrong...), append(service, wrongService...)
		}
	})
	if !ran {
		a.left++
	}
	words := map[bool]string{true: "pass", false: "FAIL"}
	return words[direct == nil] + " | " + words[service == nil]
}

// served tells whether the API has an optional group of its.
func (a *arena) served(version string) bool {
	_, err := a.tryKubectl(a.t.Context(), "get", "--raw", "/apis/"+version)
	return err == nil
}

func (a *arena) change(step netpol.Step) {
	a.t.Helper()
	ctx := a.t.Context()
	text, err := step.Manifest()
	must(a.t, err)
	if text != "" {
		a.apply(text)
	}
	for _, policy := range step.Delete {
		namespace, name, _ := strings.Cut(policy, "/")
		a.kubectl(ctx, "delete", "networkpolicy", "-n", namespace, name)
	}
	for of, labels := range step.Label {
		for _, key := range slices.Sorted(maps.Keys(labels)) {
			word := fmt.Sprintf("%s=%v", key, labels[key])
			if labels[key] == nil {
				word = key + "-"
			}
			a.label(of, word)
			a.labelled[of] = append(a.labelled[of], key)
		}
	}
}

// label changes a label of a namespace or a pod.
func (a *arena) label(of, word string) {
	a.t.Helper()
	arg := []string{"label", "--overwrite", "namespace", of, word}
	if namespace, name, is := strings.Cut(of, "/"); is {
		arg = []string{"label", "--overwrite", "-n", namespace, "pod", name, word}
	}
	a.kubectl(a.t.Context(), arg...)
}

// restore takes away what a situation has made.
func (a *arena) restore() {
	for _, ns := range netpol.Namespaces {
		a.kubectl(a.t.Context(), "delete", "networkpolicies", "-n", ns, "--all")
	}
	for _, kind := range []string{"adminnetworkpolicies", "baselineadminnetworkpolicies", "clusternetworkpolicies"} {
		_, _ = a.tryKubectl(a.t.Context(), "delete", kind+".policy.networking.k8s.io", "--all") // it may not be served
	}
	for of, keys := range a.labelled {
		for _, key := range keys {
			a.label(of, key+"-")
		}
	}
	clear(a.labelled)
}

// settle looks until everything is as wanted, twice in a row, and returns what is not in the end.
func (a *arena) settle(ctx context.Context, want netpol.Matrix) (direct, service []string) {
	for deadline, right := time.Now().Add(settled), 0; ; {
		gotDirect, gotService := a.look(ctx, want)
		direct, service = gotDirect.Compare(want), gotService.Compare(withoutSelf(want))
		if direct != nil || service != nil {
			right = 0
		} else if right++; right == 2 {
			return nil, nil
		}
		if time.Now().After(deadline) {
			return direct, service
		}
	}
}

// withoutSelf leaves out what a pod sends itself by its Service: it comes back with its node's address.
func withoutSelf(want netpol.Matrix) netpol.Matrix {
	m := maps.Clone(want)
	maps.DeleteFunc(m, func(p netpol.Probe, _ bool) bool { return p.From == p.To })
	return m
}

// look tries all probes that are wanted, of all ends at once: to the pods' own addresses, and to their Services'.
func (a *arena) look(ctx context.Context, want netpol.Matrix) (direct, service netpol.Matrix) {
	direct, service = make(netpol.Matrix), make(netpol.Matrix)
	byEnd := make(map[string][]netpol.Probe)
	for p := range want {
		byEnd[p.From] = append(byEnd[p.From], p)
	}
	var mu sync.Mutex
	var all sync.WaitGroup
	for from, probes := range byEnd {
		all.Go(func() {
			targets := make([]string, 0, 2*len(probes))
			for _, addresses := range []map[string]netip.Addr{a.addresses, a.services} {
				for _, p := range probes {
					protocol, port, _ := strings.Cut(p.Port, "/")
					targets = append(targets, fmt.Sprintf("%s/%s:%s", protocol, addresses[p.To], port))
				}
			}
			answers, err := a.ask(ctx, from, targets)
			if err != nil || len(answers) != len(targets) {
				a.t.Errorf("probes of %s: %d answers: %v", from, len(answers), err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for i, p := range probes {
				who := strings.ReplaceAll(p.To, "/", "-")
				direct[p] = answers[i] == who
				service[p] = answers[len(probes)+i] == who
			}
		})
	}
	all.Wait()
	return direct, service
}

// ask runs netprobe in a pod's network, or on a node.
func (a *arena) ask(ctx context.Context, from string, targets []string) ([]string, error) {
	script := "netprobe " + strings.Join(targets, " ")
	var n *node
	if p := a.pods[from]; p != nil {
		n, script = p.node, "nsenter --net="+p.netns+" "+script
	} else {
		n = a.machine(from)
	}
	out, err := n.Sh(ctx, script)
	return strings.Fields(out), err
}

// compare holds the table against the document, or writes it there.
func (a *arena) compare(t *testing.T, rows string) {
	root, err := testenv.Root()
	must(t, err)
	path := filepath.Join(root, "docs/networkpolicy.md")
	text, err := os.ReadFile(path)
	must(t, err)
	const head = "| --- | --- | --- | --- |\n"
	before, after, found := strings.Cut(string(text), head)
	if !found {
		t.Fatalf("%s has no table", path)
	}
	rest := ""
	if end := strings.Index(after, "\n\n"); end >= 0 {
		after, rest = after[:end+1], after[end+1:]
	}
	if after == rows {
		return
	}
	if *updateTable {
		must(t, os.WriteFile(path, []byte(before+head+rows+rest), 0o644))
		return
	}
	t.Errorf("%s has another table than this run (-update writes it):\n%s", path, rows)
}
