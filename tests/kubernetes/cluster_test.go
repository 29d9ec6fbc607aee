//go:build cluster

// Package kubernetes tests Caracal in a whole cluster: the control plane of Kubernetes on one simulated host, and nodes that are
// simulated machines, each with Debian's containerd, a kubelet, a kube-proxy and Caracal. .ci/kubernetes builds what Debian has
// not.
//
//	       n1 (h1)                  n2 (h2)                 control (h3)
//	kubelet, containerd,     kubelet, containerd,     etcd, kube-apiserver,
//	kube-proxy, Caracal      kube-proxy, Caracal      controllers, scheduler
//	  pods    |                pods    |                       |
//	          +-------------------- switch --------------------+------ outside
package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// options say what is not as usual in a cluster.
type options struct {
	nodes     int    // default 2, called n1, n2, ...
	proxy     string // kube-proxy's mode: "nftables" (default) or "iptables"
	dualStack bool   // pods and Services have addresses of both families
	podCIDR   bool   // Kubernetes says which addresses a node's pods get
	bare      bool   // no network: nodes do not become ready

	settings map[string]string // in the ConfigMap, instead of those that are there
}

// cluster is one that runs.
type cluster struct {
	t       testing.TB
	options options
	lab     *lab.Lab
	control *control
	nodes   []*node
}

// start starts a cluster and waits until its nodes are ready. It ends with the test.
func start(t testing.TB, o options) *cluster {
	t.Helper()
	testenv.NeedRoot(t)
	for program, debian := range map[string]string{"containerd": "containerd", "runc": "runc", "loopback": "containernetworking-plugins", "nft": "nftables", "iptables": "iptables", "conntrack": "conntrack"} {
		testenv.NeedProgram(t, program, debian)
	}
	if o.nodes == 0 {
		o.nodes = 2
	}
	if o.proxy == "" {
		o.proxy = "nftables"
	}
	bin := programs(t)
	l := lab.New(t, lab.Config{Hosts: o.nodes + 1, Outside: true, Cluster: true, Caracal: filepath.Join(bin, "caracal")})
	c := &cluster{t: t, options: o, lab: l}
	t.Cleanup(c.end)
	c.control = newControl(t, l.Host(o.nodes+1), bin, o)
	c.control.start()
	c.apply(`apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: kube-proxy}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:node-proxier"}
subjects: [{kind: User, name: "system:kube-proxy", apiGroup: rbac.authorization.k8s.io}]
`)
	c.nodes = make([]*node, o.nodes)
	c.accounted("default")
	together(o.nodes, func(i int) { c.nodes[i] = c.boot(l.Host(i+1), fmt.Sprintf("n%d", i+1)) })
	if t.Failed() {
		t.FailNow()
	}
	if o.bare {
		return c
	}
	c.install()
	c.ready()
	return c
}

// with is the cluster for a part of its test.
func (c *cluster) with(t testing.TB) *cluster {
	part, control := *c, *c.control
	part.t, control.t, part.control = t, t, &control
	part.nodes = nil
	for _, n := range c.nodes {
		n := *n
		n.t, n.cluster = t, &part
		part.nodes = append(part.nodes, &n)
	}
	return &part
}

// install installs Caracal as a user does.
func (c *cluster) install() {
	c.t.Helper()
	root, err := testenv.Root()
	must(c.t, err)
	text, err := os.ReadFile(filepath.Join(root, "deploy/kubernetes/caracal.yaml"))
	must(c.t, err)
	for name, value := range c.options.settings {
		line := regexp.MustCompile("(?m)^  " + name + ": .*$")
		if !line.Match(text) {
			c.t.Fatalf("no setting %s", name)
		}
		text = line.ReplaceAll(text, fmt.Appendf(nil, "  %s: %q", name, value))
	}
	c.apply(string(text))
}

// ready waits until all nodes are.
func (c *cluster) ready() {
	c.t.Helper()
	for _, n := range c.nodes {
		c.eventually(n.name+" is ready", "True", "get", "node", n.name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
	}
}

// eventually waits until kubectl writes what is wanted.
func (c *cluster) eventually(what, want string, arg ...string) {
	c.t.Helper()
	eventually(c.t, what, func() error {
		got, err := c.tryKubectl(c.t.Context(), arg...)
		if err == nil && got != want {
			err = fmt.Errorf("kubectl %s: %q, want %q", strings.Join(arg, " "), got, want)
		}
		return err
	})
}

// namespace makes a namespace in which pods can be made at once.
func (c *cluster) namespace(name, labels string) {
	c.t.Helper()
	c.apply(fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {%s}}\n", name, labels))
	c.accounted(name)
}

// accounted waits until a namespace has the service account that its pods have.
func (c *cluster) accounted(namespace string) {
	c.t.Helper()
	c.eventually("namespace "+namespace+" has a service account", "default", "-n", namespace, "get", "serviceaccount", "default", "-o", "jsonpath={.metadata.name}")
}

// machine finds a node's machine by the node's name.
func (c *cluster) machine(name string) *node {
	c.t.Helper()
	for _, n := range c.nodes {
		if n.name == name {
			return n
		}
	}
	c.t.Fatalf("no node %s", name)
	return nil
}

// kubectl runs kubectl as the cluster's administrator, which must succeed, and returns what it writes to standard output.
func (c *cluster) kubectl(ctx context.Context, arg ...string) string {
	c.t.Helper()
	out, err := c.tryKubectl(ctx, arg...)
	must(c.t, err)
	return out
}

// tryKubectl is kubectl that may fail: the error has what it writes to standard error.
func (c *cluster) tryKubectl(ctx context.Context, arg ...string) (string, error) {
	return c.kubectlInput(ctx, "", arg...)
}

func (c *cluster) kubectlInput(ctx context.Context, stdin string, arg ...string) (string, error) {
	out, err := c.control.Namespace().ExecInput(ctx, stdin, append([]string{filepath.Join(c.control.bin, "kubectl"), "--kubeconfig", c.control.path("admin.kubeconfig")}, arg...)...)
	return strings.TrimSpace(out), err
}

// apply applies manifests.
func (c *cluster) apply(manifests string) {
	c.t.Helper()
	_, err := c.kubectlInput(c.t.Context(), manifests, "apply", "-f", "-")
	must(c.t, err)
}

// get reads an object, or a list of them, into one of Kubernetes's types.
func get[T any](c *cluster, arg ...string) (T, error) {
	var object T
	out, err := c.tryKubectl(c.t.Context(), append([]string{"get", "-o", "json"}, arg...)...)
	if err == nil {
		err = json.Unmarshal([]byte(out), &object)
	}
	return object, err
}

// end ends the nodes' pods; the lab ends the rest.
func (c *cluster) end() {
	if c.t.Failed() && c.control != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		for _, arg := range [][]string{{"get", "nodes,pods,services", "-A", "-o", "wide"}, {"get", "events", "-A", "--sort-by=.lastTimestamp"}} {
			out, err := c.tryKubectl(ctx, arg...)
			c.t.Logf("kubectl %s: %v\n%s", strings.Join(arg, " "), err, out)
		}
		pods, _ := c.tryKubectl(ctx, "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name in (caracal, caracal-uninstall)", "-o", "name")
		for p := range strings.FieldsSeq(pods) {
			out, err := c.tryKubectl(ctx, "-n", "kube-system", "logs", p, "--all-containers", "--prefix", "--tail=40")
			c.t.Logf("the end of %s's log: %v\n%s", p, err, out)
		}
		for name := range c.control.running {
			c.t.Logf("the end of %s's log:\n%s", name, tail(c.control.logFile(name)))
		}
	}
	together(len(c.nodes), func(i int) {
		n := c.nodes[i]
		if n == nil {
			return
		}
		if c.t.Failed() {
			n.dump()
		}
		n.stop()
	})
	if c.control != nil {
		c.control.stopAll()
	}
}

// together does something n times at once.
func together(n int, do func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { do(i) })
	}
	wg.Wait()
}

// programs is a directory with our programs and Kubernetes's, and the images that nodes have.
func programs(t testing.TB) string {
	t.Helper()
	dir, err := prepare(t)
	must(t, err)
	return dir
}

var prepared struct {
	sync.Mutex
	dir string
}

// prepare fills the directory of programs, once for all tests.
func prepare(t testing.TB) (string, error) {
	prepared.Lock()
	defer prepared.Unlock()
	if prepared.dir != "" {
		return prepared.dir, nil
	}
	built, err := kubernetes()
	if err != nil {
		lab.Skip(t, "needs Kubernetes (.ci/kubernetes cluster builds it): "+err.Error())
	}
	dir := testenv.Scratch(t, "kubernetes")
	for _, name := range []string{"caracal", "caracald"} {
		if err := link(testenv.Bin(t, name), filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	for _, name := range []string{"hyperkube", "kube-apiserver", "etcd", "kubectl"} {
		if err := link(filepath.Join(built, name), filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	if err := os.Symlink("caracald", filepath.Join(dir, "caracalctl")); err != nil {
		return "", err
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"} {
		if err := os.Symlink("hyperkube", filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	if err := makeImages(t, filepath.Join(dir, "images"), filepath.Join(built, "agnhost"), dir); err != nil {
		return "", err
	}
	prepared.dir = dir
	return dir, nil
}

// kubernetes is the directory in which .ci/kubernetes has built the version that tools/kubernetes says.
func kubernetes() (string, error) {
	return builtBy("kubernetes", "tools/kubernetes/go.mod", "k8s.io/kubernetes", "agnhost")
}

// builtBy is the directory in which .ci/NAME has built the version of a module that a go.mod says. last is the last file that it makes.
func builtBy(name, mod, module, last string) (string, error) {
	root, err := testenv.Root()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(filepath.Join(root, mod))
	if err != nil {
		return "", err
	}
	_, version, _ := strings.Cut(string(text), "require "+module+" ")
	version, _, _ = strings.Cut(version, "\n")
	dir := filepath.Join(root, "out", name, version)
	_, err = os.Stat(filepath.Join(dir, last))
	return dir, err
}

// link makes a file another name of one that is there, or a copy where that can't be.
func link(from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	if os.Link(from, to) == nil {
		return nil
	}
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o755)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience is how long anything may take that is waited for: a slow cluster on a busy machine is normal.
const patience = 40 * time.Second

// eventually waits for what may not hold yet.
func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, patience, what, fn)
}
