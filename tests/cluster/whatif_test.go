package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/caracal-net/caracal/tools/lab"
)

// What-if lists the connections that a policy would cut, and the real apply then cuts exactly those; also when it is taken back.
func testWhatIf(p *policyLab) {
	t := p.T
	flows := make(map[string]*flow) // by the opener's end
	for range 2 {
		for _, c := range p.clients() {
			for _, port := range []int{80, 81} {
				f := newFlow(t, c, p.web.Addr(), port)
				flows[f.LocalAddr().String()] = f
			}
		}
	}
	type report struct {
		Flows int
		Cut   []struct {
			Opener string
			By     struct{ Policy, Direction string }
		}
		Unjudged []struct{ Why string }
	}
	ask := func(h *lab.Host, policy string, args ...string) (cut []string, r report) {
		t.Helper()
		must(t, json.Unmarshal([]byte(ctl(t, h, policy, append([]string{"what-if", "-f", "-", "-o", "json"}, args...)...)), &r))
		for _, c := range r.Cut {
			if flows[c.Opener] == nil {
				t.Errorf("it speaks of %s, which is no connection of this test", c.Opener)
			}
			cut = append(cut, c.Opener)
		}
		if len(r.Unjudged) > 0 {
			t.Errorf("unjudged: %+v", r.Unjudged)
		}
		slices.Sort(cut)
		return cut, r
	}
	// cut waits until so many connections are cut, of those that were not, and says which.
	dead := make(map[string]bool)
	cut := func(want int) (now []string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d connections are cut", want), func() error {
			for name, f := range flows {
				if !dead[name] && f.say(patience) != nil {
					dead[name] = true
					now = append(now, name)
				}
			}
			if len(now) < want {
				return fmt.Errorf("cut are %d: %q", len(now), now)
			}
			return nil
		})
		for name, f := range flows {
			if !dead[name] {
				if err := f.say(time.Minute); err != nil {
					t.Errorf("connection of %s: %v", name, err)
				}
			}
		}
		slices.Sort(now)
		return now
	}

	said, r := ask(p.Host(1), allowHTTP)
	if len(said) != 4 || r.Flows < len(flows) || r.Cut[0].By.Policy != "NetworkPolicy default/allow-http" || r.Cut[0].By.Direction != "ingress" {
		t.Fatalf("of %d connections, half of them to port 81, it would cut %+v", len(flows), r)
	}
	if elsewhere, _ := ask(p.Host(2), allowHTTP); len(elsewhere) != 0 {
		t.Errorf("the other host, where web is not, would cut %q", elsewhere)
	}
	if now := cut(0); len(now) != 0 {
		t.Fatalf("by asking %q were cut", now)
	}
	p.apply(allowHTTP)
	if diff := cmp.Diff(said, cut(len(said))); diff != "" {
		t.Errorf("it said (-), and cut (+):\n%s", diff)
	}

	if said, _ := ask(p.Host(1), denyAll); len(said) != 0 { // what another policy allows stays
		t.Errorf("deny-all beside allow-http would cut %q", said)
	}
	p.apply(denyAll)
	p.open(81, false, p.clients()...)
	said, r = ask(p.Host(1), allowHTTP, "--delete")
	if len(said) != 4 || r.Cut[0].By.Policy != "NetworkPolicy default/deny-all" {
		t.Fatalf("without allow-http it would cut %+v", r)
	}
	if table := ctl(t, p.Host(1), allowHTTP, "what-if", "-f", "-", "--delete"); !strings.HasPrefix(table, fmt.Sprintf("would cut 4 of %d flows\n", r.Flows)) {
		t.Error(table)
	}
	p.delete("netpol", "allow-http")
	if diff := cmp.Diff(said, cut(len(said))); diff != "" {
		t.Errorf("it said (-), and cut (+):\n%s", diff)
	}
	p.delete("netpol", "deny-all")
	p.open(81, true, p.clients()...)
}
