// Package install tests how Caracal comes onto a host: caracalctl install and uninstall, the container image as people start
// it with Docker, the systemd unit, and what each needs.
package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// place is two directories to install into.
type place struct {
	t         testing.TB
	ctl       string
	bin, conf string
	state     string
}

func newPlace(t testing.TB) *place {
	t.Helper()
	p := &place{t: t, ctl: testenv.Bin(t, "caracalctl"), bin: filepath.Join(t.TempDir(), "bin"), conf: filepath.Join(t.TempDir(), "net.d"), state: t.TempDir()}
	for _, d := range []string{p.bin, p.conf} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// run calls caracalctl and returns its exit code, stdout and stderr.
func (p *place) run(env []string, args ...string) (code int, stdout, stderr string) {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), p.ctl, args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "CNI_BIN_DIR=" + p.bin, "CNI_NET_DIR=" + p.conf, "CARACAL_STATE_DIR=" + p.state}, env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func (p *place) ok(env []string, args ...string) string {
	p.t.Helper()
	code, out, errs := p.run(env, args...)
	if code != 0 {
		p.t.Fatalf("%s: exit code %d\n%s%s", args, code, out, errs)
	}
	return out
}

// files are the names in both directories.
func (p *place) files() []string {
	p.t.Helper()
	var all []string
	for _, d := range []string{p.bin, p.conf} {
		entries, err := os.ReadDir(d)
		if err != nil {
			p.t.Fatal(err)
		}
		for _, e := range entries {
			all = append(all, e.Name())
		}
	}
	return all
}

func (p *place) write(path, text string) {
	p.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) network(name string) map[string]any {
	p.t.Helper()
	path := filepath.Join(p.conf, name)
	text, err := os.ReadFile(path)
	if err != nil {
		p.t.Fatal(err)
	}
	var conf map[string]any
	if err := json.Unmarshal(text, &conf); err != nil {
		p.t.Fatalf("%v: %s", err, text)
	}
	return conf
}

// equal compares JSON, whatever its spaces.
func equal(t *testing.T, got any, want string) {
	t.Helper()
	var w any
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatal(err)
	}
	a, _ := json.Marshal(got)
	b, _ := json.Marshal(w)
	if !bytes.Equal(a, b) {
		t.Errorf("got  %s\nwant %s", a, b)
	}
}

// done is what install says of each file.
func done(t *testing.T, out string) map[string]string {
	t.Helper()
	var v struct{ Items []struct{ Name, Done string } }
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	all := make(map[string]string)
	for _, i := range v.Items {
		if strings.HasPrefix(i.Name, "default-ipv") {
			continue
		}
		all[filepath.Base(i.Name)] = i.Done
	}
	return all
}

func TestInstallAndUninstall(t *testing.T) {
	p := newPlace(t)
	p.write(filepath.Join(p.bin, "portmap"), "")
	p.write(filepath.Join(p.bin, "bandwidth"), "")

	if out := p.ok(nil, "install", "--dry-run"); !strings.Contains(out, "would do:") || len(p.files()) != 2 {
		t.Errorf("dry run: %s %s", out, p.files())
	}
	equal(t, done(t, p.ok(nil, "install", "-o", "json")), `{"caracal": "installed", "caracal-ipam": "installed", "10-caracal.conflist": "installed"}`)
	equal(t, p.network("10-caracal.conflist"), `{"cniVersion": "1.0.0", "name": "caracal", "plugins": [
		{"type": "caracal", "capabilities": {"ips": true, "mac": true, "portMappings": true, "bandwidth": true, "io.kubernetes.cri.pod-annotations": true}, "ipMasq": true,
			"log_file_path": "/var/log/caracal/cni.log", "log_file_max_size": 10, "log_file_max_age": 30, "log_file_max_count": 5,
			"ipam": {"type": "caracal-ipam", "ipv4_pools": ["10.244.0.0/16"]}},
		{"type": "portmap", "capabilities": {"portMappings": true}},
		{"type": "bandwidth", "capabilities": {"bandwidth": true}}]}`)
	for path, mode := range map[string]os.FileMode{filepath.Join(p.bin, "caracal"): 0o755, filepath.Join(p.conf, "10-caracal.conflist"): 0o600} {
		if i, err := os.Stat(path); err != nil || i.Mode().Perm() != mode {
			t.Errorf("%s: %v %v", path, i.Mode(), err)
		}
	}
	p.ok(nil, "validate", filepath.Join(p.conf, "10-caracal.conflist"))

	// Again, nothing is touched; and what is not as it should be is mended.
	equal(t, done(t, p.ok(nil, "install", "-o", "json")), `{"caracal": "unchanged", "caracal-ipam": "unchanged", "10-caracal.conflist": "unchanged"}`)
	if err := os.Chmod(filepath.Join(p.bin, "caracal"), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := p.run([]string{"CALICO_IPV4POOL_CIDR=10.1.0.0/16"}, "install"); code != 1 || !strings.Contains(errs, "CALICO_IPV4POOL_CIDR 10.1.0.0/16: this machine's store has other pools, 10.244.0.0/16") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	p.state = t.TempDir()
	equal(t, done(t, p.ok([]string{"CALICO_DISABLE_FILE_LOGGING=true", "CNI_MTU=1450", "CALICO_IPV4POOL_CIDR=10.1.0.0/16", "CALICO_IPV6POOL_CIDR=fd00::/64", "CALICO_IPV4POOL_NAT_OUTGOING=false",
		"KUBERNETES_NODE_NAME=n1"}, "install", "-o", "json", "--calico-names")),
		`{"caracal": "replaced", "caracal-ipam": "unchanged", "calico": "installed", "calico-ipam": "installed", "10-caracal.conflist": "replaced"}`)
	equal(t, p.network("10-caracal.conflist")["plugins"].([]any)[0], `{"type": "caracal", "capabilities": {"ips": true, "mac": true, "portMappings": true, "bandwidth": true, "io.kubernetes.cri.pod-annotations": true}, "mtu": 1450, "nodename": "n1",
		"ipam": {"type": "caracal-ipam", "ipv4_pools": ["10.1.0.0/16"], "ipv6_pools": ["fd00::/64"]}}`)

	// All four names are the plugin.
	for _, name := range []string{"caracal", "caracal-ipam", "calico", "calico-ipam"} {
		cmd := exec.Command(filepath.Join(p.bin, name))
		cmd.Env, cmd.Stdin = []string{"CNI_COMMAND=VERSION"}, strings.NewReader(`{"cniVersion": "1.0.0"}`)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "supportedVersions") {
			t.Errorf("%s: %v %s", name, err, out)
		}
	}

	p.write(filepath.Join(p.bin, ".caracal.caracal-new"), "what a killed install left")
	if out := p.ok(nil, "uninstall", "--dry-run"); !strings.Contains(out, "10-caracal.conflist") || len(p.files()) != 8 {
		t.Errorf("dry run: %s %s", out, p.files())
	}
	p.ok(nil, "uninstall")
	if got := p.files(); !slices.Equal(got, []string{"bandwidth", "portmap"}) {
		t.Errorf("left: %s", got)
	}
	p.ok(nil, "uninstall")
}

// A network of ours under another name than uninstall was told is named: it calls plugins that are gone then. A state directory on
// which something is mounted stays, and is no reason to leave the rest.
func TestUninstallLeavesAndSays(t *testing.T) {
	testenv.NeedRoot(t)
	p := newPlace(t)
	p.ok(nil, "install", "--calico-names", "--conf-name", "10-calico.conflist")
	if err := unix.Mount(p.state, p.state, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(p.state, 0); err != nil {
			t.Error(err)
		}
	})
	code, _, errs := p.run(nil, "uninstall")
	for _, want := range []string{filepath.Join(p.conf, "10-calico.conflist") + " stays, and calls plugins that go", p.state + " stays: something is mounted there"} {
		if code != 0 || !strings.Contains(errs, want) {
			t.Errorf("exit code %d, want %q:\n%s", code, want, errs)
		}
	}
	if got := p.files(); !slices.Equal(got, []string{"10-calico.conflist"}) {
		t.Errorf("left: %s", got)
	}
}

// What is not Caracal's stays, is named, and nothing is done.
func TestForeignFiles(t *testing.T) {
	p := newPlace(t)
	calico, conf := filepath.Join(p.bin, "calico"), filepath.Join(p.conf, "10-caracal.conflist")
	p.write(calico, "#!/bin/sh\n")
	p.write(conf, `{"name": "x", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}`)
	code, _, errs := p.run(nil, "install", "--calico-names")
	if code != 1 || !strings.Contains(errs, calico) || !strings.Contains(errs, conf) || !strings.Contains(errs, "--force") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if got := p.files(); len(got) != 2 {
		t.Errorf("there is %s", got)
	}
	p.ok(nil, "install", "--calico-names", "--force")
	p.write(calico, "#!/bin/sh\n") // through the link: it is the plugin that is not ours now
	p.write(conf, `{"name": "x", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}`)
	_, _, errs = p.run(nil, "uninstall")
	if got := p.files(); !slices.Equal(got, []string{"calico", "calico-ipam", "caracal", "caracal-ipam", "10-caracal.conflist"}) || strings.Count(errs, "it is not Caracal's") != 5 {
		t.Errorf("left: %s\n%s", got, errs)
	}
}

func TestSkipAndUpdate(t *testing.T) {
	p := newPlace(t)
	code, _, errs := p.run([]string{"SKIP_CNI_BINARIES=caracal,flannel"}, "install")
	if code != 1 || !strings.Contains(errs, "caracal-ipam links to it") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	equal(t, done(t, p.ok([]string{"SKIP_CNI_BINARIES=caracal-ipam,flannel"}, "install", "-o", "json")), `{"caracal": "installed", "caracal-ipam": "skipped", "10-caracal.conflist": "installed"}`)
	if err := os.Chmod(filepath.Join(p.bin, "caracal"), 0o700); err != nil {
		t.Fatal(err)
	}
	equal(t, done(t, p.ok([]string{"UPDATE_CNI_BINARIES=false"}, "install", "-o", "json")), `{"caracal": "kept", "caracal-ipam": "installed", "10-caracal.conflist": "unchanged"}`)
}

// The network that Calico's manifest has, and another program's.
func TestTemplates(t *testing.T) {
	p := newPlace(t)
	template := `{"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [
		{"type": "calico", "log_level": "__LOG_LEVEL__", "log_file_path": "__LOG_FILE_PATH__", "datastore_type": "__DATASTORE_TYPE__", "nodename": "__KUBERNETES_NODE_NAME__",
		 "mtu": __CNI_MTU__, "ipam": {"type": "calico-ipam", "ipv4_pools": ["10.9.0.0/16"]}, "policy": {"type": "k8s"}, "kubernetes": {"kubeconfig": "__KUBECONFIG_FILEPATH__"}},
		{"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}]}`
	want := `{"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [
		{"type": "calico", "log_level": "debug", "log_file_path": "/var/log/caracal/cni.log", "datastore_type": "kubernetes", "nodename": "n\"1",
		 "mtu": 1400, "ipam": {"type": "calico-ipam", "ipv4_pools": ["10.9.0.0/16"]}, "policy": {"type": "k8s"}, "kubernetes": {"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"}},
		{"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}]}`
	env := []string{"CNI_CONF_NAME=10-calico.conflist", "CNI_MTU=1400", "LOG_LEVEL=debug", `KUBERNETES_NODE_NAME=n"1`}
	code, out, errs := p.run(append(env, "CNI_NETWORK_CONFIG="+template), "install")
	if code != 0 || !strings.Contains(errs, "k8s-pod-network calls portmap, which is not in "+p.bin) {
		t.Fatalf("exit code %d: %s%s", code, out, errs)
	}
	equal(t, p.network("10-calico.conflist"), want)
	if !slices.Contains(p.files(), "calico-ipam") {
		t.Errorf("the network calls calico and calico-ipam; there is %s", p.files())
	}
	file := filepath.Join(t.TempDir(), "template")
	p.write(file, strings.Replace(template, "10.9", "10.8", 1))
	p.ok(append(env, "CNI_NETWORK_CONFIG_FILE="+file, "CNI_NETWORK_CONFIG="+template), "install")
	equal(t, p.network("10-calico.conflist"), strings.Replace(want, "10.9", "10.8", 1))
	if out := p.ok(nil, "get", "ippools", "-o", "json"); strings.Contains(out, "10.244") {
		t.Errorf("install made a pool that the network does not use: %s", out)
	}
	p.ok([]string{"CNI_CONF_NAME=10-calico.conflist"}, "uninstall")
	if got := p.files(); got != nil {
		t.Errorf("left: %s", got)
	}
}

// Every bad value is an error that names who said it, and nothing is changed.
func TestBadValues(t *testing.T) {
	p := newPlace(t)
	file := filepath.Join(t.TempDir(), "file")
	p.write(file, `{"name": "x"`)
	for _, c := range []struct {
		env  string
		want []string
	}{
		{"CALICO_IPV4POOL_CIDR=10.244.0.0", []string{"not a CIDR"}},
		{"CALICO_IPV4POOL_CIDR=10.244.0.1/16", []string{"10.244.0.0/16"}},
		{"CALICO_IPV4POOL_CIDR=10.244.0.0/28", []string{"smaller than one block"}},
		{"CALICO_IPV4POOL_CIDR=fd00::/64", []string{"other family"}},
		{"CALICO_IPV4POOL_CIDR=10.0.0.0/16,10.1.0.0/16", []string{"two pools"}},
		{"CALICO_IPV4POOL_CIDR=127.0.0.0/16", []string{"can't be given"}},
		{"CALICO_IPV6POOL_CIDR=10.0.0.0/16", []string{"other family"}},
		{"CALICO_IPV4POOL_CIDR=none", []string{"no pool"}},
		{"CALICO_IPV4POOL_NAT_OUTGOING=perhaps", []string{"true or false"}},
		{"CALICO_DISABLE_FILE_LOGGING=perhaps", []string{"true or false"}},
		{"CNI_MTU=large", []string{"a number"}},
		{"CNI_MTU=20", []string{"68"}},
		{"CNI_CONF_NAME=../x.conflist", []string{".conflist"}},
		{"CNI_CONF_NAME=10-caracal", []string{".conflist"}},
		{"CNI_CONF_NAME=10-caracal.conf", []string{"list of plugins"}},
		{"CNI_NET_DIR=etc", []string{"absolute"}},
		{"CNI_NET_DIR=" + file, []string{"not a directory"}},
		{"CNI_NET_DIR=/nowhere", []string{"no such directory", "/nowhere"}},
		{"CNI_BIN_DIR=/nowhere", []string{"no such directory", "/nowhere"}},
		{"CNI_NETWORK_CONFIG_FILE=/nowhere", []string{"/nowhere"}},
		{"CNI_NETWORK_CONFIG_FILE=" + file, []string{file, "line 1"}},
		{`CNI_NETWORK_CONFIG={"name": "x", "cniVersion": "1.0.0", "plugins": [{"type": "caracal", "mtu": "__CNI_MTU__"}]}`, []string{"line 1", "mtu"}},
		{`CNI_NETWORK_CONFIG={"name": "__NAME__"}`, []string{"no such placeholder: __NAME__"}},
		{`CNI_NETWORK_CONFIG={"name": "x", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}`, []string{"none is caracal or calico"}},
		{`CNI_NETWORK_CONFIG={"name": "x", "cniVersion": "1.0.0", "type": "caracal"}`, []string{"single plugin"}},
		{"SLEEP=long", []string{"true or false"}},
		{"SKIP_CNI_BINARIES=a/b", []string{"names of plugins"}},
		{"UPDATE_CNI_BINARIES=2", []string{"true or false"}},
		{"LOG_FILE_MAX_SIZE=big", []string{"a number"}},
		{"ETCD_ENDPOINTS=10.0.0.1", []string{"http://10.0.0.1:2379"}},
	} {
		name, _, _ := strings.Cut(c.env, "=")
		code, out, errs := p.run([]string{c.env}, "install")
		for _, want := range append(c.want, name) {
			if code != 1 || out != "" || !strings.Contains(errs, want) && name != "CNI_CONF_NAME" {
				t.Errorf("%s: exit code %d, want %q in: %s%s", c.env, code, want, out, errs)
			}
		}
		if got := p.files(); got != nil {
			t.Fatalf("%s: there is %s", c.env, got)
		}
	}
	if code, _, errs := p.run(nil, "install", "--from", t.TempDir()); code != 1 || !strings.Contains(errs, "there is no plugin to install") {
		t.Errorf("no plugin: %s", errs)
	}
	if code, _, errs := p.run(nil, "install", "--from", "/bin", "--mtu", "x"); code != 2 || !strings.Contains(errs, "mtu") {
		t.Errorf("flag: %s", errs)
	}
}

// Who may not write, a file system that is full or read-only: named, and nothing changes.
func TestDirectoriesThatCantBeWritten(t *testing.T) {
	testenv.NeedRoot(t)
	p := newPlace(t)
	mount := func(path string, flags uintptr, options string) {
		t.Helper()
		if err := unix.Mount("none", path, "tmpfs", flags, options); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(path, 0); err != nil {
				t.Error(err)
			}
		})
	}
	mount(p.bin, 0, "size=64k")
	code, _, errs := p.run(nil, "install")
	if code != 1 || !strings.Contains(errs, filepath.Join(p.bin, "caracal")+": no space left on device") || len(p.files()) != 0 {
		t.Errorf("full: exit code %d, %s %s", code, p.files(), errs)
	}
	mount(p.conf, unix.MS_RDONLY, "")
	code, _, errs = p.run(nil, "install")
	if code != 1 || !strings.Contains(errs, "CNI_NET_DIR "+p.conf+": on a read-only file system") || len(p.files()) != 0 {
		t.Errorf("read-only: exit code %d, %s %s", code, p.files(), errs)
	}
}

// Who may write the plugin's directories alone is told so before anything is made, a pool say.
func TestAgentTakesRoot(t *testing.T) {
	testenv.NeedRoot(t)
	p := newPlace(t)
	const nobody = 65534
	if err := os.Chmod(filepath.Dir(p.state), 0o755); err != nil { // above all temporary directories of the test
		t.Fatal(err)
	}
	for _, dir := range []string{p.bin, p.conf, p.state} {
		if err := os.Chown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", p.ctl, "install", "--agent")
	cmd.Env = []string{"CNI_BIN_DIR=" + p.bin, "CNI_NET_DIR=" + p.conf, "CARACAL_STATE_DIR=" + p.state}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--agent /usr/local/bin: user 65534 may not write there; run it as root") || strings.Contains(string(out), p.bin) {
		t.Errorf("%v: %s", err, out)
	}
	if left, err := os.ReadDir(p.state); err != nil || len(left) != 0 || len(p.files()) != 0 {
		t.Errorf("left: %s %s, %v", left, p.files(), err)
	}
}

// The network is there for one who looks at any time, whole, and so are the plugins, even while they run.
func TestWhileInUse(t *testing.T) {
	p := newPlace(t)
	p.ok(nil, "install")
	stop := make(chan struct{})
	var group sync.WaitGroup
	watch := func(look func() error) {
		group.Go(func() {
			for {
				if err := look(); err != nil {
					t.Error(err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	watch(func() error {
		cmd := exec.Command(filepath.Join(p.bin, "caracal"))
		cmd.Env, cmd.Stdin = []string{"CNI_COMMAND=VERSION"}, strings.NewReader(`{"cniVersion": "1.0.0"}`)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("run the plugin: %w: %s", err, out)
		}
		return nil
	})
	watch(func() error {
		text, err := os.ReadFile(filepath.Join(p.conf, "10-caracal.conflist"))
		if err == nil && !json.Valid(text) {
			err = fmt.Errorf("half a network: %s", text)
		}
		return err
	})
	for n := range 10 {
		if err := os.Chmod(filepath.Join(p.bin, "caracal"), 0o711); err != nil { // so that it is replaced
			t.Fatal(err)
		}
		got := done(t, p.ok([]string{fmt.Sprintf("CNI_MTU=%d", 1400+n)}, "install", "-o", "json"))
		if got["caracal"] != "replaced" || got["10-caracal.conflist"] != "replaced" {
			t.Fatal(got)
		}
	}
	close(stop)
	group.Wait()
}

// Killed at any step, install leaves the old or the new of each file, the network only with its plugins; the next one finishes it.
func TestKilledAtEachStep(t *testing.T) {
	p := newPlace(t)
	faulty := testenv.Faulty(t, "caracalctl")
	steps := []string{"stage caracal", "stage caracal-ipam", "stage 10-caracal.conflist", "place 1", "place 2", "place 3"}
	for n, step := range steps {
		p.ctl = faulty
		code, _, _ := p.run([]string{"CARACAL_FAULT=" + step + ":kill"}, "install")
		if code != -1 {
			t.Fatalf("%s: exit code %d", step, code)
		}
		var want []string
		if placed := n - 2; placed > 0 {
			want = []string{"caracal", "caracal-ipam", "10-caracal.conflist"}[:placed]
		}
		got := slices.DeleteFunc(p.files(), func(name string) bool { return strings.HasSuffix(name, ".caracal-new") })
		if !slices.Equal(got, want) {
			t.Errorf("%s: there is %s, want %s", step, got, want)
		}
		p.ok(nil, "install")
		if got := p.files(); !slices.Equal(got, []string{"caracal", "caracal-ipam", "10-caracal.conflist"}) {
			t.Errorf("%s, then again: there is %s", step, got)
		}
		p.ok(nil, "uninstall")
	}
	// A failure removes what it has staged.
	code, _, errs := p.run([]string{"CARACAL_FAULT=stage 10-caracal.conflist:error"}, "install")
	if got := p.files(); code != 1 || got != nil {
		t.Errorf("exit code %d, %s: %s", code, got, errs)
	}
}

// Two at once take turns.
func TestTwoAtOnce(t *testing.T) {
	p := newPlace(t)
	var group sync.WaitGroup
	for n := range 8 {
		group.Go(func() { p.ok([]string{fmt.Sprintf("CNI_MTU=%d", 1400+n)}, "install") })
	}
	group.Wait()
	if got := p.files(); !slices.Equal(got, []string{"caracal", "caracal-ipam", "10-caracal.conflist"}) {
		t.Errorf("there is %s", got)
	}
	p.network("10-caracal.conflist")
}

// Other networks that stand in the way are named.
func TestOtherNetworks(t *testing.T) {
	p := newPlace(t)
	p.write(filepath.Join(p.conf, "05-bridge.conflist"), `{"name": "bridge", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}`)
	p.write(filepath.Join(p.conf, "87-podman.conflist"), `{"name": "podman", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}`)
	p.write(filepath.Join(p.conf, "90-other.conflist"), `{"name": "caracal", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}`)
	code, _, errs := p.run(nil, "install")
	for want, times := range map[string]int{"05-bridge.conflist (network \"bridge\") is sorted before 10-caracal.conflist": 1, "87-podman": 0, "90-other.conflist is called caracal too": 1} {
		if code != 0 || strings.Count(errs, want) != times {
			t.Errorf("%s: %s", want, errs)
		}
	}
	_, _, errs = p.run(nil, "install", "--conf-name", "00-caracal.conflist")
	if strings.Contains(errs, "05-bridge") {
		t.Error(errs)
	}
}

var helpVariables = regexp.MustCompile(`\benv ([A-Z][A-Z0-9_]+(?:, [A-Z][A-Z0-9_]+)*)`)

// Every variable that caracald's help tells of reaches an agent that runs elsewhere.
func TestAgentVariables(t *testing.T) {
	help, err := exec.Command(testenv.Bin(t, "caracald"), "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, help)
	}
	var names, env []string
	for _, m := range helpVariables.FindAllStringSubmatch(string(help), -1) {
		for name := range strings.SplitSeq(m[1], ", ") {
			names, env = append(names, name), append(env, name+"=x")
		}
	}
	if !slices.Contains(names, "CARACAL_NODENAME") {
		t.Fatalf("variables in the help: %s", names)
	}
	out := newPlace(t).ok(env, "node", "run", "--dry-run", "--node-image=i")
	for _, name := range names {
		if !strings.Contains(out, "--env="+name+" ") {
			t.Errorf("%s is not passed on:\n%s", name, out)
		}
	}
}
