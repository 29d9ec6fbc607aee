package policy_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/policy"
)

// node is a model with pods of this node, pods of others, and policies: each for the pods of an application, from the pods of
// three others.
func node(t testing.TB, locals, remotes, apps, policies int) *policy.Model {
	m := &policy.Model{Endpoints: make(map[string]*policy.Endpoint), Sets: make(map[string]*policy.Set), Profiles: make(map[string]*policy.Profile)}
	for i := range locals + remotes {
		where, a := "here", i
		if i >= locals {
			where = "there"
		}
		e := &policy.Endpoint{
			ID:        fmt.Sprintf("%s/pod%d", where, i),
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(a >> 16), byte(a >> 8), byte(a)})},
			Labels: map[string]string{"app": fmt.Sprint("app", i%apps), "pod-template-hash": fmt.Sprint("h", i/3), "projectcalico.org/namespace": fmt.Sprint("ns", i%20),
				"projectcalico.org/orchestrator": "k8s", "projectcalico.org/serviceaccount": "default", "pcns.projectcalico.org/name": fmt.Sprint("ns", i%20),
				"pcns.kubernetes.io/metadata.name": fmt.Sprint("ns", i%20)},
			Ports: []policy.NamedPort{{Name: "http", Protocol: 6, Port: 8080}},
		}
		m.Endpoints[e.ID] = e
	}
	tier := policy.Tier{Name: "default", Default: policy.Deny}
	for i := range policies {
		tier.Policies = append(tier.Policies, appPolicy(t, i, apps, 8080))
	}
	m.Tiers = []policy.Tier{tier}
	return m
}

func appPolicy(t testing.TB, i, apps int, port uint16) *policy.Policy {
	p := &policy.Policy{ID: fmt.Sprint("policy", i), Selector: sel(t, fmt.Sprintf("app == 'app%d'", i%apps)), Ingress: &policy.Rules{}}
	for j := range 3 {
		peer := sel(t, fmt.Sprintf("app == 'app%d' && projectcalico.org/namespace == 'ns%d'", (i+j+1)%apps, (i+j+1)%20))
		p.Ingress.Rules = append(p.Ingress.Rules, policy.Rule{Action: policy.Allow, Protocol: to(uint8(6)), Source: policy.Peer{Selector: &peer}, Destination: policy.Peer{Ports: []policy.Ports{{First: port, Last: port}}}})
	}
	return p
}

func here(id string) bool { return strings.HasPrefix(id, "here/") }

func compile(t testing.TB, m *policy.Model) *policy.Compiler {
	c := policy.NewCompiler(policy.Options{Local: here})
	if err := c.SetModel(m); err != nil {
		t.Fatal(err)
	}
	update(t, c)
	return c
}

func update(t testing.TB, c *policy.Compiler) *policy.Delta {
	d, err := c.Update()
	if err != nil {
		t.Fatal(err)
	}
	c.Accept()
	return d
}

// cpu is the time that processors were used, in seconds: on a machine shared with others it says more than a clock.
func cpu() float64 {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		panic(err)
	}
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
}

func report(b *testing.B, tables *policy.Tables) {
	size := tables.Size()
	b.ReportMetric(float64(size.Rows), "rows")
	b.ReportMetric(float64(size.Peers), "peers")
	b.ReportMetric(float64(size.Policies), "policies")
}

// heap is the memory that is in use, in MB.
func heap() float64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return float64(s.HeapAlloc) / (1 << 20)
}

// manyRules is a policy of one tier with rules for a CIDR and a port each.
func manyRules(t testing.TB, rules int) *policy.Model {
	m := node(t, 1, 0, 1, 1)
	for i := range rules {
		port := uint16(1024 + i%5000)
		m.Tiers[0].Policies[0].Ingress.Rules = append(m.Tiers[0].Policies[0].Ingress.Rules, policy.Rule{Action: policy.Allow, Protocol: to(uint8(6)),
			Source:      policy.Peer{Nets: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(16 + i>>16), byte(i >> 8), byte(i)}), 32)}},
			Destination: policy.Peer{Ports: []policy.Ports{{First: port, Last: port + 10}}}})
	}
	return m
}

// BenchmarkRules compiles one policy of 10,000 rules from nothing.
func BenchmarkRules(b *testing.B) {
	m := manyRules(b, 10000)
	start := cpu()
	for b.Loop() {
		report(b, compile(b, m).Tables())
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
}

// BenchmarkPorts is the same with rules that differ in their ports alone: all concern all.
func BenchmarkPorts(b *testing.B) {
	m := manyRules(b, 10000)
	for i := range m.Tiers[0].Policies[0].Ingress.Rules {
		m.Tiers[0].Policies[0].Ingress.Rules[i].Source = policy.Peer{}
	}
	start := cpu()
	for b.Loop() {
		report(b, compile(b, m).Tables())
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
}

// BenchmarkIdentities gives 10,000 pods of other nodes their identities.
func BenchmarkIdentities(b *testing.B) {
	m := node(b, 200, 10000, 200, 200)
	before := heap()
	var c *policy.Compiler
	start := cpu()
	for b.Loop() {
		c = compile(b, m)
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
	b.ReportMetric(heap()-before, "MB")
	report(b, c.Tables())
}

// BenchmarkPolicyChange changes one of 1,000 policies on a node with 250 pods, 10,000 on others.
func BenchmarkPolicyChange(b *testing.B) {
	m := node(b, 250, 10000, 200, 1000)
	c := compile(b, m)
	n := 0
	start := cpu()
	for b.Loop() {
		n++
		m.Tiers[0].Policies[500] = appPolicy(b, 500, 200, uint16(9000+n%1000))
		if err := c.SetTiers(m.Tiers); err != nil {
			b.Fatal(err)
		}
		if d := update(b, c); len(d.PutPods) == 0 {
			b.Fatal("nothing changed")
		}
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
	report(b, c.Tables())
}

// BenchmarkPodChange has a pod come and go on another node, among 10,000.
func BenchmarkPodChange(b *testing.B) {
	m := node(b, 250, 10000, 200, 1000)
	c := compile(b, m)
	e := *m.Endpoints["there/pod5000"]
	e.ID, e.Addresses = "there/new", []netip.Addr{netip.MustParseAddr("10.9.9.9")}
	start := cpu()
	for b.Loop() {
		if err := c.PutEndpoint(&e); err != nil {
			b.Fatal(err)
		}
		if d := update(b, c); len(d.PutPeers) != 1 {
			b.Fatal("nothing changed")
		}
		c.DeleteEndpoint(e.ID)
		update(b, c)
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
}

// BenchmarkLocalPodChange has a pod come and go on this node.
func BenchmarkLocalPodChange(b *testing.B) {
	m := node(b, 250, 10000, 200, 1000)
	c := compile(b, m)
	e := *m.Endpoints["here/pod100"]
	e.ID, e.Addresses = "here/new", []netip.Addr{netip.MustParseAddr("10.9.9.9")}
	start := cpu()
	for b.Loop() {
		if err := c.PutEndpoint(&e); err != nil {
			b.Fatal(err)
		}
		if d := update(b, c); len(d.PutPods) != 1 {
			b.Fatal("nothing changed")
		}
		c.DeleteEndpoint(e.ID)
		update(b, c)
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
}

// BenchmarkRows is the worst that a node can be asked for: 250 policy ids, each with an opinion on each of 10,000 identities.
func BenchmarkRows(b *testing.B) {
	m := node(b, 250, 0, 250, 250)
	all := manyRules(b, 10000).Tiers[0].Policies[0]
	all.ID, all.Selector = "all", selector.Selector{}
	m.Tiers[0].Policies = append(m.Tiers[0].Policies, all)
	before := heap()
	var c *policy.Compiler
	start := cpu()
	for b.Loop() {
		c = compile(b, m)
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
	b.ReportMetric(heap()-before, "MB")
	report(b, c.Tables())
}

// BenchmarkExcept compiles "all but 100,000 CIDRs".
func BenchmarkExcept(b *testing.B) {
	m := node(b, 10, 100, 10, 10)
	r := policy.Rule{Action: policy.Allow, Source: policy.Peer{Nets: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}}
	for i := range 100000 {
		r.Source.NotNets = append(r.Source.NotNets, netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(i >> 14), byte(i >> 6), byte(i << 2)}), 30))
	}
	m.Tiers[0].Policies[0].Ingress.Rules = append(m.Tiers[0].Policies[0].Ingress.Rules, r)
	start := cpu()
	for b.Loop() {
		report(b, compile(b, m).Tables())
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
}
