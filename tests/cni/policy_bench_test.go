package cni

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkPolicyADD is how long ADD takes, median, in turns: where no policy was ever known, and where so many policies are, one of
// which selects the pod, put in force by ADD itself or by an agent.
func BenchmarkPolicyADD(b *testing.B) {
	many := func(n int) string {
		var all strings.Builder
		all.WriteString(onlyApps)
		for i := range n - 1 {
			fmt.Fprintf(&all, "---%s", strings.NewReplacer("name: db", fmt.Sprintf("name: db%d", i), "role: db", fmt.Sprintf("role: db%d", i)).Replace(onlyApps))
		}
		return all.String()
	}
	type variant struct {
		name string
		host *host
		took []time.Duration
	}
	var all []*variant
	add := func(name string, policies int, agent bool) {
		h := newHost(b)
		h.pod().add().del()
		if policies > 0 && !agent {
			h.last(many(policies))
		}
		if agent {
			h.cluster()
			h.apply(many(policies))
		}
		all = append(all, &variant{name: name, host: h})
	}
	add("none", 0, false)
	add("alone-1", 1, false)
	add("alone-100", 100, false)
	add("alone-1000", 1000, false)
	add("agent-1", 1, true)
	add("agent-1000", 1000, true)
	for b.Loop() {
		for _, v := range all {
			p := v.host.pod()
			p.conf = role("db")
			begin := time.Now()
			p.add()
			v.took = append(v.took, time.Since(begin))
			if ids := v.host.ids(p); (ids != [2]uint32{}) != (v.name != "none") {
				b.Errorf("%s: policy ids %d", v.name, ids)
			}
			p.del()
		}
	}
	for _, v := range all {
		slices.Sort(v.took)
		b.ReportMetric(float64(v.took[len(v.took)/2])/1e6, v.name+"-ms")
	}
}
