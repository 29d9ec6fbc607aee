// Package ctl tests caracalctl as an operator meets it: each script in testdata has a simulated node of its own, with
// pods wired by the real plugin.
//
//	      h1 (its own namespace, bpffs directory, state directory, boot id)
//	cali*              cali*
//	  |                  |
//	eth0 10.244.0.0    eth0 10.244.0.1
//	default/web        default/db
package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// run is one script with its node.
type run struct {
	t      testing.TB
	host   *lab.Host
	ctl    string
	stdin  string
	stdout string // of the last ctl
	counts map[uint32]maps.RuleCount
}

type runKey struct{}

func TestScripts(t *testing.T) {
	testenv.NeedRoot(t)
	plugin, ctl := testenv.Bin(t, "caracal"), testenv.Bin(t, "caracalctl")
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, script := range scripts {
		t.Run(strings.TrimSuffix(filepath.Base(script), ".txtar"), func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Files: []string{script},
				Setup: func(e *testscript.Env) error {
					cfg := lab.Config{Caracal: plugin}
					if strings.HasSuffix(script, "_outside.txtar") { // there is a world outside, and pods are masqueraded
						cfg.Outside, cfg.Plugin = true, map[string]any{"ipMasq": true}
					}
					if strings.HasSuffix(script, "_unknown.txtar") {
						cfg.Plugin = map[string]any{"policy": map[string]any{"unknown": "deny"}}
					}
					if strings.HasSuffix(script, "_agent.txtar") { // pools are the agent's matter
						cfg.Cluster = true
					}
					h := lab.New(t, cfg).Hosts()[0]
					e.Values[runKey{}] = &run{t: t, host: h, ctl: ctl}
					for k, v := range map[string]string{
						"STATE": h.StateDir(), "BPFFS": h.BPFDir(), "CACHE": h.CacheDir(), "NET": h.Lab().Name,
						"CARACAL_BOOT_ID_FILE": h.BootIDFile(), "CNI_BIN_DIR": e.WorkDir + "/bin", "CNI_NET_DIR": e.WorkDir + "/net.d", "PATH": e.Getenv("PATH") + ":/usr/sbin:/sbin",
					} {
						e.Setenv(k, v)
					}
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"ctl": runCtl, "as": runAs, "input": input, "pod": podCommand, "ping": ping, "host": hostCommand,
					"match": match, "parse": parse, "age": age, "hold": hold, "spoil": spoil, "settled": settled,
					"enforce": enforcePolicy, "serve": serve, "connect": connect, "send": send, "agent": agentCommand, "seen": seen, "logged": logged,
					"ask": askAgent, "counted": counted, "flood": flood, "told": told,
				},
			})
		})
	}
}

func of(ts *testscript.TestScript) *run { return ts.Value(runKey{}).(*run) }

// ctl ARG...: caracalctl on the node must exit with 0; ! ctl: with 1; ctl -2 ARG...: with 2.
func runCtl(ts *testscript.TestScript, neg bool, args []string) {
	want := 0
	if neg {
		want = 1
	}
	if len(args) > 0 && args[0] == "-2" {
		want, args = 2, args[1:]
	}
	execute(ts, want, of(ts).ctl, args)
}

// as NAME CODE ARG...: the binary under another name.
func runAs(ts *testscript.TestScript, _ bool, args []string) {
	link := ts.MkAbs(args[0])
	real, err := filepath.EvalSymlinks(of(ts).ctl)
	ts.Check(err)
	if err := os.Symlink(real, link); err != nil && !errors.Is(err, os.ErrExist) {
		ts.Fatalf("%v", err)
	}
	want := 0
	fmt.Sscan(args[1], &want)
	execute(ts, want, link, args[2:])
}

func execute(ts *testscript.TestScript, want int, path string, args []string) {
	r := of(ts)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir, cmd.Env = ts.MkAbs("."), os.Environ()
	for _, name := range []string{"CNI_BIN_DIR", "CNI_NET_DIR"} { // not the machine's own
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(r.stdin), &stdout, &stderr
	r.stdin = ""
	err := r.host.Namespace().Run(cmd)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		ts.Fatalf("%v", err)
	}
	r.stdout = stdout.String()
	ts.Stdout().Write(stdout.Bytes())
	ts.Stderr().Write(stderr.Bytes())
	if code := cmd.ProcessState.ExitCode(); code != want {
		ts.Fatalf("%s %s: exit code %d, want %d\n%s%s", filepath.Base(path), strings.Join(args, " "), code, want, &stdout, &stderr)
	}
}

// input FILE: what the next ctl reads.
func input(ts *testscript.TestScript, _ bool, args []string) { of(ts).stdin = ts.ReadFile(args[0]) }

// pod add|del|crash|forget NAME [ip=A] [plain] [namespace=N] [label=KEY:VALUE]: through the plugin. crash removes its namespace without DEL.
func podCommand(ts *testscript.TestScript, _ bool, args []string) {
	h, ctx := of(ts).host, context.Background()
	if args[0] == "add" {
		o := lab.PodOptions{ContainerID: strings.Repeat(fmt.Sprintf("%x", args[1]), 32)[:32]}
		for _, a := range args[2:] {
			k, v, _ := strings.Cut(a, "=")
			switch k {
			case "ip":
				o.IPs = append(o.IPs, netip.MustParseAddr(v))
			case "namespace":
				o.Namespace = v
			case "label":
				key, value, _ := strings.Cut(v, ":")
				if o.Labels == nil {
					o.Labels = make(map[string]string)
				}
				o.Labels[key] = value
			case "plain":
				o.NoKubernetes = true
			}
		}
		_, err := h.AddPod(ctx, args[1], o)
		ts.Check(err)
		return
	}
	p, err := h.Pod(args[1])
	ts.Check(err)
	switch args[0] {
	case "del":
		ts.Check(p.Delete(ctx))
	case "crash":
		name := p.HostIfName()
		ts.Check(p.Crash(ctx))
		until(ts, "interface "+name+" goes", func() bool {
			_, err := h.Exec(ctx, "ip", "link", "show", name)
			return err != nil
		})
	default:
		ts.Fatalf("pod %s?", args[0])
	}
}

// until waits for something that comes by itself.
func until(ts *testscript.TestScript, what string, done func() bool) {
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("waited in vain until %s", what)
		}
	}
}

// ping POD ADDRESS: one answered ping; ! ping: none is within a second.
func ping(ts *testscript.TestScript, neg bool, args []string) {
	p, err := of(ts).host.Pod(args[0])
	ts.Check(err)
	wait := "5"
	if neg {
		wait = "1"
	}
	_, err = p.Exec(context.Background(), "ping", "-n", "-c", "1", "-W", wait, args[1])
	if neg != (err != nil) {
		ts.Fatalf("ping %s: %v", strings.Join(args, " "), err)
	}
}

// host ARG...: a program in the node's namespace; ! host: that must fail.
func hostCommand(ts *testscript.TestScript, neg bool, args []string) {
	out, err := of(ts).host.Exec(context.Background(), args...)
	fmt.Fprint(ts.Stdout(), out)
	if err != nil {
		fmt.Fprint(ts.Stderr(), err)
	}
	if (err != nil) != neg {
		ts.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
}

// match FILE: the last ctl's output has these lines, word by word; * stands for any word, and columns are aligned.
func match(ts *testscript.TestScript, _ bool, args []string) {
	got := strings.Split(strings.TrimRight(of(ts).stdout, "\n"), "\n")
	want := strings.Split(strings.TrimRight(os.Expand(ts.ReadFile(args[0]), ts.Getenv), "\n"), "\n")
	same := len(got) == len(want)
	for i := 0; same && i < len(got); i++ {
		same = slices.EqualFunc(strings.Fields(got[i]), strings.Fields(want[i]), func(g, w string) bool { return w == "*" || g == w })
		if strings.TrimRight(got[i], " ") != got[i] && strings.TrimSpace(got[i]) == "" {
			same = false
		}
	}
	if !same {
		ts.Fatalf("output is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// parse json|yaml [PATH VALUE]...: the last ctl's output is one document, and at a path (.0.podName) is a value; * is any.
func parse(ts *testscript.TestScript, _ bool, args []string) {
	data := []byte(of(ts).stdout)
	if args[0] == "yaml" {
		if json.Valid(data) && strings.TrimSpace(string(data)) != "[]" {
			ts.Fatalf("JSON, not YAML")
		}
		var err error
		data, err = yaml.YAMLToJSON(data)
		ts.Check(err)
	}
	var root any
	if err := json.Unmarshal(data, &root); err != nil {
		ts.Fatalf("%v: %s", err, data)
	}
	for i := 1; i+1 < len(args); i += 2 {
		v := root
		for step := range strings.SplitSeq(strings.Trim(args[i], "."), ".") {
			switch at := v.(type) {
			case map[string]any:
				value, ok := at[step]
				if !ok {
					ts.Fatalf("%s: no key %q in %s", args[i], step, data)
				}
				v = value
			case []any:
				n := -1
				fmt.Sscan(step, &n)
				if step == "#" {
					v = len(at)
				} else if n >= 0 && n < len(at) {
					v = at[n]
				} else {
					ts.Fatalf("%s: no element %s in %s", args[i], step, data)
				}
			default:
				if step != "" {
					ts.Fatalf("%s: %v has no %q", args[i], v, step)
				}
			}
		}
		if s := fmt.Sprint(v); args[i+1] != "*" && s != args[i+1] {
			ts.Fatalf("%s is %s, want %s in\n%s", args[i], s, args[i+1], data)
		}
	}
}

// settled: waits until the plugin's helper has moved all pods to TCX, after which it looks at none of them again.
func settled(ts *testscript.TestScript, _ bool, _ []string) {
	r := of(ts)
	if !loader.HasTCX() {
		return
	}
	until(ts, "all pods are attached by TCX", func() bool {
		cmd := exec.Command(r.ctl, "pods", "-o", "json")
		var stdout bytes.Buffer
		cmd.Stdout = &stdout
		ts.Check(r.host.Namespace().Run(cmd))
		var pods []struct{ Attached string }
		ts.Check(json.Unmarshal(stdout.Bytes(), &pods))
		for _, p := range pods {
			if p.Attached != loader.ByTCX {
				return false
			}
		}
		return true
	})
}

// update changes the node's database.
func update(ts *testscript.TestScript, fn func(*node.Tx) error) {
	h := of(ts).host
	db, err := node.Open(context.Background(), h.StateDir(), node.Options{BootIDFile: h.BootIDFile()})
	ts.Check(err)
	defer db.Close()
	ts.Check(db.Update(fn))
}

// age: makes all endpoints an hour old, so that a check judges them.
func age(ts *testscript.TestScript, _ bool, _ []string) {
	update(ts, func(tx *node.Tx) error {
		var all []node.Endpoint
		err := tx.Endpoints(func(e node.Endpoint) error {
			all = append(all, e)
			return nil
		})
		for _, e := range all {
			e.Created = e.Created.Add(-time.Hour)
			err = errors.Join(err, tx.PutEndpoint(e))
		}
		return err
	})
}

// hold CONTAINER ADDRESS: as another main plugin's caracal-ipam does.
func hold(ts *testscript.TestScript, _ bool, args []string) {
	update(ts, func(tx *node.Tx) error {
		blocks, err := tx.Blocks()
		if err != nil {
			return err
		}
		a := netip.MustParseAddr(args[1])
		i := slices.IndexFunc(blocks, func(b node.Block) bool { return b.CIDR.Contains(a) })
		return tx.Hold(node.Key{Network: "other", ContainerID: args[0], IfName: "eth0"}, a, blocks[i].CIDR)
	})
}

// spoil db|reboot|build|schema|rows|norows: what must be refused or told. rows: every row of policy allows; norows: there are none.
func spoil(ts *testscript.TestScript, _ bool, args []string) {
	h := of(ts).host
	switch args[0] {
	case "db":
		ts.Check(os.WriteFile(filepath.Join(h.StateDir(), "node.db"), bytes.Repeat([]byte("not a database "), 4096), 0o600))
	case "reboot":
		ts.Check(h.Reboot(context.Background()))
	case "build":
		ts.Check(changeState(h.BPFDir(), "build"))
	case "schema":
		ts.Check(changeState(h.BPFDir(), "version"))
	case "rows", "norows":
		ts.Check(spoilRows(h.BPFDir(), args[0] == "rows"))
	default:
		ts.Fatalf("spoil %s?", args[0])
	}
}

// changeState overwrites a part of caracal_state, as a program of another build or schema would have written it.
func changeState(dir, what string) error {
	_, err := exec.LookPath("bpftool")
	if err != nil {
		return err
	}
	if err := loader.CheckBPFFS(dir); err != nil {
		return err
	}
	out, err := exec.Command("bpftool", "-j", "map", "lookup", "pinned", filepath.Join(dir, "state"), "key", "0", "0", "0", "0").Output()
	if err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	var entry struct{ Value []string }
	if err := json.Unmarshal(out, &entry); err != nil {
		return err
	}
	switch what {
	case "version":
		entry.Value[4] = "0x63"
	case "build":
		entry.Value[56], entry.Value[57] = "0x12", "0x34"
	}
	args := append([]string{"map", "update", "pinned", filepath.Join(dir, "state"), "key", "0", "0", "0", "0", "value"}, entry.Value...)
	if out, err := exec.Command("bpftool", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("write state: %w: %s", err, out)
	}
	return nil
}

// TestNotRoot: what takes root says so.
func TestNotRoot(t *testing.T) {
	testenv.NeedRoot(t)
	ctl := testenv.Bin(t, "caracalctl")
	h := lab.New(t, lab.Config{Caracal: testenv.Bin(t, "caracal")}).Hosts()[0]
	h.TestPod(t, "web", lab.PodOptions{})
	// A copy of the binary that the other user can reach.
	dir, err := os.MkdirTemp("", "cctl-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	data, err := os.ReadFile(ctl)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, "caracalctl")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(copied, data, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"pods", "routes", "counters", "uninstall"} {
		cmd := exec.Command(copied, verb)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := h.Namespace().Run(cmd); err == nil || !strings.Contains(stderr.String(), "root") {
			t.Errorf("%s as nobody: %v: %s", verb, err, &stderr)
		}
	}
}
