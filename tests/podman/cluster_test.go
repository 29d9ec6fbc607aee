package podman

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Several containers on machines that share a store, one of which all have agents:
//
//	     h1                    h2
//	etcd caracald           caracald
//	 a  b  c               a  b  c
//	      |                   |
//	      +------ switch -----+

func TestMachines(t *testing.T) {
	all := newCluster(t, 2)
	ports := map[string]int{"a": 8000, "b": 8001, "c": 8002}
	for _, m := range all {
		for name, port := range ports {
			m.serve(name, fmt.Sprintf("-p %d:80 -p %d:80/udp", port, port))
		}
	}
	meet := func(names ...string) {
		t.Helper()
		var servers []server
		for _, m := range all {
			for _, name := range names {
				servers = append(servers, server{m.address(name) + ":80", m.says(name)},
					server{fmt.Sprintf("%s:%d", m.Addr(), ports[name]), m.says(name)})
			}
		}
		for _, m := range all {
			m.gets("", servers...)
			m.gets("a", servers...)
		}
	}
	meet("a", "b", "c")

	h1, h2 := all[0], all[1]

	// What a user does whose firewall was flushed: DEL and ADD, with the addresses that they had.
	address := h2.address("b")
	h2.sh("podman network reload --all")
	if after := h2.address("b"); after != address {
		t.Errorf("%s became %s", address, after)
	}
	h1.gets("a", server{address + ":80", h2.says("b")})

	// Networks of a running container.
	address = h1.address("b")
	h1.sh("podman network disconnect caracal b")
	if out := h1.sh("podman exec b ip -4 -o addr"); strings.Contains(out, "10.244.") {
		t.Errorf("a disconnected container has %s", out)
	}
	if _, is := h1.pods()["b"]; is {
		t.Error("caracalctl pods shows a disconnected container")
	}
	h1.sh("podman network connect caracal b")
	h2.gets("a", server{h1.address("b") + ":80", h1.says("b")})
	h1.sh("podman network disconnect caracal b; podman network connect --ip " + address + " caracal b")
	h2.gets("a", server{address + ":80", h1.says("b")})

	// Pods.
	h1.sh("podman pod create --name p -p 8008:80 --infra-image " + pause)
	h1.serve("member", "--pod p")
	h1.sh("podman run -d --pod p --name other --stop-timeout 0 " + busybox + " sleep 1000000")
	h1.gets("other", server{"127.0.0.1:80", h1.says("member")})
	h2.gets("a", server{h1.Addr().String() + ":8008", h1.says("member")})
	if p := h1.pods()["p"]; len(p.Addresses) != 1 {
		t.Errorf("the pod has the addresses of one container: %+v", h1.pods())
	}
	h1.sh("podman pod restart p")
	h2.gets("a", server{h1.Addr().String() + ":8008", h1.says("member")})
	h1.sh("podman pod rm -f -t 0 p")

	// The options of a network.
	out := h1.sh("podman run --rm --network caracal:ip=10.244.0.51,mac=02:00:00:00:00:0a,interface_name=net7 " + busybox + " ip addr")
	if !strings.Contains(out, "net7") || !strings.Contains(out, "10.244.0.51/32") || !strings.Contains(out, "02:00:00:00:00:0a") {
		t.Errorf("the network's options came to %s", out)
	}

	// A cut of the power; no agent runs at first.
	h2.sh("podman rm -f -t 0 a; sync")
	h2.serve("a", "--restart always -p 8000:80")
	h2.reboot()
	if left := h2.sh("ls -d /run/netns/netns-* /sys/fs/bpf/caracal 2>/dev/null; iptables-save | grep CNI-DN; true"); left != "" {
		t.Errorf("a reboot leaves %s", left)
	}
	h2.sh("podman start --all --filter restart-policy=always") // what podman-restart.service does
	h2.sh("podman start b")
	h2.gets("a", server{h2.address("b") + ":80", h2.says("b")})
	h2.sh("caracalctl node run; podman start c")
	meet("a", "c")
	if pods := h2.pods(); len(pods) != 3 {
		t.Errorf("three containers run: %v", pods)
	}
	if out := h2.sh("caracalctl ipam check"); !strings.Contains(out, "nothing wrong: 3 endpoints") {
		t.Error(out)
	}

	// podman forgets everything, but for the default network.
	h2.sh("podman system reset -f")
	if out := h2.sh(leftovers); out != "" {
		t.Errorf("left: %s", out)
	}
	h2.sh("test -e /etc/cni/net.d/10-caracal.conflist")
	h2.sh("podman load -q -i busybox.tar; podman run --rm " + busybox + " true")
	for _, m := range all {
		m.clean()
	}
}

// TestSelect: what policies know a container by. podman's labels don't reach a plugin.
func TestSelect(t *testing.T) {
	all := newCluster(t, 2)
	h1, h2 := all[0], all[1]
	for _, m := range all {
		m.sh(`sed 's/"name": "caracal"/"name": "db"/; s/"type": "caracal",/&"labels": {"role": "db"},/' /etc/cni/net.d/10-caracal.conflist >/etc/cni/net.d/20-db.conflist
			caracalctl validate /etc/cni/net.d/20-db.conflist`)
	}
	if out := h1.sh("podman network ls --format '{{.Name}} {{.Driver}}'"); out != "caracal caracal\ndb caracal" {
		t.Errorf("podman's networks: %s", out)
	}
	h1.serve("web", "--label role=web")
	h1.serve("db", "--network db")
	h1.sh("CNI_ARGS=K8S_POD_NAMESPACE=shop podman run -d --name till --stop-timeout 0 " + busybox + " sleep 1000000")
	h2.serve("far", "--ip 10.244.0.99 --network db")
	h2.serve("client", "")
	if pods := h1.pods(); pods["till"].Namespace != "shop" || pods["web"].Namespace != "" || pods["db"].Network != "db" {
		t.Errorf("pods: %v", pods)
	}
	h2.sh(`caracalctl apply -f - <<end
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: db}
spec:
  selector: role == 'db'
  ingress: [{action: Allow, source: {selector: projectcalico.org/namespace == 'shop'}}]
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: podmans-labels}
spec:
  selector: role == 'web'
  ingress: [{action: Deny}]
end`)
	db, far := h1.address("db")+":80", h2.address("far")+":80"
	silent := func(m *machine, container, at string) {
		t.Helper()
		eventually(t, container+" is kept from "+at, func() error {
			out, err := m.try(fmt.Sprintf("podman exec %s nc -w 1 %s </dev/null", container, strings.Replace(at, ":", " ", 1)))
			if err == nil || !strings.Contains(out, "timed out") {
				return fmt.Errorf("%q, %v", out, err)
			}
			return nil
		})
	}
	for _, at := range []string{db, far} {
		silent(h1, "web", at)
		silent(h2, "client", at)
	}
	h1.gets("till", server{db, h1.says("db")})
	h1.gets("till", server{far, h2.says("far")})
	h2.gets("client", server{h1.address("web") + ":80", h1.says("web")})
	if out := h1.sh("caracalctl why web db:80 || true"); !strings.Contains(out, "DENIED") || !strings.Contains(out, "GlobalNetworkPolicy db") {
		t.Errorf("why: %s", out)
	}

	// Its network's labels a container has always, the namespace only if it is named at each start.
	h1.sh("podman restart -t 0 db; podman restart -t 0 till")
	db = h1.address("db") + ":80"
	silent(h1, "web", db)
	silent(h1, "till", db)
	h1.sh("CNI_ARGS=K8S_POD_NAMESPACE=shop podman restart -t 0 till")
	h1.gets("till", server{db, h1.says("db")})

	// One container in both networks has the policy of each at its interface.
	h1.sh("cp /usr/lib/cni/sbr /opt/cni/bin; sed -i 's/\"type\": \"portmap\"/\"type\": \"sbr\"},{&/' /etc/cni/net.d/20-db.conflist; caracalctl validate /etc/cni/net.d/20-db.conflist")
	h1.sh("podman run -d --name both --stop-timeout 0 --network caracal --network db " + busybox + " sh -c 'echo both >/srv/index.html; exec httpd -f -p 80 -h /srv'")
	addresses := strings.Fields(h1.sh("podman inspect both --format '{{(index .NetworkSettings.Networks \"caracal\").IPAddress}} {{(index .NetworkSettings.Networks \"db\").IPAddress}}'"))
	if len(addresses) != 2 || slices.Contains(addresses, "invalid") {
		t.Fatalf("addresses %v", addresses)
	}
	h2.gets("client", server{addresses[0] + ":80", "both"})
	silent(h2, "client", addresses[1]+":80")
	for _, m := range all {
		m.clean()
	}
}

// TestBandwidth: podman can't ask for it; a network can have it.
func TestBandwidth(t *testing.T) {
	m := newCluster(t, 1)[0]
	const limit = 8e6 / 8 // bytes/s
	m.write("/etc/cni/net.d/20-slow.conflist", `{"cniVersion": "1.0.0", "name": "slow", "plugins": [
		{"type": "caracal", "shaped": true, "ipam": {"type": "caracal-ipam", "cluster": true}},
		{"type": "portmap", "capabilities": {"portMappings": true}},
		{"type": "bandwidth", "ingressRate": 8000000, "ingressBurst": 80000, "egressRate": 8000000, "egressBurst": 80000}]}`)
	m.fails("podman run --rm --network slow:bandwidth=8M "+busybox+" true", "bandwidth")
	for network, slow := range map[string]bool{"slow": true, "caracal": false} {
		m.serve(network, "-p 8080:80 --network "+network)
		m.sh("podman exec " + network + " dd if=/dev/zero of=/srv/big bs=1M count=2")
		at := m.address(network)
		m.gets("", server{at + ":80", m.says(network)})
		for _, url := range []string{"http://" + at + "/big", "http://" + m.Addr().String() + ":8080/big"} {
			var speed float64
			if _, err := fmt.Sscan(m.sh("curl -sS -o /dev/null -w %{speed_download} "+url), &speed); err != nil {
				t.Fatal(err)
			}
			if slow && speed > 1.2*limit || !slow && speed < 2*limit {
				t.Errorf("network %s: %s at %.0f bytes/s; the network slow has %.0f", network, url, speed, limit)
			}
		}
		m.clean()
	}
}
