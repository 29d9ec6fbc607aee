package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/etcd"
	"github.com/caracal-net/caracal/tools/lab"
)

const (
	figuresPods     = 250
	figuresPolicies = 1000
	figuresChanges  = 50
)

func figuresPolicy(i, port int) string {
	return fmt.Sprintf(`---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: policy%d}
spec: {podSelector: {matchLabels: {app: app%d}}, ingress: [{from: [{podSelector: {matchLabels: {app: app%d}}}], ports: [{port: %d}]}]}
`, i, i%50, (i+1)%50, port)
}

// TestPolicyLatency prints how long it takes from a change's commit in etcd until it is in force, one policy of 1,000 on a node
// with 250 pods. It is a measurement, made when CARACAL_FIGURES is set.
func TestPolicyLatency(t *testing.T) {
	if job := strings.Fields(os.Getenv("CARACAL_FIGURES_JOB")); len(job) == 2 {
		changePolicies(t, job[0], job[1])
		return
	}
	if os.Getenv("CARACAL_FIGURES") == "" {
		t.Skip("a measurement; set CARACAL_FIGURES")
	}
	l := newCluster(t, 1)
	h := l.Host(1)
	for i := range figuresPods {
		h.TestPod(t, fmt.Sprint("pod", i), lab.PodOptions{Labels: map[string]string{"app": fmt.Sprint("app", i%50)}})
	}
	var all strings.Builder
	for i := range figuresPolicies {
		all.WriteString(figuresPolicy(i, 80))
	}
	ctl(t, h, all.String(), "apply", "-f", "-")
	is(t, h, "has all in force", func(s agent.Status) bool {
		return s.Policy.Policies == figuresPolicies && s.Policy.Pods == figuresPods && s.Policy.Resources == figuresPods+figuresPolicies
	})
	cmd := exec.Command(os.Args[0], "-test.run", "TestPolicyLatency", "-test.v")
	cmd.Env = append(os.Environ(), "CARACAL_FIGURES_JOB="+l.EtcdEndpoints()+" "+h.BPFDir())
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	must(t, h.Namespace().Start(cmd))
	must(t, cmd.Wait())
}

// changePolicies changes a policy again and again, in the host's network namespace, and waits for the epoch that it is in force in.
func changePolicies(t *testing.T, endpoints, bpffs string) {
	s, err := etcd.Open(etcd.Config{Endpoints: strings.Split(endpoints, ",")})
	must(t, err)
	defer s.Close()
	m, err := maps.Open(bpffs)
	must(t, err)
	defer m.Close()
	epoch := func() uint32 {
		state, err := m.State()
		must(t, err)
		return state.Epoch
	}
	change := func(port int) time.Duration {
		r := parsed(t, figuresPolicy(500, port))
		text, err := r.MarshalJSON()
		must(t, err)
		was := epoch()
		_, err = s.Update(t.Context(), r.Key(), text, store.Revision(0))
		must(t, err)
		committed := time.Now()
		for epoch() == was {
			if time.Since(committed) > time.Minute {
				t.Fatal("it did not come into force")
			}
			unix.Nanosleep(&unix.Timespec{Nsec: 100_000}, nil)
		}
		return time.Since(committed)
	}
	var took []time.Duration
	for i := range figuresChanges {
		took = append(took, change(8000+i))
		time.Sleep(200 * time.Millisecond) // one at a time: the one before is settled
	}
	slices.Sort(took)
	t.Logf("from commit in etcd to in force, %d changes: median %s, 90 %% %s, longest %s", len(took), took[len(took)/2], took[len(took)*9/10], took[len(took)-1])
}

// parsed is the one resource of a text.
func parsed(t *testing.T, text string) api.Resource {
	t.Helper()
	all, err := manifest.Parse([]byte(text))
	must(t, err)
	return all[0]
}
