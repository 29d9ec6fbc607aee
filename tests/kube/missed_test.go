//go:build cluster

package kube_test

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// TestMissed is a lab whose API keeps nothing in memory beside etcd, and whose plugin can be stopped on its way: what an agent or an
// ADD misses of what happens meanwhile.
func TestMissed(t *testing.T) {
	t.Parallel()
	p := newPodLabOf(t, testenv.Faulty(t, "caracal"), "--watch-cache=false")
	p.startAgents(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *podLab)
	}{{"replaced", testReplaced}, {"compacted", testCompacted}, {"denied", testRightLost}} {
		if !t.Run(test.name, func(t *testing.T) { test.run(t, p) }) {
			break
		}
	}
}

// A Pod is deleted and made again, with another uid and other labels, while the ADD of the first one runs: that one never has what
// policy says of the second, and nothing of it is left.
func testReplaced(t *testing.T, p *podLab) {
	h := p.Host(2)
	client := p.run(t, 1, "default", "client", app("client"))
	p.policy(t, denyAll+"---\n"+allowHTTP)
	probe := p.run(t, 2, "default", "probe", app("web"))
	becomes(t, client, probe, 81, false)
	becomes(t, client, probe, 80, true)
	p.end(t, probe, "default")
	for _, step := range []string{"record", "policy", "host", "answer"} { // before it is known, before the agent is asked, after its answer, at the end
		first := p.pod(t, "default", "db-0", "h2", app("other"))
		p.awaitPolicyDB(t, map[string]string{"db-0": first}) // and has read node.db, which an ADD that is stopped may keep from it
		added := make(chan error, 1)
		go func() {
			_, err := h.AddPod(t.Context(), "db-0", lab.PodOptions{UID: first, Env: []string{"CARACAL_FAULT=" + step + ":stop"}})
			added <- err
		}()
		resume := p.stopped(t, step, added)
		p.deletePod(t, "default", "db-0")
		second := p.pod(t, "default", "db-0", "h2", app("web"))
		p.awaitPolicyDB(t, map[string]string{"db-0": second})
		resume()
		if err := <-added; err != nil {
			t.Logf("%s: %v", step, err)
		} else {
			pod, err := h.Pod("db-0")
			must(t, err)
			serve(t, pod, 80)
			check(t, client, pod, 80, false)
			must(t, h.DelPod(t.Context(), "db-0"))
		}
		if got := p.annotation(t, podPath("default", "db-0"), "cni.projectcalico.org/podIPs"); got != "" {
			t.Errorf("%s: the second one is said to have %s", step, got)
		}
		pod := p.add(t, 2, "db-0", lab.PodOptions{UID: second})
		check(t, client, pod, 81, false)
		becomes(t, client, pod, 80, true)
		p.end(t, pod, "default")
		if out, err := h.Exec(t.Context(), "caracalctl", "ipam", "check"); err != nil || !strings.Contains(out, "0 endpoints, 0 addresses") {
			t.Errorf("%s: %s%v", step, out, err)
		}
	}
	p.end(t, client, "default")
}

// stopped waits until an ADD has stopped at a step, and returns what lets it go on. added would have how it ended.
func (p *podLab) stopped(t testing.TB, step string, added <-chan error) (resume func()) {
	t.Helper()
	found := 0
	eventually(t, "an ADD stops at "+step, func() error {
		select {
		case err := <-added:
			t.Fatalf("the ADD did not stop at %s, and ended: %v", step, err)
		default:
		}
		all, err := filepath.Glob("/proc/[0-9]*/environ")
		if err != nil {
			return err
		}
		for _, path := range all {
			env, err := os.ReadFile(path)
			if err != nil || !strings.Contains(string(env), "CARACAL_FAULT="+step+":stop") || !strings.Contains(string(env), "CARACAL_LAB="+p.Name) {
				continue
			}
			if text, err := os.ReadFile(filepath.Join(filepath.Dir(path), "status")); err == nil && strings.Contains(string(text), "State:\tT") {
				found, err = strconv.Atoi(filepath.Base(filepath.Dir(path)))
				return err
			}
		}
		return errors.New("none has")
	})
	return func() { must(t, unix.Kill(found, unix.SIGCONT)) }
}

// hangUp ends a host's connections to the API, of which there must be some.
func (p *podLab) hangUp(t testing.TB, h *lab.Host) {
	t.Helper()
	api, err := url.Parse(p.URL)
	must(t, err)
	ended, err := h.Exec(t.Context(), "ss", "-HK", "dst", p.Host(1).Addr().String(), "dport", "=", api.Port())
	must(t, err)
	if strings.TrimSpace(ended) == "" {
		t.Fatalf("ss -K ended no connection of %s to the API (%s)", h.Name, p.URL)
	}
}

// An agent that is cut off while etcd forgets what happened lists anew, and takes in what is gone.
func testCompacted(t *testing.T, p *podLab) {
	ctx, h2 := t.Context(), p.Host(2)
	client := p.run(t, 2, "default", "client", app("client"))
	web := p.run(t, 2, "default", "web", app("web"))
	p.policy(t, denyAll+"---\n"+allowHTTP)
	services := "/api/v1/namespaces/default/services"
	p.create(t, services, m{"metadata": m{"name": "gone"}, "spec": m{"ports": []any{m{"port": 80}}}})
	listed := func(want bool) {
		t.Helper()
		eventually(t, fmt.Sprint("h2 has the Service: ", want), func() error {
			out, err := h2.Exec(ctx, "caracalctl", "services")
			if err == nil && strings.Contains(out, "default/gone") != want {
				err = errors.New(out)
			}
			return err
		})
	}
	listed(true)
	becomes(t, client, web, 81, false)
	becomes(t, client, web, 80, true)

	mend := p.cut(t, h2)
	p.hangUp(t, h2)
	for _, path := range []string{services + "/gone", "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/allow-http"} {
		p.request(t, "DELETE", path, "application/json", nil)
	}
	p.Compact()
	check(t, client, web, 80, true) // as heard last
	mend()
	becomes(t, client, web, 80, false)
	listed(false)
	p.end(t, client, "default")
	p.end(t, web, "default")
}

// An agent that may no more hear of one kind says so, keeps what it heard last of it, and goes on with the others.
func testRightLost(t *testing.T, p *podLab) {
	ctx, h := t.Context(), p.Host(2)
	role := filepath.Join(filepath.Dir(crds(t)), "rbac.yaml")
	p.kubectl("apply", "-f", role)
	p.kubectl("create", "clusterrolebinding", "agents", "--clusterrole=caracal-node", "--group=agents")
	file := filepath.Join(t.TempDir(), "caracalctl.cfg")
	must(t, os.WriteFile(file, []byte("apiVersion: v1\nkind: calicoApiConfig\nspec: {datastoreType: kubernetes, kubeconfig: "+p.Kubeconfig("agent", "agents")+"}\n"), 0o600))
	must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
	must(t, h.StartAgent(ctx, "--config", file))
	status := func() (string, error) { return h.Exec(ctx, "caracalctl", "node", "status", "-o", "json") }
	becomesReady := func() {
		t.Helper()
		eventually(t, "h2 is ready", func() error {
			out, err := status()
			if err == nil && (!strings.Contains(out, `"ready": true`) || strings.Contains(out, `"about"`)) {
				err = errors.New(out)
			}
			return err
		})
	}
	becomesReady()
	client := p.run(t, 2, "default", "client", app("client"))
	web := p.run(t, 2, "default", "web", app("web"))
	becomes(t, client, web, 80, true)
	p.policy(t, denyAll)
	becomes(t, client, web, 80, false)

	text, err := os.ReadFile(role)
	must(t, err)
	const all, fewer = "resources: [networkpolicies]", "resources: [ingresses]"
	if !strings.Contains(string(text), all) {
		t.Fatalf("%s does not say %q", role, all)
	}
	p.Kubectl(strings.Replace(string(text), all, fewer, 1), "apply", "-f", "-")
	p.hangUp(t, h) // a watch that goes on needs no right
	eventually(t, "the problem", func() error {
		out, err := status()
		if err == nil && !strings.Contains(out, "needs the verb watch on networkpolicies.networking.k8s.io") {
			err = errors.New(out)
		}
		return err
	})
	check(t, client, web, 80, false)
	late := p.run(t, 2, "default", "late", app("web")) // of which it hears
	check(t, client, late, 80, false)
	p.policy(t, `{apiVersion: projectcalico.org/v3, kind: GlobalNetworkPolicy, metadata: {name: first}, spec: {order: 1, selector: app == 'web', ingress: [{action: Allow}]}}`)
	becomes(t, client, late, 80, true)
	p.Kubectl(string(text), "apply", "-f", "-")
	becomesReady()
	for _, pod := range []*lab.Pod{client, web, late} {
		p.end(t, pod, "default")
	}
}
