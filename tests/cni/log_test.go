package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/tests/testenv"
)

// line is one of a log in JSON.
type line struct {
	Time, Level, Msg, Command, Network, Container, Interface, Namespace, Pod, Addresses, Error string

	HostInterface string  `json:"host_interface"`
	Duration      float64 `json:"duration_ms"`
	Code          int
	Removed       *int
	TraceID       string `json:"trace_id"`
	SpanID        string `json:"span_id"`
}

// readLog takes what there is in a log file out of it. Each line must be an object with a time by RFC 3339.
func readLog(t *testing.T, path string) []line {
	t.Helper()
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	must(t, err)
	must(t, os.Truncate(path, 0))
	return testenv.ReadLog(t, text, func(l line) string { return l.Time })
}

// TestLog: each command has one line, which says what it was about, how long it took and what came of it; steps are for debugging;
// and nothing of the configuration that is secret is in a log.
func TestLog(t *testing.T) {
	const secret = "s3cr3t-t0ken"
	h := newHost(t)
	file := filepath.Join(h.dir, "log", "cni.log")
	h.conf["log_level"], h.conf["log_format"], h.conf["log_file_path"] = "info", "json", file
	h.conf["policy"] = object{"type": "k8s", "k8s_auth_token": secret, "k8s_client_key": secret}
	h.conf["kubernetes"], h.conf["etcd_key_file"], h.conf["datastore_password"] = object{"token": secret}, secret, secret
	p := h.pod()
	p.args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0"
	one := func(command string) line {
		t.Helper()
		lines := readLog(t, file)
		if len(lines) != 1 || lines[0].Command != command || lines[0].Network != "pods" || lines[0].Duration <= 0 {
			t.Fatalf("%s: %+v", command, lines)
		}
		return lines[0]
	}
	about := func(l line) {
		t.Helper()
		if l.Msg != "done" || l.Level != "INFO" || l.Container != p.id || l.Interface != "eth0" || l.Namespace != "shop" || l.Pod != "web-0" ||
			!strings.HasPrefix(l.HostInterface, "cali") || !strings.HasPrefix(l.Addresses, "10.244.") || !strings.Contains(l.Addresses, ",fd00:10::") {
			t.Errorf("%+v", l)
		}
	}
	must(t, p.do("ADD"))
	about(one("ADD"))
	raw := p.raw
	p.conf = object{"prevResult": raw}
	must(t, p.do("CHECK"))
	about(one("CHECK"))
	p.conf = nil
	must(t, p.do("STATUS"))
	one("STATUS")
	p.args = "" // a runtime need not tell
	must(t, p.do("DEL"))
	about(one("DEL"))
	must(t, p.do("DEL"))
	if l := one("DEL"); l.Addresses != "" || l.Msg != "done" {
		t.Errorf("a DEL of nothing: %+v", l)
	}
	p.add()
	q := h.pod().add()
	readLog(t, file)
	p.conf = object{"cni.dev/valid-attachments": []object{{"containerID": q.id, "ifname": q.ifname}}}
	must(t, p.do("GC"))
	if l := one("GC"); l.Removed == nil || *l.Removed != 1 || l.Addresses != "" {
		t.Errorf("GC: %+v", l)
	}
	p.conf = object{"args": object{"cni": object{"ips": []string{"203.0.113.9"}}}}
	if p.do("ADD") == nil {
		t.Error("ADD gave an address outside all pools")
	}
	if l := one("ADD"); l.Msg != "failed" || l.Level != "ERROR" || l.Code != 102 || !strings.Contains(l.Error, "203.0.113.9") {
		t.Errorf("ADD refused: %+v", l)
	}

	h.conf["log_level"] = "debug"
	p.conf = object{"ipam": object{"assign_ipv4": secret[:3]}} // what is wrong may be quoted
	_ = p.do("ADD")
	p.conf = nil
	out := p.stderr(t, "ADD")
	text, err := os.ReadFile(file)
	must(t, err)
	if strings.Contains(out+string(text), secret) {
		t.Errorf("a secret is in the log: %s", out)
	}
	steps := 0
	for _, l := range readLog(t, file) {
		if l.Msg == "step" && l.Level == "DEBUG" {
			steps++
		}
	}
	if steps < 8 {
		t.Errorf("%d steps", steps)
	}
	h.conf["log_format"], h.conf["log_level"], h.conf["log_file_path"] = nil, "info", nil
	if s := p.stderr(t, "DEL"); !strings.HasPrefix(s, "time=") || strings.Count(s, "\n") != 1 || !strings.Contains(s, "command=DEL") {
		t.Errorf("as text: %q", s)
	}
	if s := p.stderr(t, "DEL", "CARACAL_LOG_FORMAT=json"); !strings.HasPrefix(s, `{"time":"`) {
		t.Errorf("as the environment wants it: %q", s)
	}
	must(t, q.do("DEL"))
	h.clean()
}

// stderr is what a command that succeeds writes there.
func (p *pod) stderr(t *testing.T, command string, env ...string) string {
	t.Helper()
	stdin, err := json.Marshal(p.config())
	must(t, err)
	cmd := exec.Command(p.h.bin)
	cmd.Env = append(append([]string{"PATH=" + os.Getenv("PATH")}, p.env(command)...), env...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	must(t, netns.Do(netns.Path(p.h.name), cmd.Start))
	if err := cmd.Wait(); err != nil {
		t.Errorf("%s: %v: %s", command, err, &stderr)
	}
	return stderr.String()
}

// TestLogTrouble: whatever is in the way of the log file, ADD and DEL go on, and say so once.
func TestLogTrouble(t *testing.T) {
	h := newHost(t)
	h.conf["log_level"] = "debug"
	dir := filepath.Join(h.dir, "log")
	must(t, os.Mkdir(dir, 0o755))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	must(t, os.Symlink("/dev/null", filepath.Join(dir, "link")))
	must(t, os.Mkdir(filepath.Join(dir, "dir"), 0o755))
	must(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	p := h.pod()
	try := func(name, want string) {
		t.Helper()
		h.conf["log_file_path"] = filepath.Join(dir, name)
		for _, command := range []string{"ADD", "DEL"} {
			s := p.stderr(t, command)
			if strings.Count(s, "the log file can't be written") != 1 || !strings.Contains(s, want) || strings.Count(s, "msg=done") != 1 {
				t.Errorf("%s with %s: %s", command, name, s)
			}
		}
	}
	try("link", "symbolic link")
	try("dir", "it is a directory")
	try("pipe", "not a regular file")
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	try("cni.log", "no space left")
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	try("other.log", "read-only")
	h.clean()
}

// TestLogOfMany: 50 plugins at once, one file.
func TestLogOfMany(t *testing.T) {
	const pods = 50
	h := newHost(t)
	file := filepath.Join(h.dir, "cni.log")
	h.conf["log_level"], h.conf["log_format"], h.conf["log_file_path"] = "info", "json", file
	var all []*pod
	for range pods {
		all = append(all, h.pod())
	}
	for _, command := range []string{"ADD", "DEL"} {
		failed := make(chan error, pods)
		for _, p := range all {
			go func() { failed <- p.do(command) }()
		}
		for range pods {
			must(t, <-failed)
		}
		seen := make(map[string]bool)
		for _, l := range readLog(t, file) {
			if l.Command != command || seen[l.Container] {
				t.Errorf("%+v", l)
			}
			seen[l.Container] = true
		}
		if len(seen) != pods {
			t.Errorf("%d of %d %ss are in the log", len(seen), pods, command)
		}
	}
	h.clean()
}

// TestTrace: a runtime's trace goes on in the plugin, in the plugin's delegates and in the agent.
func TestTrace(t *testing.T) {
	const id, span, state, baggage = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "rojo=00f067aa0ba902b7", "userId=alice"
	h := newHost(t)
	dir := t.TempDir()
	goBuild(t, dir, ".", "./tests/cni/ipamdelegate")
	goBuild(t, filepath.Join(dir, "runtime"), "tests/cni/testdata/runtime", ".")
	record, file := filepath.Join(dir, "record"), filepath.Join(h.dir, "cni.log")
	agentLog := filepath.Join(h.dir, "agent.log")
	t.Setenv("CARACAL_LOG_FILE", agentLog)
	t.Setenv("CARACAL_LOG_FORMAT", "json")
	h.cluster()
	h.conf["log_level"], h.conf["log_format"], h.conf["log_file_path"] = "debug", "json", file
	h.conf["ipam"] = object{"type": "ipamdelegate", "address": "10.9.0.7/24", "record": record}
	readLog(t, file)
	p := h.pod()
	list := filepath.Join(dir, "10-pods.conflist")
	plugin := p.config()
	text, err := json.Marshal(object{"cniVersion": "1.1.0", "name": "pods", "plugins": []object{plugin}})
	must(t, err)
	must(t, os.WriteFile(list, text, 0o600))
	for _, command := range []string{"ADD", "CHECK", "DEL"} {
		cmd := exec.Command(filepath.Join(dir, "runtime"), command, list, p.id, p.netns, p.ifname, id, span, state, baggage)
		cmd.Env = append(os.Environ(), "CNI_PATH="+h.path+":"+dir)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		must(t, netns.Do(netns.Path(h.name), cmd.Start))
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%s: %v: %s", command, err, &out)
		}
		lines := readLog(t, file)
		ours := lines[len(lines)-1].SpanID
		for _, l := range lines {
			if l.TraceID != id || l.SpanID != ours || ours == span || len(ours) != 16 {
				t.Errorf("%s: %+v", command, l)
			}
		}
		told, err := os.ReadFile(record)
		must(t, err)
		must(t, os.Remove(record))
		var c struct{ Command, Traceparent, Tracestate, Baggage string }
		must(t, json.Unmarshal(told, &c))
		if c.Command != command || c.Traceparent != "00-"+id+"-"+ours+"-01" || c.Tracestate != state || c.Baggage != baggage {
			t.Errorf("the delegate of %s was told %+v", command, c)
		}
	}
	asked := slices.DeleteFunc(readLog(t, agentLog), func(l line) bool { return l.TraceID == "" })
	if len(asked) != 1 || asked[0].Msg != "policy of a new pod" || asked[0].TraceID != id || asked[0].SpanID == span || asked[0].Level != "INFO" {
		t.Errorf("the agent's log has %+v", asked)
	}

	// What is no trace's is left out, and said to who debugs.
	h.path += ":" + dir
	_ = p.stderr(t, "ADD", "TRACEPARENT=00-"+strings.ToUpper(id)+"-"+span+"-01", "TRACESTATE="+state, "BAGGAGE=no good")
	told, err := os.ReadFile(record)
	must(t, err)
	var c struct{ Traceparent, Tracestate, Baggage *string }
	must(t, json.Unmarshal(told, &c))
	if *c.Traceparent+*c.Tracestate+*c.Baggage != "" {
		t.Errorf("the delegate was told %s", told)
	}
	said := 0
	for _, l := range readLog(t, file) {
		if l.TraceID != "" {
			t.Errorf("%+v", l)
		}
		if l.Level == "DEBUG" && strings.Contains(l.Error, "traceparent: ") && strings.Contains(l.Error, "baggage: ") {
			said++
		}
	}
	if said != 1 {
		t.Errorf("what is wrong was said %d times", said)
	}
	p.del()
	h.clean()
}
