//go:build cluster

package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// audit is a policy by which the API server writes what one user asks of it, a line each.
const audit = `{"apiVersion":"audit.k8s.io/v1","kind":"Policy","omitStages":["ResponseStarted","ResponseComplete"],
"rules":[{"level":"Metadata","users":["agent"]},{"level":"None"}]}`

// TestScale: what 5,000 pods, and then 10,000 namespaces, cost one node's agent: at most 100 MB resident, and one watch of each kind. The
// agent has no more than the role of deploy/kubernetes.
func TestScale(t *testing.T) {
	const pods, nodes, namespaces, most = 5000, 50, 10_000, 100
	testenv.NeedRoot(t)
	ctx := t.Context()
	h := lab.New(t, lab.Config{Hosts: 1, Outside: true, Cluster: true, Caracal: testenv.Bin(t, "caracal")}).Host(1)
	dir := t.TempDir()
	policy, log := filepath.Join(dir, "policy.json"), filepath.Join(dir, "audit.log")
	if err := os.WriteFile(policy, []byte(audit), 0o600); err != nil {
		t.Fatal(err)
	}
	on := apiserver.On(h)
	on.Args = []string{"--audit-policy-file", policy, "--audit-log-path", log}
	s := apiserver.Start(t, on)
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"crds.yaml", "rbac.yaml"} {
		s.Kubectl("", "apply", "-f", filepath.Join(root, "deploy/kubernetes", file))
	}
	s.Kubectl(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: agents}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: caracal-node}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: agents}]
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: pods}
spec: {cidr: 10.244.0.0/16}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow, namespace: default}
spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: app-1}}}]}]}
---
apiVersion: v1
kind: Node
metadata: {name: `+h.Name+`}
`, "apply", "-f", "-")
	many(t, s, 20, "/api/v1/namespaces", func(i int) string {
		return fmt.Sprintf(`{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"ns-%d"}}`, i)
	})
	manyAt(t, s, 1, func(int) string { return "/apis/projectcalico.org/v3/ippools" }, func(int) string {
		return `{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"pool"},"spec":{"cidr":"10.244.0.0/16"}}`
	})
	at := func(i int) string { return fmt.Sprintf("/api/v1/namespaces/ns-%d/pods", i%20) }
	manyAt(t, s, pods, at, func(i int) string {
		node := "n" + strconv.Itoa(i%nodes)
		if i%nodes == 0 {
			node = h.Name
		}
		return fmt.Sprintf(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"pod-%d","labels":{"app":"app-%d","pod-template-hash":"%x"},
			"annotations":{"cni.projectcalico.org/podIPs":"10.244.%d.%d/32"}},"spec":{"nodeName":%q,"containers":[
			{"name":"main","image":"localhost/app:1","ports":[{"name":"http","containerPort":8080}],"env":[%s]},
			{"name":"side","image":"localhost/side:1"}]}}`, i, i%100, i, i/200, i%200+1, node, strings.TrimSuffix(strings.Repeat(`{"name":"A_VARIABLE","value":"and what it is"},`, 20), ","))
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	config := filepath.Join(dir, "caracalctl.cfg")
	must(os.WriteFile(config, []byte("apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec: {datastoreType: kubernetes, kubeconfig: "+s.Kubeconfig("agent", "agents")+"}\n"), 0o600))
	begin := time.Now()
	must(h.StartAgent(ctx, "--config", config))
	hears := func(n int) {
		t.Helper()
		testenv.Eventually(t, 2*time.Minute, fmt.Sprintf("the agent has heard of %d resources", n), func() error {
			out, err := h.Exec(ctx, "caracalctl", "node", "status", "-o", "json")
			if err != nil {
				return err
			}
			var status agent.Status
			if err := json.Unmarshal([]byte(out), &status); err != nil {
				return err
			}
			if status.Policy.Resources < n {
				return fmt.Errorf("%d: %s", status.Policy.Resources, out)
			}
			return nil
		})
		t.Logf("%d resources heard %s after the agent's start", n, time.Since(begin).Round(10*time.Millisecond))
	}
	within := func(what string) {
		t.Helper()
		m := memoryOf(t, h)
		t.Logf("%s: the agent has %d kB resident: anonymous %d, files (the program's text) %d; peak %d", what, m["VmRSS"], m["RssAnon"], m["RssFile"], m["VmHWM"])
		if bytes := m["VmRSS"] * 1024; bytes > most*1_000_000 {
			t.Errorf("%s: %d bytes are more than %d MB", what, bytes, most)
		}
	}
	hears(pods)
	within(fmt.Sprintf("%d pods", pods))
	watches(t, log)
	many(t, s, namespaces, "/api/v1/namespaces", func(i int) string {
		return fmt.Sprintf(`{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"more-%d","labels":{"team":"team-%d"}}}`, i, i%100)
	})
	hears(pods + namespaces)
	within(fmt.Sprintf("%d pods, %d namespaces", pods, namespaces))
	watches(t, log)
}

// watches wants one watch of each kind in an audit log.
func watches(t *testing.T, log string) {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	began := make(map[string]int)
	asked := make(map[string]int)
	for line := range bytes.Lines(text) {
		var e struct {
			Verb      string `json:"verb"`
			ObjectRef struct {
				Resource string `json:"resource"`
				Group    string `json:"apiGroup"`
				Name     string `json:"name"`
			} `json:"objectRef"`
			URI string `json:"requestURI"`
		}
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		asked[e.Verb]++
		if e.Verb == "watch" {
			if resource := e.ObjectRef.Resource + "." + e.ObjectRef.Group; !strings.Contains(e.URI, "metadata.name") { // that of its own Node is another
				began[resource]++
			}
		}
	}
	t.Logf("the agent has asked for %v; its watches: %v", asked, began)
	if len(began) < 15 {
		t.Errorf("watches of %d kinds: %v", len(began), began)
	}
	for resource, n := range began {
		if n != 1 {
			t.Errorf("%d watches of %s", n, resource)
		}
	}
}

func many(t *testing.T, s *apiserver.Server, n int, path string, body func(i int) string) {
	t.Helper()
	manyAt(t, s, n, func(int) string { return path }, body)
}

// manyAt creates objects, some at once.
func manyAt(t *testing.T, s *apiserver.Server, n int, path func(i int) string, body func(i int) string) {
	t.Helper()
	client, err := rest.HTTPClientFor(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	const workers = 16
	begin := time.Now()
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			for i := worker; i < n; i += workers {
				r, err := client.Post(s.URL+path(i), "application/json", strings.NewReader(body(i)))
				if err != nil {
					t.Error(err)
					return
				}
				answer, _ := io.ReadAll(r.Body)
				r.Body.Close()
				if r.StatusCode != http.StatusCreated {
					t.Errorf("create: %s: %s", r.Status, answer)
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("created %d of %s in %s", n, path(0), time.Since(begin).Round(time.Second))
}

// memoryOf waits until the memory of a host's agent has not changed for some seconds, and returns it, kB (proc_pid_status(5)).
func memoryOf(t *testing.T, h *lab.Host) (m map[string]int) {
	t.Helper()
	const still = 5 * time.Second // longer than the agent waits until it gives memory back
	since, last := time.Now(), 0
	testenv.Eventually(t, 2*time.Minute, "the agent's memory stays the same", func() error {
		pid, err := os.ReadFile(filepath.Join(h.Dir(), "caracald.pid"))
		if err != nil {
			return err
		}
		text, err := os.ReadFile("/proc/" + string(pid) + "/status")
		if err != nil {
			return err
		}
		m = make(map[string]int)
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) == 3 && f[2] == "kB" {
				m[strings.TrimSuffix(f[0], ":")], _ = strconv.Atoi(f[1])
			}
		}
		if change := m["VmRSS"] - last; change > 200 || change < -200 {
			since, last = time.Now(), m["VmRSS"]
		}
		if time.Since(since) < still {
			return fmt.Errorf("%d kB", m["VmRSS"])
		}
		return nil
	})
	return m
}
