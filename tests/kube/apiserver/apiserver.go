// Package apiserver starts a Kubernetes API for a test: a real kube-apiserver before a real etcd, and nothing else. Nobody schedules,
// runs or collects anything: the test makes Nodes, Pods and their status itself. RBAC is on.
package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// startLimit is far beyond the some seconds that it takes to start, restart or stop.
const startLimit = 2 * time.Minute

// Options say where the API runs.
type Options struct {
	Addr string // address it listens on, of the machine or of Command's namespace; "": 127.0.0.1
	Port int    // 0: a free one

	// Command makes a command of what runs here, such as in a network namespace; nil: exec.CommandContext. Dial connects from there;
	// nil: as the machine does.
	Command func(ctx context.Context, name string, arg ...string) *exec.Cmd
	Dial    func(ctx context.Context, network, addr string) (net.Conn, error)

	Args []string // more of kube-apiserver's
	Etcd []string // and of etcd's
}

// On is an API on a host of a lab, reached from there.
func On(h *lab.Host) Options {
	return Options{
		Addr: h.Addr().String(),
		Command: func(ctx context.Context, name string, arg ...string) *exec.Cmd {
			return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + h.Netns(), name}, arg...)...)
		},
		Dial: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			err = h.Do(func() (err error) {
				c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return c, err
		},
	}
}

// Server is the API.
type Server struct {
	URL string
	Dir string // everything it has on disk, its logs too

	t         testing.TB
	o         Options
	ca        *authority
	store     string // etcd's URL
	etcd, api *process
}

var version = regexp.MustCompile(`(?m)^require k8s\.io/kubernetes (\S+)$`)

// Binary returns the path of one of Kubernetes's programs, of the version of tools/kubernetes: kube-apiserver, kubectl, etcd.
func Binary(t testing.TB, name string) string {
	t.Helper()
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile(filepath.Join(root, "tools/kubernetes/go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	m := version.FindSubmatch(mod)
	if m == nil {
		t.Fatal("tools/kubernetes/go.mod requires no k8s.io/kubernetes")
	}
	path := filepath.Join(root, "out/kubernetes", string(m[1]), name)
	if _, err := os.Stat(path); err != nil {
		lab.Skip(t, fmt.Sprintf("needs %s of Kubernetes; .ci/kubernetes builds it (%v)", name, err))
	}
	return path
}

// Start starts an API that is empty but for what every one has, waits until it is ready and ends it with the test.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	if o.Addr == "" {
		o.Addr = "127.0.0.1"
	}
	if o.Command == nil {
		o.Command = exec.CommandContext
	}
	ports := freePorts(t, 3)
	if o.Port == 0 {
		o.Port = ports[0]
	}
	s := &Server{t: t, o: o, Dir: t.TempDir()}
	s.URL = "https://" + net.JoinHostPort(o.Addr, fmt.Sprint(o.Port))
	s.ca = newAuthority(t, s.Dir, "ca")
	client, peer := fmt.Sprintf("http://127.0.0.1:%d", ports[1]), fmt.Sprintf("http://127.0.0.1:%d", ports[2])
	s.etcd = s.process("etcd", append([]string{"--data-dir", filepath.Join(s.Dir, "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default=" + peer}, o.Etcd...)...)
	s.store = client
	serving, servingKey := s.ca.issue(t, servingName, nil, o.Addr)
	account := s.ca.accountKey(t)
	s.api = s.process("kube-apiserver", append([]string{
		"--etcd-servers", client, "--bind-address", o.Addr, "--secure-port", fmt.Sprint(o.Port), "--cert-dir", s.Dir,
		"--tls-cert-file", serving, "--tls-private-key-file", servingKey, "--client-ca-file", s.ca.file,
		"--service-account-issuer", "https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file", account, "--service-account-signing-key-file", account,
		"--service-cluster-ip-range", "10.96.0.0/16", "--authorization-mode", "RBAC", "--allow-privileged=true",
		"--disable-admission-plugins", "ServiceAccount", // nobody makes the accounts that it wants pods to have
		// What would write something each ten seconds.
		"--endpoint-reconciler-type", "none", "--feature-gates", "APIServerIdentity=false",
	}, o.Args...)...)
	t.Cleanup(func() {
		s.api.kill()
		s.etcd.kill()
		if t.Failed() {
			t.Logf("kube-apiserver:\n%s", s.api.tail())
		}
	})
	s.etcd.start(t)
	s.Restart()
	return s
}

// Restart starts the API that Stop has ended, and waits until it is ready.
func (s *Server) Restart() {
	s.t.Helper()
	s.api.start(s.t)
	cfg := s.Config()
	cfg.TLSClientConfig.Insecure, cfg.CAFile, cfg.CAData = true, "", nil // it may have another authority's certificate by now
	c, err := rest.HTTPClientFor(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.CloseIdleConnections()
	c.Timeout = time.Second
	for deadline := time.Now().Add(startLimit); ; time.Sleep(50 * time.Millisecond) {
		r, err := c.Get(s.URL + "/readyz")
		if err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return
			}
			err = fmt.Errorf("status %s", r.Status)
		}
		if s.api.ended() || s.etcd.ended() || time.Now().After(deadline) {
			s.t.Fatalf("Kubernetes API is not ready: %v\n%s\n%s", err, s.api.tail(), s.etcd.tail())
		}
	}
}

// Stop kills the API. What it has stays.
func (s *Server) Stop() { s.api.kill() }

// StopEtcd kills the API's etcd. What it has stays.
func (s *Server) StopEtcd() { s.etcd.kill() }

// StartEtcd starts etcd that StopEtcd has ended. The API finds it by itself.
func (s *Server) StartEtcd() { s.etcd.start(s.t) }

// AskEtcd has etcd's gateway do something that the API would not, and fails the test unless it does: "kv/compaction".
func (s *Server) AskEtcd(what, body string) string {
	s.t.Helper()
	out, err := s.TryEtcd(what, body)
	if err != nil {
		s.t.Fatalf("etcd %s: %v\n%s", what, err, out)
	}
	return out
}

// TryEtcd is AskEtcd that may fail.
func (s *Server) TryEtcd(what, body string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	cmd := s.o.Command(ctx, "curl", "-sS", "--fail-with-body", "-d", "@-", s.store+"/v3/"+what)
	cmd.Stdin = strings.NewReader(body)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Compact makes etcd forget how it came to be as it is.
func (s *Server) Compact() {
	s.t.Helper()
	var answer struct{ Header struct{ Revision string } }
	if err := json.Unmarshal([]byte(s.AskEtcd("kv/range", `{"key":"AA=="}`)), &answer); err != nil {
		s.t.Fatal(err)
	}
	s.AskEtcd("kv/compaction", fmt.Sprintf(`{"revision":%q,"physical":true}`, answer.Header.Revision))
}

// Pause makes the API hang, with its connections open, until the function that it returns is called.
func (s *Server) Pause() (resume func()) {
	s.t.Helper()
	signal := func(sig unix.Signal) {
		if err := unix.Kill(s.api.cmd.Process.Pid, sig); err != nil {
			s.t.Fatalf("signal %s: %v", sig, err)
		}
	}
	signal(unix.SIGSTOP)
	for begin := time.Now(); s.running(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > startLimit {
			s.t.Fatal("the API does not stop")
		}
	}
	return func() { signal(unix.SIGCONT) }
}

// running tells whether a thread of the API is not stopped.
func (s *Server) running() bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", s.api.cmd.Process.Pid))
	for _, t := range threads {
		if text, err := os.ReadFile(t); err == nil && !bytes.Contains(text, []byte("State:\tT")) {
			return true
		}
	}
	return false
}

// Config is an administrator's way to the API.
func (s *Server) Config() *rest.Config {
	s.t.Helper()
	c, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig(""))
	if err != nil {
		s.t.Fatal(err)
	}
	c.QPS, c.Dial = -1, s.o.Dial
	return c
}

// Kubectl runs kubectl as an administrator, and fails the test when that fails. It returns what kubectl writes.
func (s *Server) Kubectl(stdin string, arg ...string) string {
	s.t.Helper()
	out, err := s.TryKubectl(stdin, arg...)
	if err != nil {
		s.t.Fatalf("kubectl %s: %v\n%s", strings.Join(arg, " "), err, out)
	}
	return out
}

// TryKubectl is Kubectl that may fail.
func (s *Server) TryKubectl(stdin string, arg ...string) (string, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	cmd := s.o.Command(ctx, Binary(s.t, "kubectl"), append([]string{"--kubeconfig", s.Kubeconfig("")}, arg...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// process is a program that the test can end and start again.
type process struct {
	path    string
	arg     []string
	log     string
	command func(ctx context.Context, name string, arg ...string) *exec.Cmd
	cmd     *exec.Cmd
	done    chan struct{}
}

func (s *Server) process(name string, arg ...string) *process {
	return &process{path: Binary(s.t, name), arg: arg, log: filepath.Join(s.Dir, name+".log"), command: s.o.Command}
}

func (p *process) start(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.cmd = p.command(context.Background(), p.path, p.arg...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(p.cmd.Environ(), "GOGC=400") // it has much to do and little to keep
	if p.cmd.SysProcAttr == nil {
		p.cmd.SysProcAttr = &unix.SysProcAttr{}
	}
	p.cmd.SysProcAttr.Pdeathsig = unix.SIGKILL // when the test's process is killed nothing stays
	p.done = make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // whose end is what Pdeathsig means
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", p.path, err)
	}
}

func (p *process) kill() {
	if p.cmd != nil && p.cmd.Process != nil {
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// tail is the end of the log.
func (p *process) tail() string {
	b, _ := os.ReadFile(p.log)
	lines := bytes.Split(b, []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-30):], []byte("\n")))
}

// freePorts are TCP ports of loopback that nobody listens on. They are not reserved.
func freePorts(t testing.TB, n int) (ports []int) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}
