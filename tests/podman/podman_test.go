// Package podman runs containers with podman (CNI backend) on simulated machines, as docs/podman.md has it.
package podman

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Two containers on one machine:
//
//	  container "web"            container "client"
//	     | eth0                     | eth0
//	+----+--------------------------+----+
//	|  what the plugin under test makes  |  h1
//	+------------------------------------+

// Debian's bridge is the stand-in that proves the test itself: it must pass with a plugin known to be good.
func TestBridge(t *testing.T) {
	m := newMachines(t, 1)[0]
	m.write("/etc/containers/containers.conf", strings.Replace(userConf, "/opt/cni/bin", "/usr/lib/cni", 1))
	m.write("/etc/cni/net.d/10-caracal.conflist", `{"cniVersion": "1.0.0", "name": "caracal", "plugins": [
		{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
		 "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
		{"type": "portmap", "capabilities": {"portMappings": true}}]}`)
	m.sh("podman load -q -i busybox.tar")
	testRuntime(t, m, "bridge")
}

func TestCaracal(t *testing.T) {
	m := newMachines(t, 1)[0]
	m.write("/etc/containers/containers.conf", userConf)
	m.sh("mkdir -p /opt/cni/bin && cp /usr/lib/cni/portmap /opt/cni/bin && caracal/caracalctl install --agent --pool 10.244.0.0/16 --pool fd00:10:244::/64")
	m.sh("podman load -q -i busybox.tar")
	testRuntime(t, m, "caracal") // no agent runs
}

func testRuntime(t *testing.T, m *machine, driver string) {
	// A plugin whose VERSION fails makes podman use a bridge of its own invention under the same name.
	if out := m.sh("podman network inspect caracal --format '{{.Driver}} {{.Name}}'"); out != driver+" caracal" {
		t.Fatalf("podman's network: %s", out)
	}
	m.serve("web", "-p 8080:80")
	m.serve("client", "")
	meet := func() {
		t.Helper()
		published := server{m.Addr().String() + ":8080", m.says("web")}
		web, client := server{m.address("web") + ":80", m.says("web")}, server{m.address("client") + ":80", m.says("client")}
		m.gets("", web, client, published, server{"127.0.0.1:8080", m.says("web")})
		m.gets("client", web, published)
		m.gets("web", client, published)
	}
	meet()
	if driver == "caracal" {
		known := m.pods()
		for _, name := range []string{"web", "client"} {
			p := known[name]
			if id := m.sh("podman inspect " + name + " --format {{.Id}}"); p.ContainerID != id || !slices.Contains(p.Addresses, m.address(name)) || p.Namespace != "" {
				t.Errorf("caracalctl pods: %s is %+v; podman says %s, %s", name, p, id, m.address(name))
			}
			m.sh("ip link show dev " + p.HostInterface)
			v6 := m.sh("podman inspect " + name + " --format '{{.NetworkSettings.Networks.caracal.GlobalIPv6Address}}'")
			if len(p.Addresses) != 2 || p.Addresses[1] != v6 {
				t.Errorf("caracalctl pods: %s has %v, podman says %s", name, p.Addresses, v6)
			}
			m.sh("podman exec client ping -6 -c 1 -W 2 " + v6 + "; ping -c 1 -W 2 " + v6)
		}
		if len(known) != 2 {
			t.Errorf("caracalctl pods shows %v", known)
		}
	}

	// A restart is DEL and ADD with a new namespace.
	const sandbox = "podman inspect web --format {{.NetworkSettings.SandboxKey}}"
	before := m.sh(sandbox)
	m.sh("podman restart -t 0 web")
	if after := m.sh(sandbox); after == before {
		t.Errorf("the restarted container is in the same namespace %s", after)
	}
	meet()
	// What a user does whose firewall was flushed: DEL and ADD in the same namespace.
	m.sh("iptables -t nat -F; podman network reload --all")
	meet()

	// The same requested address twice: the second time proves that it was given back.
	for range 2 {
		out := m.sh("podman run --rm --ip 10.244.0.50 --mac-address 02:00:00:00:00:09 " + busybox + " ip addr show dev eth0")
		if !strings.Contains(out, " 10.244.0.50/") || !strings.Contains(out, "link/ether 02:00:00:00:00:09 ") {
			t.Errorf("the requested addresses are not in %s", out)
		}
	}
	// A container that ends by itself is cleaned up by conmon's call of podman, in an environment of its own.
	m.sh("podman run -d --name brief --ip 10.244.0.51 " + busybox + " true")
	m.until("the address of an ended container is free", "podman run --rm --ip 10.244.0.51 "+busybox+" true")

	// An address in use is refused, and its owner keeps working.
	m.fails("podman run --rm --ip "+m.address("web")+" "+busybox+" true", m.address("web"))
	meet()
	if m.sh(leftovers) == "" {
		t.Error("two containers run, and nothing is seen of them where leftovers are looked for")
	}
	m.clean()
}

// TestVersion: podman asks every plugin for its versions at each command, with dummies in the environment.
func TestVersion(t *testing.T) {
	m := newMachines(t, 1)[0]
	m.sh("caracal/caracalctl install")
	const made = "ls -R /var/lib/caracal /sys/fs/bpf /run/caracal 2>/dev/null || true"
	before := m.sh(made)
	for _, plugin := range []string{"caracal", "caracal-ipam"} {
		out := m.sh(`echo '{"cniVersion": "0.4.0"}' | env -i CNI_COMMAND=VERSION CNI_PATH=dummy CNI_NETNS=dummy CNI_IFNAME=dummy CNI_CONTAINERID=dummy /opt/cni/bin/` + plugin)
		for _, v := range []string{"0.4.0", "1.0.0"} {
			if !strings.Contains(out, fmt.Sprintf("%q", v)) {
				t.Errorf("%s answers VERSION with %s", plugin, out)
			}
		}
	}
	if after := m.sh(made); after != before {
		t.Errorf("VERSION made %s\nof %s", after, before)
	}
}
