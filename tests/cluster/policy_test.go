package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

const denyAll = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all, namespace: default}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
`

const allowHTTP = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-http, namespace: default}
spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{protocol: TCP, port: 80}]}]}
`

// echo serves a TCP port of a pod: what comes goes back.
func echo(t *testing.T, p *lab.Pod, port int) {
	t.Helper()
	var l net.Listener
	must(t, p.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go testenv.Echo(l)
}

const patience = 300 * time.Millisecond // after which what policy would allow has come

// dial opens a connection from a pod.
func dial(p *lab.Pod, to netip.Addr, port int) (c net.Conn, err error) {
	err = p.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", net.JoinHostPort(to.String(), strconv.Itoa(port)), patience)
		return err
	})
	return c, err
}

// flow is an established connection.
type flow struct {
	net.Conn
	said int
}

func newFlow(t *testing.T, p *lab.Pod, to netip.Addr, port int) *flow {
	t.Helper()
	f := &flow{}
	eventually(t, fmt.Sprintf("%s reaches %s port %d", p.Name, to, port), func() (err error) {
		f.Conn, err = dial(p, to, port)
		return err
	})
	t.Cleanup(func() { f.Close() })
	raw, err := f.Conn.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { // what was dropped is repeated soon, not later and later (tcp(7))
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS, 1)
	}))
	must(t, err)
	must(t, f.say(time.Minute))
	return f
}

// say sends something, and waits for its answer and that of all before.
func (f *flow) say(wait time.Duration) error {
	if _, err := f.Write([]byte{1}); err != nil {
		return err
	}
	f.said++
	return f.hear(wait)
}

func (f *flow) hear(wait time.Duration) error {
	f.SetReadDeadline(time.Now().Add(wait))
	n, err := io.ReadFull(f, make([]byte, f.said))
	f.said -= n
	return err
}

// policyLab is web on one host, and clients in another namespace on both.
type policyLab struct {
	*testing.T
	*lab.Lab
	web, near, far *lab.Pod
}

func newPolicyLab(t *testing.T) *policyLab {
	l := newCluster(t, 2)
	p := &policyLab{T: t, Lab: l}
	p.web = l.Host(1).TestPod(t, "web", lab.PodOptions{Labels: map[string]string{"app": "web"}})
	p.near = l.Host(1).TestPod(t, "near", lab.PodOptions{Namespace: "clients", Labels: map[string]string{"at": "near"}})
	p.far = l.Host(2).TestPod(t, "far", lab.PodOptions{Namespace: "clients", Labels: map[string]string{"at": "far"}})
	echo(t, p.web, 80)
	echo(t, p.web, 81)
	return p
}

// TestPolicy shares one lab among the tests of policy: most of what each takes is to build one. Each leaves no policy behind, but
// the others may leave a connection whose end a policy holds up, and what-if knows of each.
func TestPolicy(t *testing.T) {
	p := newPolicyLab(t)
	for _, test := range []struct {
		name string
		run  func(*policyLab)
	}{{"what-if", testWhatIf}, {"orders", testOrders}, {"agent", testAgent}, {"why", testWhy}} {
		if !t.Run(test.name, func(t *testing.T) { test.run(&policyLab{t, p.Lab, p.web, p.near, p.far}) }) {
			break // what it left in force is in the others' way
		}
	}
}

func (p *policyLab) clients() []*lab.Pod { return []*lab.Pod{p.near, p.far} }

// apply puts resources in the store.
func (p *policyLab) apply(text string, args ...string) {
	p.Helper()
	if args == nil {
		args = []string{"apply", "-f", "-"}
	}
	ctl(p.T, p.Host(1), text, args...)
}

func (p *policyLab) delete(kind, name string) {
	p.Helper()
	p.apply("", "delete", kind, name)
}

// open waits until new connections to web are what they should be.
func (p *policyLab) open(port int, want bool, from ...*lab.Pod) {
	p.Helper()
	for _, client := range from {
		eventually(p.T, fmt.Sprintf("%s to port %d: allowed %t", client.Name, port, want), func() error {
			c, err := dial(client, p.web.Addr(), port)
			if err == nil {
				c.Close()
			}
			if got := err == nil; got != want {
				return fmt.Errorf("allowed %t: %v", got, err)
			}
			return nil
		})
	}
}

// Deny-all and allow-http, in both orders, on new and on established connections, from pods on both hosts.
func testOrders(p *policyLab) {
	t := p.T
	var http, other []*flow
	for _, c := range p.clients() {
		http = append(http, newFlow(t, c, p.web.Addr(), 80))
		other = append(other, newFlow(t, c, p.web.Addr(), 81))
	}
	goesOn := func(want bool, flows ...*flow) {
		t.Helper()
		for i, f := range flows {
			wait := patience
			if want {
				wait = time.Minute // what was dropped is repeated, later and later
			}
			err := f.say(wait)
			if got := err == nil; got != want || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("established from %s to %s: goes on %t, want %t (%v)", p.clients()[i].Name, f.RemoteAddr(), got, want, err)
			}
		}
	}
	for _, order := range [][]string{{denyAll, allowHTTP}, {allowHTTP, denyAll}} {
		p.apply(order[0])
		p.open(81, false, p.clients()...)
		p.open(80, order[0] == allowHTTP, p.clients()...)
		goesOn(false, other...)
		goesOn(order[0] == allowHTTP, http...)
		p.apply(order[1])
		p.open(80, true, p.clients()...)
		p.open(81, false, p.clients()...)
		goesOn(true, http...)
		goesOn(false, other...)
		// What web opens itself deny-all denies, whoever it is to.
		if c, err := dial(p.web, p.far.Addr(), 9); err == nil || !strings.Contains(err.Error(), "timeout") {
			t.Errorf("from web: %v %v", c, err)
		}
		p.delete("netpol", "deny-all")
		p.delete("netpol", "allow-http")
		p.open(81, true, p.clients()...)
		goesOn(true, http...)
		goesOn(true, other...)
	}
}

const global = `apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: far-away}
spec:
  %s
  order: 10
  selector: app == "web"
  ingress:
  - {action: Allow, protocol: ICMP}
  - {action: %s, protocol: TCP, source: {selector: at == "far"}, destination: {ports: [80]}}
  - {action: Deny}
`

// What an agent put in force stays when it is killed, no packet is lost then, and what changed meanwhile is
// in force when it is back. A policy that can't be put in force is named, and what was in force of it stays.
func testAgent(p *policyLab) {
	t := p.T
	ctx := t.Context()
	h := p.Host(1)
	p.apply(fmt.Sprintf(global, "", "Allow"))
	p.open(80, true, p.far)
	p.open(80, false, p.near)
	p.open(81, false, p.clients()...)

	// The store has the pods of both hosts, each once.
	var endpoints string
	eventually(t, "the pods are published", func() error {
		endpoints = ctl(t, h, "", "get", "wep", "-A", "-o", "yaml")
		for _, pod := range []*lab.Pod{p.web, p.near, p.far} {
			if strings.Count(endpoints, pod.Addr().String()+"/32") != 1 {
				return fmt.Errorf("pod %s\n%s", pod.Name, endpoints)
			}
		}
		return nil
	})

	shown := ctl(t, h, "", "policy", "show", "web")
	for _, want := range []string{
		"default/web  ingress    default  GlobalNetworkPolicy far-away  ingress[0]  allow ICMP\n",
		`ingress[1]  allow TCP to port 80 from pods with at == "far"`, "default  -                             -           deny everything else\n", "allow everything else: no profile\n",
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %q in\n%s", want, shown)
		}
	}

	ping, stop := context.WithCancel(ctx)
	defer stop()
	var outs []*bytes.Buffer
	var pings []*exec.Cmd
	for _, c := range p.clients() {
		cmd := exec.CommandContext(ping, "ping", "-i", "0.01", "-W", "1", p.web.Addr().String())
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
		out := &bytes.Buffer{}
		cmd.Stdout = out
		must(t, c.Namespace().Start(cmd))
		pings, outs = append(pings, cmd), append(outs, out)
	}
	eventually(t, "what ids its rules have is saved", func() error { // which it does a while after they are in force
		s, err := status(t, h)
		if err != nil {
			return err
		}
		file, err := os.Stat(filepath.Join(h.StateDir(), "policy.db"))
		if err == nil && !file.ModTime().After(s.Policy.Since) {
			err = fmt.Errorf("policy.db is of %s, what is in force of %s", file.ModTime(), s.Policy.Since)
		}
		return err
	})
	must(t, h.Signal(ctx, "caracald", 9))
	p.open(80, true, p.far)
	p.open(80, false, p.near)
	if alone := ctl(t, h, "", "policy", "show", "web"); alone != shown {
		t.Errorf("without an agent:\n%s\nwant\n%s", alone, shown)
	}
	// Nothing of what it finds is new, so it writes nothing.
	must(t, h.StartAgent(ctx))
	is(t, h, "knows policy", func(s agent.Status) bool {
		return s.Ready && s.Policy.Known && s.Policy.Policies == 1 && s.Policy.Pods == 2
	})
	if s, err := status(t, h); err != nil || s.Policy.Commits != 0 {
		t.Errorf("the agent has changed policy that was in force: %+v (%v)", s.Policy, err)
	}
	must(t, h.Signal(ctx, "caracald", 9))
	p.apply(fmt.Sprintf(global, "", "Deny"))
	p.open(80, true, p.far)
	must(t, h.StartAgent(ctx))
	p.open(80, false, p.far)
	ready(t, h, 1)
	stop()
	for i, cmd := range pings {
		cmd.Wait() // says that it was interrupted
		if !strings.Contains(outs[i].String(), " 0% packet loss") {
			t.Error(outs[i].String()[max(0, outs[i].Len()-300):])
		}
	}

	// A tier that nobody made: what was in force stays, and the problem goes when it is mended.
	p.apply(fmt.Sprintf(global, "tier: none", "Allow"))
	is(t, h, "names the policy", func(s agent.Status) bool {
		for _, problem := range s.Problems {
			if problem.About == "policy" && strings.Contains(problem.Text, "GlobalNetworkPolicy far-away") && strings.Contains(problem.Text, "there is no Tier none") {
				return true
			}
		}
		return false
	})
	p.open(80, false, p.far)
	p.apply("apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: none}\nspec: {order: 5}\n")
	p.open(80, true, p.far)
	ready(t, h, 1)

	// What people add to a pod in the store counts, and its agent leaves it there.
	var name string
	for line := range strings.Lines(ctl(t, h, "", "get", "wep", "-n", "clients", "-o", "yaml")) {
		if found, ok := strings.CutPrefix(strings.TrimSpace(line), "name: h1-"); ok {
			name = "h1-" + found
		}
	}
	p.apply(fmt.Sprintf(global, "", "Allow"))
	p.open(80, false, p.near)
	p.apply(strings.Replace(ctl(t, h, "", "get", "wep", name, "-n", "clients", "-o", "yaml"), "at: near", "at: near\n    extra: \"yes\"", 1))
	p.apply(strings.Replace(fmt.Sprintf(global, "", "Allow"), `at == "far"`, `has(extra)`, 1))
	p.open(80, true, p.near)
	p.open(80, false, p.far)
	p.apply(fmt.Sprintf(global, "", "Allow"))
	p.open(80, true, p.far)

	// Pods come and go.
	late := p.Host(2).TestPod(t, "late", lab.PodOptions{Namespace: "clients", Labels: map[string]string{"at": "far"}})
	p.open(80, true, late)
	must(t, late.Delete(ctx))
	eventually(t, "the pod is taken back", func() error {
		if all := ctl(t, h, "", "get", "wep", "-A"); strings.Contains(all, "late") || !strings.Contains(all, "far") {
			return errors.New(all)
		}
		return nil
	})
	p.delete("gnp", "far-away")
	p.open(81, true, p.clients()...)
}
