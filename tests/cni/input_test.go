package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/node"
)

// TestEnvironment: what is missing or wrong is named, all at once.
func TestEnvironment(t *testing.T) {
	h := newHost(t)
	conf, _ := json.Marshal(h.conf)
	p := h.pod()
	for _, c := range []struct {
		env   string
		words []string
	}{
		{"", []string{"CNI_COMMAND"}},
		{"CNI_COMMAND=add", []string{"CNI_COMMAND", "add"}},
		{"CNI_COMMAND=ADD", []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}},
		{"CNI_COMMAND=DEL", []string{"CNI_CONTAINERID", "CNI_IFNAME"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a/b CNI_NETNS=" + p.netns + " CNI_IFNAME=eth0", []string{"CNI_CONTAINERID"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=-a CNI_NETNS=" + p.netns + " CNI_IFNAME=eth0", []string{"CNI_CONTAINERID"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=interface-of-16c", []string{"CNI_IFNAME"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=a/b", []string{"CNI_IFNAME"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=..", []string{"CNI_IFNAME"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=a:b", []string{"CNI_IFNAME"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=a%db", []string{"CNI_IFNAME", "a%db"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=all", []string{"CNI_IFNAME", "all"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=eth0 CNI_ARGS=FOO=bar", []string{"CNI_ARGS", "FOO", "IgnoreUnknown"}},
		{"CNI_COMMAND=ADD CNI_CONTAINERID=a CNI_NETNS=" + p.netns + " CNI_IFNAME=eth0 CNI_ARGS=FOO", []string{"CNI_ARGS", "FOO"}},
	} {
		out, code := h.call(h.bin, conf, strings.Fields(c.env)...)
		var e result
		if err := json.Unmarshal(out, &e); err != nil || code == 0 || e.Code != 4 || e.CNIVersion == "" {
			t.Errorf("%s: exit %d: %s", c.env, code, out)
		}
		for _, w := range c.words {
			if !strings.Contains(e.Msg, w) {
				t.Errorf("%s: %q does not name %s", c.env, e.Msg, w)
			}
		}
	}
	h.clean()
}

// TestHostileConfigs: no configuration makes anything but an error with a code, or a pod.
func TestHostileConfigs(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	for _, c := range []struct {
		name, stdin string
		code        int
	}{
		{"nothing", "", 6},
		{"space", " \n", 6},
		{"no JSON", "{", 6},
		{"binary", "\x00\xff\xfe", 6},
		{"array", "[]", 7},
		{"string", `"x"`, 7},
		{"deep", strings.Repeat(`{"a":`, 100000), 6},
		{"deep array", `{"cniVersion":"1.0.0","name":"n","x":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + "}", 6},
		{"huge number", `{"cniVersion":"1.0.0","name":"n","mtu":1e400}`, 7},
		{"big mtu", `{"cniVersion":"1.0.0","name":"n","mtu":99999999999999999999}`, 7},
		{"mtu", `{"cniVersion":"1.0.0","name":"n","mtu":70000}`, 7},
		{"negative mtu", `{"cniVersion":"1.0.0","name":"n","mtu":-1}`, 7},
		{"word mtu", `{"cniVersion":"1.0.0","name":"n","mtu":"big"}`, 7},
		{"no name", `{"cniVersion":"1.0.0"}`, 7},
		{"bad name", `{"cniVersion":"1.0.0","name":"../x"}`, 7},
		{"NUL name", `{"cniVersion":"1.0.0","name":"a\u0000b"}`, 7},
		{"NUL path", `{"cniVersion":"1.0.0","name":"n","state_dir":"/tmp/a\u0000b"}`, 0},
		{"dot in bpffs", `{"cniVersion":"1.0.0","name":"n","bpffs_dir":"/sys/fs/bpf/a.b"}`, 7},
		{"relative path", `{"cniVersion":"1.0.0","name":"n","state_dir":"x"}`, 7},
		{"pool", `{"cniVersion":"1.0.0","name":"n","ipam":{"ipv4_pools":["10.0.0.0"]}}`, 7},
		{"pool of the other family", `{"cniVersion":"1.0.0","name":"n","ipam":{"ipv4_pools":["fd00::/64"]}}`, 7},
		{"overlap", `{"cniVersion":"1.0.0","name":"n","ipam":{"ipv4_pools":["10.0.0.0/8","10.1.0.0/16"]}}`, 7},
		{"block", `{"cniVersion":"1.0.0","name":"n","ipam":{"ipv4_pools":["10.0.0.0/8"],"ipv4_block_size":4}}`, 7},
		{"prevResult", `{"cniVersion":"1.0.0","name":"n","prevResult":{"ips":[{"address":"x"}]}}`, 6},
		{"log level", `{"cniVersion":"1.0.0","name":"n","log_level":"loud"}`, 7},
	} {
		err := p.with([]byte(c.stdin), "ADD")
		if err == nil || c.code != 0 && p.result.Code != c.code || p.result.Msg == "" {
			t.Errorf("%s: %v, want code %d", c.name, err, c.code)
		}
	}
	if _, err := os.Stat("/var/lib/caracal"); err == nil {
		t.Error("state in the default place")
	}
	h.clean()
}

// TestLargeStdin: 16 MB are refused without being held in memory.
func TestLargeStdin(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	cmd := exec.Command(h.bin)
	cmd.Env = p.env("ADD")
	cmd.Stdin = bytes.NewReader(bytes.Repeat([]byte(" "), 16<<20))
	var out bytes.Buffer
	cmd.Stdout = &out
	must(t, netns.Do(netns.Path(h.name), cmd.Start))
	if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), `"code": 6`) || !strings.Contains(out.String(), "larger than") {
		t.Errorf("%v: %s", err, out.String())
	}
	if kb := cmd.ProcessState.SysUsage().(*syscall.Rusage); kb.Maxrss > 64<<10 {
		t.Errorf("%d kB of memory", kb.Maxrss)
	}
}

// TestUnknownKeys are kept out of the way.
func TestUnknownKeys(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	p.conf = object{
		"x": object{"deep": []int{1, 2}}, "ipMasq": true, "capabilities": object{"bandwidth": true}, "disableCheck": true,
		"runtimeConfig": object{"portMappings": []object{{"hostPort": 1, "containerPort": 2}}, "aliases": []string{"a"}, "cgroupPath": "/x"},
	}
	p.add()
	p.del()
	h.clean()
}

// TestCalico: Calico's own conflist, unmodified but for where this node's state lies, works when the program is called calico.
func TestCalico(t *testing.T) {
	h := newHost(t)
	content, err := os.ReadFile(h.bin)
	must(t, err)
	h.bin = filepath.Join(t.TempDir(), "calico")
	must(t, os.WriteFile(h.bin, content, 0o755))
	h.conf = object{
		"cniVersion": "0.3.1", "name": "k8s-pod-network", "type": "calico",
		"log_level": "Info", "log_file_path": filepath.Join(h.dir, "cni.log"), "datastore_type": "kubernetes", "nodename": "node-1",
		"mtu": 0, "ipam": object{"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": "false"},
		"policy": object{"type": "k8s"}, "kubernetes": object{"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"},
		"state_dir": h.state(), "bpffs_dir": h.pins(), "max_flows": 4096,
	}
	h.pod().fails(11, "start caracald", "ADD") // the datastore's pools are meant, which nobody has told this node
	h.conf["ipam"] = object{"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": "false", "ipv4_pools": []string{"10.244.0.0/16"}}
	p, q := h.pod(), h.pod()
	p.args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=x;K8S_POD_UID=u"
	p.add()
	q.add()
	if p.hostIf() != "cali12a6a4bc1de" && !strings.HasPrefix(p.hostIf(), "cali") || len(p.result.IPs) != 1 {
		t.Errorf("%s", p.raw)
	}
	p.ping(q.addr(false))
	if log, err := os.ReadFile(filepath.Join(h.dir, "cni.log")); err != nil || !bytes.Contains(log, []byte("command=ADD")) {
		t.Errorf("log: %v %s", err, log)
	}
	p.del()
	q.del()
	h.clean()
}

// TestPools: full and tiny ones.
func TestPools(t *testing.T) {
	h := newHost(t)
	h.conf["ipam"] = object{"type": "caracal-ipam", "ipv4_pools": []string{"10.9.9.0/31"}, "ipv4_block_size": 31}
	a, b, c := h.pod(), h.pod(), h.pod()
	c.conf = object{"ipam": object{"ipv4_pools": []string{"10.9.9.0/31"}}}
	c.fails(7, "block size", "ADD")
	c.conf = nil
	must(t, a.do("STATUS"))
	a.add()
	must(t, a.do("STATUS", "X=1"))
	b.add()
	c.fails(101, "no address left", "ADD")
	c.fails(50, "no address left", "STATUS")
	must(t, b.do("DEL"))
	c.add()
	h.conf["ipam"] = object{"type": "caracal-ipam", "ipv4_pools": []string{"10.9.0.0/16"}}
	h.pod().fails(7, "overlaps", "ADD")
	h.conf["ipam"] = object{"type": "caracal-ipam", "ipv4_pools": []string{"10.9.9.0/31"}, "ipv4_block_size": 31}
	a.del()
	c.del()
	h.clean()
	h.conf["ipam"] = object{"type": "caracal-ipam", "ipv6_pools": []string{"fd00:9::/126"}, "ipv6_block_size": 126} // IPv6 alone
	a.add()
	b.add()
	a.ping(b.addr(true))
	a.del()
	b.del()
	h.clean()
}

// TestBPFFS: not mounted, and mounted where nobody else sees it.
func TestBPFFS(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	p.conf = object{"bpffs_dir": filepath.Join(h.dir, "plain", "node")}
	p.fails(106, "does not exist", "ADD")
	must(t, os.Mkdir(filepath.Join(h.dir, "plain"), 0o700))
	p.fails(106, "mount", "ADD")
	p.fails(50, "mount", "STATUS")
	h.clean()

	// The default place, in a mount namespace of its own where no bpffs is mounted.
	hidden := h.pod()
	hidden.conf = object{"bpffs_dir": "/sys/fs/bpf/" + h.name}
	conf, _ := json.Marshal(hidden.config())
	cmd := exec.Command("unshare", "-m", "sh", "-c", "mount -t tmpfs none /sys/fs/bpf && exec "+h.bin)
	cmd.Env = append(hidden.env("ADD"), "PATH="+os.Getenv("PATH"))
	cmd.Stdin = bytes.NewReader(conf)
	var out bytes.Buffer
	cmd.Stdout = &out
	must(t, netns.Do(netns.Path(h.name), cmd.Start))
	if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "mount namespace of its own") {
		t.Errorf("%v: %s", err, out.String())
	}
	h.clean()
}

// TestOtherVersion: maps of another version are refused and left alone.
func TestOtherVersion(t *testing.T) {
	h := newHost(t)
	must(t, os.Mkdir(h.pins(), 0o700))
	run(t, h.name, "bpftool", "map", "create", filepath.Join(h.pins(), "state"), "type", "array", "key", "4", "value", "8", "entries", "1", "name", "x")
	p := h.pod()
	p.fails(106, "version", "ADD")
	p.fails(50, "version", "STATUS")
	if _, err := os.Stat(filepath.Join(h.pins(), "state")); err != nil {
		t.Error(err)
	}
	must(t, os.Remove(filepath.Join(h.pins(), "state")))
}

// TestDirectories: each directory that can't be used is named, with the key for another.
func TestDirectories(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	bpffs, file := filepath.Join(h.dir, "bpf"), filepath.Join(h.dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, unix.Mount("", bpffs, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	p.fails(106, "bpffs_dir "+h.pins()+": "+bpffs+" can't be written: read-only file system; mount it writable, or name another", "ADD")
	must(t, unix.Mount("", bpffs, "", unix.MS_REMOUNT, ""))
	for _, c := range []struct {
		key, dir, words string
		code            int
	}{
		{"state_dir", filepath.Join(file, "state"), "make its directory writable, or name another (state_dir in the conflist", 5},
		{"state_dir", file, "make its directory writable, or name another (state_dir in the conflist", 5},
		{"bpffs_dir", filepath.Join(h.dir, "none", "pins"), "none does not exist; make it and mount a bpf file system there", 106},
		{"bpffs_dir", filepath.Join(h.dir, "pins"), "not in a bpf file system; mount one there", 106},
	} {
		p.conf = object{c.key: c.dir}
		p.fails(c.code, c.words, "ADD")
	}
	p.conf = nil
	p.add()
	p.del()
	h.clean()
}

// TestStateDisk: read-only, full, corrupt and locked.
func TestStateDisk(t *testing.T) {
	h := newHost(t)
	must(t, os.Mkdir(h.state(), 0o700))
	must(t, unix.Mount("tmpfs", h.state(), "tmpfs", 0, "size=1m"))
	t.Cleanup(func() {
		eventually(t, "the state disk is idle", h.busy)
		must(t, unix.Unmount(h.state(), 0))
	})
	p, q := h.pod().add(), h.pod()
	eventually(t, "the settler ended", h.busy)
	// Full, but for less than an ADD takes.
	fill, err := os.Create(filepath.Join(h.state(), "fill"))
	must(t, err)
	for err == nil {
		_, err = fill.Write(make([]byte, 4096))
	}
	fill.Close()
	if err := q.do("ADD"); err != nil && q.result.Code != 5 {
		t.Errorf("full: %v", err)
	} else if err == nil {
		q.del()
	}
	must(t, os.Remove(fill.Name()))
	eventually(t, "a pod can be added again", func() error { return q.do("ADD") })
	q.del()
	eventually(t, "the settler ended", h.busy)

	must(t, unix.Mount("", h.state(), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	q.fails(5, "can't be written", "ADD")
	q.fails(50, "can't be written", "STATUS")
	q.del() // nothing to do
	check := *p
	check.conf = object{"prevResult": p.raw}
	must(t, check.do("CHECK"))
	must(t, unix.Mount("", h.state(), "", unix.MS_REMOUNT, ""))

	// Locked for longer than the runtime waits.
	db, err := node.Open(context.Background(), h.state(), node.Options{})
	must(t, err)
	begin := time.Now()
	done := make(chan error, 1)
	go func() { done <- q.do("ADD") }()
	select {
	case err := <-done:
		t.Errorf("ADD did not wait: %v after %s", err, time.Since(begin))
	case <-time.After(300 * time.Millisecond):
	}
	must(t, db.Close())
	must(t, <-done)
	q.del()
	p.del()
	h.clean()

	// Corrupt: never overwritten.
	file := filepath.Join(h.state(), "node.db")
	good, err := os.ReadFile(file)
	must(t, err)
	for name, bad := range map[string][]byte{
		"empty": {}, "text": []byte("hello"), "zeros": make([]byte, len(good)), "truncated": good[:len(good)/3],
		"garbage": append(bytes.Clone(good[:8192]), bytes.Repeat([]byte{0xa5}, len(good)-8192)...),
	} {
		must(t, os.WriteFile(file, bad, 0o600))
		q.fails(106, "corrupt", "ADD")
		q.fails(50, "corrupt", "STATUS")
		if err := q.do("DEL"); err == nil {
			t.Errorf("%s: DEL could not know, yet says it is done", name)
		}
		if now, _ := os.ReadFile(file); !bytes.Equal(now, bad) {
			t.Errorf("%s: the corrupt file was changed", name)
		}
	}
	must(t, os.WriteFile(file, good, 0o600))
	q.add()
	q.del()
	h.clean()
}

// TestReboot: another boot id frees all that the boot before it held.
func TestReboot(t *testing.T) {
	h := newHost(t)
	id := filepath.Join(h.dir, "boot_id")
	must(t, os.WriteFile(id, []byte("one\n"), 0o600))
	h.conf["boot_id_file"] = id
	h.conf["ipam"] = object{"type": "caracal-ipam", "ipv4_pools": []string{"10.9.9.0/31"}, "ipv4_block_size": 31}
	p := h.pod().add()
	q := h.pod().add()
	eventually(t, "the settler ended", h.busy)
	for _, x := range []*pod{p, q} {
		run(t, h.name, "ip", "link", "del", x.hostIf())
	}
	must(t, os.RemoveAll(h.pins()))
	must(t, os.WriteFile(id, []byte("two\n"), 0o600))
	for range 2 {
		h.pod().add()
	}
	p.del()
	q.del()
	if err := h.db(func(tx *node.Tx) error {
		n := 0
		err := tx.Endpoints(func(node.Endpoint) error { n++; return nil })
		if n != 2 {
			return fmt.Errorf("%d endpoints", n)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}
