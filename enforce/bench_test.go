package enforce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/loader"
)

// crowd is a node with 250 pods of 50 applications, others' pods, and policies: each for an application's pods, from three
// others.
func crowd(b *testing.B, remotes, policies int) *host {
	h := newHost(b, loader.Config{})
	for i := range 250 {
		h.addPod(fmt.Sprint("ns", i%20), fmt.Sprint("pod", i), fmt.Sprintf("10.0.%d.%d", i/200, i%200), map[string]string{"app": fmt.Sprint("app", i%50)})
	}
	h.p.Replace(slices.Concat(others(b, remotes), somePolicies(b, policies)))
	return h
}

// others are pods of other nodes.
func others(t testing.TB, n int) []api.Resource {
	if n == 0 {
		return nil
	}
	var text strings.Builder
	for i := range n {
		fmt.Fprintf(&text, `
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: h2-%d-eth0-0123456789, namespace: ns%d, labels: {app: app%d, pod-template-hash: h%d}}
spec: {node: h2, orchestrator: k8s, workload: net, pod: pod%d, containerID: c%031d, endpoint: eth0, interfaceName: cali%d, ipNetworks: [%s]}
`, i, i%20, i%50, i/3, i, i, i, netip.AddrFrom4([4]byte{10, byte(1 + i>>16), byte(i >> 8), byte(i)}))
	}
	return parse(t, text.String())
}

func somePolicies(t testing.TB, n int) []api.Resource {
	var all []api.Resource
	for i := range n {
		all = append(all, appPolicy(t, i, 80))
	}
	return all
}

func appPolicy(t testing.TB, i, port int) api.Resource {
	return parse(t, fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: policy%d, namespace: ns%d}
spec:
  podSelector: {matchLabels: {app: app%d}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: app%d}}}, {podSelector: {matchLabels: {app: app%d}}}, {podSelector: {matchLabels: {app: app%d}}, namespaceSelector: {}}]
    ports: [{port: %d}]
`, i, i%20, i%50, (i+1)%50, (i+2)%50, (i+3)%50, port))[0]
}

// BenchmarkPolicyChange changes one policy of 1,000 on a node with 250 pods, and 10,000 elsewhere.
func BenchmarkPolicyChange(b *testing.B) {
	h := crowd(b, 10000, 1000)
	h.commit()
	var took []time.Duration
	start := cpu()
	for n := 0; b.Loop(); n++ {
		r := appPolicy(b, 500, 8000+n)
		began := time.Now()
		h.p.Put(r)
		result, err := h.p.Commit(context.Background())
		if err != nil || !result.Changed {
			b.Fatal(result, err)
		}
		took = append(took, result.InForce.Sub(began))
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
	slices.Sort(took)
	b.ReportMetric(took[len(took)/2].Seconds()*1e3, "p50-ms-in-force")
	b.ReportMetric(took[len(took)*99/100].Seconds()*1e3, "p99-ms-in-force")
}

// BenchmarkRules puts one policy of 10,000 rules in force on a node that has none.
func BenchmarkRules(b *testing.B) {
	var rules strings.Builder
	for i := range 10000 {
		fmt.Fprintf(&rules, "\n  - {action: Allow, protocol: TCP, source: {nets: [%s/32]}, destination: {ports: [\"%d:%d\"]}}",
			netip.AddrFrom4([4]byte{172, byte(16 + i>>16), byte(i >> 8), byte(i)}), 1024+i%5000, 1034+i%5000)
	}
	r := parse(b, "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: all}\nspec:\n  selector: has(app)\n  ingress:"+rules.String())[0]
	var took time.Duration
	var used float64
	for b.Loop() {
		b.StopTimer()
		h := crowd(b, 0, 0)
		h.commit()
		b.StartTimer()
		began, start := time.Now(), cpu()
		h.p.Put(r)
		took += h.commit().InForce.Sub(began)
		used += cpu() - start
		b.StopTimer()
		report(b, h)
		h.kill()
		b.StartTimer()
	}
	b.ReportMetric(took.Seconds()*1e3/float64(b.N), "ms-in-force")
	b.ReportMetric(used*1e3/float64(b.N), "cpu-ms/op")
}

// BenchmarkIdentities gives 10,000 pods of other nodes their identities, from what the store says.
func BenchmarkIdentities(b *testing.B) {
	var took time.Duration
	var used, mb float64
	for b.Loop() {
		b.StopTimer()
		h := crowd(b, 0, 100)
		h.commit()
		all := others(b, 10000)
		texts := make([][]byte, len(all))
		for i, r := range all {
			texts[i], _ = r.MarshalJSON()
		}
		all = nil
		before := heap()
		b.StartTimer()
		began, start := time.Now(), cpu()
		all, errs := Decode(texts)
		if err := errors.Join(errs...); err != nil {
			b.Fatal(err)
		}
		for _, r := range all {
			h.p.Put(r)
		}
		took += h.commit().InForce.Sub(began)
		used += cpu() - start
		b.StopTimer()
		mb += heap() - before
		report(b, h)
		runtime.KeepAlive(texts)
		h.kill()
		b.StartTimer()
	}
	b.ReportMetric(took.Seconds()*1e3/float64(b.N), "ms-in-force")
	b.ReportMetric(used*1e3/float64(b.N), "cpu-ms/op")
	b.ReportMetric(mb/float64(b.N), "MB")
}

// BenchmarkLoad begins anew with what is known, and finds that nothing is to be written.
func BenchmarkLoad(b *testing.B) {
	h := crowd(b, 10000, 1000)
	h.commit()
	if err := h.p.Tidy(); err != nil {
		b.Fatal(err)
	}
	start := cpu()
	for b.Loop() {
		h.kill()
		h.load()
		if r := h.commit(); r.Changed {
			b.Fatal(r)
		}
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
}

func report(b *testing.B, h *host) {
	s := h.p.State()
	b.ReportMetric(float64(s.Rows), "rows")
	b.ReportMetric(float64(s.Prefixes), "prefixes")
	b.ReportMetric(float64(s.Identities), "identities")
	b.ReportMetric(float64(s.PolicyIDs), "policyIDs")
}

// cpu is the time that processors were used, in seconds: on a machine shared with others it says more than a clock.
func cpu() float64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		panic(err)
	}
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
}

// heap is the memory that is in use, in MB.
func heap() float64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return float64(s.HeapAlloc) / (1 << 20)
}
