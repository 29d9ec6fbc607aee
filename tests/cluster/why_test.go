package cluster

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tools/lab"
)

// explained is what the test reads of why's answer.
type explained struct {
	Verdict, Reason string
	Egress, Ingress *struct {
		Action  string
		By      struct{ Policy, Place string }
		Nearest *struct{ Missed []string }
		Maps    *struct{ Action string }
	}
	Flows []struct {
		IngressBy *struct{ Policy, Place string }
	}
	Past *struct {
		Drops []struct {
			Same        bool
			Count       uint64
			Hook        string
			Reason      string
			First, Last time.Time
			By          *struct{ Policy string }
		}
	}
	Disagree, Notes []string
}

func why(t *testing.T, h *lab.Host, args ...string) (x explained, err error) {
	t.Helper()
	out, err := h.Exec(t.Context(), append([]string{"caracalctl", "why", "-o", "json"}, args...)...)
	if err != nil {
		return x, err
	}
	return x, json.Unmarshal([]byte(out), &x)
}

// Of two pods on two hosts each host says what it judges itself, and what the other one does; what was dropped is known
// where it was dropped.
//
//	a, role=web --- h1 ---- h2 --- b, role=db
func testWhy(p *policyLab) {
	t, h1, h2 := p.T, p.Host(1), p.Host(2)
	a := h1.TestPod(t, "a", lab.PodOptions{Labels: map[string]string{"role": "web"}})
	b := h2.TestPod(t, "b", lab.PodOptions{Labels: map[string]string{"role": "db"}})
	ctl(t, h1, `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db}
spec:
  podSelector: {matchLabels: {role: db}}
  ingress:
  - from: [{podSelector: {matchLabels: {role: web}}}]
    ports: [{port: 80}]
`, "apply", "-f", "-")
	const name = "NetworkPolicy default/db"

	// Both hosts know of both pods, and of the policy; where the pod is it is in the maps.
	var here explained
	for _, ask := range [][]string{{"a", "b:81"}, {"default/a", b.Addr().String() + ":81"}, {a.Addr6().String(), "[" + b.Addr6().String() + "]:81"}} {
		eventually(t, "h2 denies "+strings.Join(ask, " to "), func() (err error) {
			here, err = why(t, h2, ask...)
			if err == nil && (here.Verdict != "denied" || here.Reason != "drop_policy_ingress" || here.Ingress.By.Policy != name || here.Ingress.Maps == nil ||
				here.Ingress.Maps.Action != "deny" || here.Ingress.Nearest == nil || !slices.Equal(here.Ingress.Nearest.Missed, []string{"port is 81, not 80"}) ||
				here.Egress == nil || here.Egress.Maps != nil || len(here.Disagree) > 0) {
				err = fmt.Errorf("%+v", here)
			}
			return err
		})
	}
	eventually(t, "h1 knows that h2 denies it", func() error {
		there, err := why(t, h1, "a", "b:81")
		if err == nil && (there.Verdict != "denied" || there.Ingress.Maps != nil || there.Egress.Maps == nil ||
			!slices.ContainsFunc(there.Notes, func(n string) bool { return strings.Contains(n, "default/b is on node h2, which judges it") })) {
			err = fmt.Errorf("%+v", there)
		}
		return err
	})

	// Real packets: some denied, and one flow let in.
	for _, port := range []int{80, 81} {
		echo(t, b, port)
	}
	begin := time.Now()
	for from, to := range map[netip.Addr]netip.Addr{a.Addr(): b.Addr(), a.Addr6(): b.Addr6()} {
		if c, err := dial(a, to, 81); err == nil {
			c.Close()
			t.Errorf("%s:81 takes connections", to)
		}
		f := newFlow(t, a, to, 80)
		answer, err := why(t, h2, netip.AddrPortFrom(to, 80).String(), f.LocalAddr().String())
		must(t, err)
		if answer.Verdict != "allowed" || answer.Ingress == nil || answer.Ingress.By.Policy != name || len(answer.Flows) != 1 ||
			!slices.ContainsFunc(answer.Notes, func(n string) bool { return strings.Contains(n, "answers a flow that default/a opened") }) {
			t.Errorf("the answer: %+v", answer)
		}
		allowed, err := why(t, h2, from.String(), "b:80")
		must(t, err)
		if allowed.Verdict != "allowed" || len(allowed.Flows) != 1 || allowed.Flows[0].IngressBy == nil || allowed.Flows[0].IngressBy.Place != "ingress[0].from[0]" {
			t.Errorf("port 80 of %s: %+v", to, allowed)
		}
		var past explained
		eventually(t, "h2 remembers the drops", func() error {
			past, err = why(t, h2, from.String(), "b:81")
			if err == nil && (past.Past == nil || len(past.Past.Drops) == 0) {
				err = fmt.Errorf("%+v", past)
			}
			return err
		})
		if d := past.Past.Drops[0]; !d.Same || d.Count == 0 || d.Hook != "from_net" || d.Reason != "drop_policy_ingress" || d.By == nil || d.By.Policy != name ||
			d.First.Before(begin) || d.Last.After(time.Now()) || d.Last.Before(d.First) {
			t.Errorf("%+v", d)
		}
	}
	quiet, err := why(t, h1, "a", "b:81")
	must(t, err)
	if quiet.Past == nil || len(quiet.Past.Drops) != 0 {
		t.Errorf("h1, which dropped nothing, remembers %+v", quiet.Past)
	}

	// ICMP is another protocol.
	if _, err := a.Exec(t.Context(), "ping", "-c", "1", "-W", "1", b.Addr().String()); err == nil {
		t.Error("b answers a's ping")
	}
	echo, err := why(t, h2, a.Addr().String(), "b/icmp")
	must(t, err)
	if echo.Verdict != "denied" || len(echo.Past.Drops) == 0 || !echo.Past.Drops[0].Same {
		t.Errorf("%+v", echo)
	}
	defer p.delete("netpol", "db")
	t.Log("\n" + ctl(t, h2, "", "why", "a", "b:81") + ctl(t, h2, "", "why", "a", "b:80") + ctl(t, h1, "", "why", "a", "b/icmp") + ctl(t, h2, "", "rules"))
}
