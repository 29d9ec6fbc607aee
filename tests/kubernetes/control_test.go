//go:build cluster

package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/lab"
)

const (
	services4 = "10.96.0.0/16"
	services6 = "fd00:10:96::/112"
	pods4     = "10.244.0.0/16"
	pods6     = "fd00:10:244::/56"
	dns       = "10.96.0.10"
)

// control is the control plane: programs in the network of one host, which is no node.
type control struct {
	*lab.Host
	t       testing.TB
	bin     string // of Kubernetes's programs
	pki     *pki
	options options
	running map[string]*process
}

// process is a program of the control plane.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// url is the API server's.
func (c *control) url() string { return "https://" + net.JoinHostPort(c.Addr().String(), "6443") }

// etcd is where etcd answers the nodes.
func (c *control) etcd() string { return "http://" + net.JoinHostPort(c.Addr().String(), "2379") }

func (c *control) path(name string) string { return filepath.Join(c.Dir(), name) }

// config writes a user's kubeconfig and returns its path.
func (c *control) config(name, user string, groups ...string) string {
	c.t.Helper()
	path := c.path(name + ".kubeconfig")
	must(c.t, os.WriteFile(path, []byte(c.pki.kubeconfig(c.url(), name, user, groups...)), 0o600))
	return path
}

func newControl(t testing.TB, h *lab.Host, bin string, o options) *control {
	t.Helper()
	c := &control{Host: h, t: t, bin: bin, options: o, running: make(map[string]*process)}
	for _, dir := range []string{"pki", "log"} {
		must(t, os.Mkdir(c.path(dir), 0o700))
	}
	c.pki = newPKI(t, c.path("pki"))
	names := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	addrs := []net.IP{net.IPv4(127, 0, 0, 1), c.Addr().AsSlice(), c.Addr6().AsSlice()}
	for _, s := range []string{services4, services6} {
		addrs = append(addrs, netip.MustParsePrefix(s).Addr().Next().AsSlice())
	}
	c.pki.server("apiserver", names, addrs)
	c.pki.client("kubelet-client", "apiserver-kubelet-client", "system:masters")
	c.config("admin", "admin", "system:masters")
	c.config("controllers", "system:kube-controller-manager")
	c.config("scheduler", "system:kube-scheduler")
	c.config("proxy", "system:kube-proxy")
	return c
}

// start starts all of it.
func (c *control) start() {
	c.t.Helper()
	c.startEtcd()
	c.startAPI()
	c.startControllers()
}

func (c *control) services() string {
	if c.options.dualStack {
		return services4 + "," + services6
	}
	return services4
}

func (c *control) pods() string {
	if c.options.dualStack {
		return pods4 + "," + pods6
	}
	return pods4
}

func (c *control) startEtcd() {
	local := "http://127.0.0.1:2379"
	c.run("etcd", "--data-dir", c.path("etcd"), "--listen-client-urls", local+","+c.etcd(), "--advertise-client-urls", c.etcd(),
		"--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
		"--initial-cluster", "default=http://127.0.0.1:2380", "--unsafe-no-fsync", "--log-level", "error")
	eventually(c.t, "etcd answers", func() error {
		return c.Do(func() error {
			conn, err := net.Dial("tcp", "127.0.0.1:2379")
			if err != nil {
				return err
			}
			return conn.Close()
		})
	})
}

// startAPI starts the API server, again after stop("kube-apiserver"), and waits until it answers.
func (c *control) startAPI() {
	c.t.Helper()
	p := c.pki.path
	c.run("kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443", "--advertise-address="+c.Addr().String(),
		"--tls-cert-file="+p("apiserver.crt"), "--tls-private-key-file="+p("apiserver.key"), "--client-ca-file="+p("ca.crt"),
		"--kubelet-client-certificate="+p("kubelet-client.crt"), "--kubelet-client-key="+p("kubelet-client.key"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--service-account-key-file="+p("sa.pub"), "--service-account-signing-key-file="+p("sa.key"),
		"--requestheader-client-ca-file="+p("ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--service-cluster-ip-range="+c.services(), "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", "--v=1")
	eventually(c.t, "the API server answers", func() error {
		_, err := c.Namespace().Exec(context.Background(), filepath.Join(c.bin, "kubectl"), "--kubeconfig", c.path("admin.kubeconfig"), "get", "--raw=/readyz", "--request-timeout=5s")
		return err
	})
}

func (c *control) startControllers() {
	config := func(name string) []string {
		path := c.path(name + ".kubeconfig")
		return []string{"--kubeconfig=" + path, "--authentication-kubeconfig=" + path, "--authorization-kubeconfig=" + path, "--leader-elect=false", "--bind-address=127.0.0.1"}
	}
	p := c.pki.path
	c.run("kube-controller-manager", append(config("controllers"), "--service-account-private-key-file="+p("sa.key"), "--root-ca-file="+p("ca.crt"),
		fmt.Sprintf("--allocate-node-cidrs=%v", c.options.podCIDR), "--cluster-cidr="+c.pods(), "--service-cluster-ip-range="+c.services(), "--use-service-account-credentials=true",
		"--flex-volume-plugin-dir="+c.path("volumes"))...)
	c.run("kube-scheduler", config("scheduler")...)
}

// run starts a program of Kubernetes; its output goes to NAME.log.
func (c *control) run(name string, arg ...string) {
	c.t.Helper()
	log, err := os.OpenFile(c.logFile(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(c.t, err)
	defer log.Close()
	cmd := exec.Command(filepath.Join(c.bin, name), arg...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	must(c.t, c.Namespace().Start(cmd))
	p := &process{cmd, make(chan struct{})}
	c.running[name] = p
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(p.done)
	}()
}

// stop ends a program as a crash does.
func (c *control) stop(name string) {
	c.t.Helper()
	p := c.running[name]
	delete(c.running, name)
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		c.t.Error(err)
	}
	<-p.done
}

func (c *control) stopAll() {
	for name := range c.running {
		c.stop(name)
	}
}

func (c *control) logFile(name string) string { return filepath.Join(c.path("log"), name+".log") }

// tail is the end of a log, of the lines that warn.
func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		if warning.MatchString(line) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-30):], "")
}

// warning matches a line of what klog and slog and containerd write that is not for information alone.
var warning = regexp.MustCompile(`^[EWF]|^\s|level=(WARN|ERROR|error|fatal)|^panic|^goroutine`)
