package podman

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestKilled: podman is killed while a plugin behind Caracal is at work, so between ADD and its own notes; and conmon, and the
// container's program, at any time.
func TestKilled(t *testing.T) {
	m := newCluster(t, 1)[0]
	m.write("/opt/cni/bin/hold", `#!/bin/sh
in=$(cat)
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}' ;;
ADD | DEL)
	if [ -e /tmp/hold ]; then touch /tmp/held; while [ -e /tmp/hold ]; do sleep 0.05; done; fi
	[ $CNI_COMMAND = DEL ] || echo "$in" | sed -n 's/.*"prevResult":\({.*}\),"type".*/\1/p' ;;
esac
`)
	m.sh(`chmod +x /opt/cni/bin/hold; sed -i 's/"type": "bandwidth"/"type": "hold"},{&/' /etc/cni/net.d/10-caracal.conflist`)
	m.serve("other", "")
	m.sh("podman create --name web --stop-timeout 0 -p 8080:80 " + busybox + " sh -c 'echo " + m.says("web") + " >/srv/index.html; exec httpd -f -p 80 -h /srv'")
	var address string
	for round := range 2 {
		m.sh("rm -f /tmp/held; touch /tmp/hold; podman start web >/dev/null 2>&1 & echo $! >/tmp/pid")
		m.until("podman waits for the plugin", "test -e /tmp/held")
		m.sh("kill -9 $(cat /tmp/pid); rm /tmp/hold")
		m.until("the plugin ends", "! pgrep -x hold")
		if p := m.pods()["web"]; len(p.Addresses) != 1 || round > 0 && p.Addresses[0] != address {
			t.Fatalf("what podman was killed over: %+v, before %s", p, address)
		} else {
			address = p.Addresses[0]
		}
	}
	m.sh("podman start web")
	if now := m.address("web"); now != address {
		t.Errorf("the address was %s, is %s", address, now)
	}
	m.gets("other", server{address + ":80", m.says("web")})
	m.gets("", server{m.Addr().String() + ":8080", m.says("web")})

	m.sh("kill -9 $(podman inspect web --format {{.State.ConmonPid}})")
	m.gets("", server{m.Addr().String() + ":8080", m.says("web")})
	m.sh("podman rm -f -t 0 web") // podman can't restart what has no conmon
	m.serve("web", "-p 8080:80")
	m.sh("kill -9 $(podman inspect web --format {{.State.Pid}})")
	eventually(t, "the container that was killed has let go of its address", func() error {
		if pods := m.pods(); len(pods) != 1 {
			return fmt.Errorf("%v", pods)
		}
		return nil
	})
	m.sh("podman start web")
	m.gets("", server{m.Addr().String() + ":8080", m.says("web")})
	m.sh("kill -9 $(podman inspect web --format '{{.State.ConmonPid}} {{.State.Pid}}')")
	m.sh("podman rm -f -t 0 web")

	// Killed while it removes, before Caracal is called: the next one does the rest.
	m.serve("web", "-p 8080:80")
	m.sh("rm -f /tmp/held; touch /tmp/hold; podman rm -f -t 0 web >/dev/null 2>&1 &")
	m.until("podman waits for the plugin", "test -e /tmp/held")
	m.sh("pkill -9 -x podman; rm /tmp/hold") // the one that removes, and the one that conmon calls
	m.until("the plugin ends", "! pgrep -x hold")
	m.sh("podman rm -f -i -t 0 web")
	m.until("conmon lets go of the port", "! ss -Hltn sport = 8080 | grep -q .")
	m.serve("web", "-p 8080:80")
	m.gets("other", server{m.Addr().String() + ":8080", m.says("web")})
	// podman knows nothing of the namespaces that it made before it was killed.
	m.sh(`podman rm -fa -t 0; for n in /run/netns/netns-*; do [ ! -e "$n" ] || ip netns del "${n##*/}"; done`)
	m.clean()
}

// TestBadInput: what is wrong is said, nothing is left of it, and the next try works.
func TestBadInput(t *testing.T) {
	m := newCluster(t, 1)[0]
	const conf = "/etc/cni/net.d/10-caracal.conflist"
	m.serve("web", "-p 8080:80")
	before := m.sh(leftovers)
	run := func(flags string) string { return "podman run --rm " + flags + " " + busybox + " true" }
	refused := func(script string, words ...string) {
		t.Helper()
		m.fails(script, words...)
		eventually(t, "nothing is left of what was refused", func() error {
			if left := m.sh(leftovers); left != before {
				return errors.New(left)
			}
			return nil
		})
	}
	refused(run("--ip "+m.address("web")), m.address("web")+": address is taken by caracal/"+m.sh("podman inspect web --format {{.Id}}"))
	refused(run("--ip 10.99.0.1"), "10.99.0.1: address is in no pool; the pools are 10.244.0.0/16")
	refused(run("--ip 10.244.200.1"), "10.244.200.1: address is in no block of this node")
	refused(run("--ip 2001:db8::1"), "2001:db8::1: address is in no pool")
	refused(run("--mac-address 01:00:5e:00:00:01"), `"01:00:5e:00:00:01" is not a unicast Ethernet address`)
	refused(run("--network caracal:interface_name=all"), "all")
	refused(run("-p 8080:80"), "port 8080/tcp of this host is published by caracal/"+m.sh("podman inspect web --format {{.Id}}"))
	must(t, m.StartDaemon("listener", "busybox", "nc", "-l", "-p", "9090")) // of the machine itself
	m.until("something listens", "ss -Hltn sport = 9090 | grep -q .")
	refused(run("-p 9090:80"), "9090", "address already in use")
	refused("CNI_ARGS='IgnoreUnknown=0;ROOM=7' "+run(""), `unknown key "ROOM"`)

	edit := func(sed string) { m.sh("cp " + conf + " /root/good; sed -i '" + sed + "' " + conf) }
	mend := func() {
		t.Helper()
		m.sh("cp /root/good " + conf)
		m.sh(run(""))
		m.gets("", server{"127.0.0.1:8080", m.says("web")})
	}
	const fallback = `failed to find plugin "bridge"` // podman's own network, which is out of its reach
	edit(`s/"cluster": true/"cluster": true, "reservations": ["10.244.0.32\/28"]/`)
	refused(run("--ip 10.244.0.40"), "10.244.0.40: address is reserved")
	mend()
	edit(`s/"cluster": true/"cluster": "yes"/`)
	refused(run(""), `"ipam.cluster"`)
	m.fails("caracalctl validate "+conf, "ipam.cluster")
	mend()
	edit(`$d`)
	refused(run(""), "Error loading CNI config file "+conf, fallback)
	m.fails("caracalctl validate "+conf, "not JSON")
	mend()
	edit(`s/"1.0.0"/"1.1.0"/`)
	refused(run(""), `does not support config version`, fallback)
	mend()
	m.sh("cp " + conf + " /root/good; mv /opt/cni/bin/portmap /root")
	refused(run(""), `failed to find plugin \"portmap\"`, fallback)
	if out, err := m.try("podman exec web true && curl -sS -m 2 127.0.0.1:8080"); err != nil || out != m.says("web") {
		t.Errorf("a running container without portmap: %s, %v", out, err)
	}
	m.sh("mv /root/portmap /opt/cni/bin")
	mend()
	m.sh("cp " + conf + " /root/good; mv /opt/cni/bin/caracal /root/gone")
	refused(run(""), `failed to find plugin \"caracal\"`, fallback)
	m.sh("mv /root/gone /opt/cni/bin/caracal")
	mend()

	// Two files with one name: podman takes the first, and warns of the other.
	m.sh("cp " + conf + " /etc/cni/net.d/20-again.conflist")
	if out := m.sh("podman network ls"); !strings.Contains(out, "20-again.conflist") || strings.Count(out, "caracal") < 2 {
		t.Errorf("two networks of one name: %s", out)
	}
	m.sh(run(""))
	m.sh("rm /etc/cni/net.d/20-again.conflist")

	// Two networks: both work, and podman deletes the file of the one that is not the default, as docs/podman.md warns.
	m.sh(`sed 's/"name": "caracal"/"name": "two"/' ` + conf + " >/etc/cni/net.d/05-two.conflist")
	if out := m.sh("podman run --rm " + busybox + " true; podman network ls --format '{{.Name}}'"); out != "caracal\ntwo" {
		t.Errorf("podman's networks: %s", out)
	}
	m.serve("first", "")
	m.serve("second", "--network two")
	if pods := m.pods(); pods["first"].Network != "caracal" || pods["second"].Network != "two" {
		t.Errorf("pods: %v", pods)
	}
	m.gets("first", server{m.address("second") + ":80", m.says("second")})
	m.fails("podman network rm two", "has associated containers")
	m.sh("rm /etc/cni/net.d/05-two.conflist; podman rm -f -t 0 first second") // by what libcni has kept
	if left := m.sh(leftovers); left != before {
		t.Errorf("left of a network whose file is gone: %s", left)
	}
	m.sh(`sed 's/"name": "caracal"/"name": "two"/' ` + conf + " >/etc/cni/net.d/05-two.conflist; podman rm -f -t 0 web")
	m.fails("podman network rm caracal", "default network caracal cannot be removed")
	m.sh("podman network prune -f")
	if out := m.sh("ls /etc/cni/net.d/*.conflist"); out != conf {
		t.Errorf("podman network prune leaves %s", out)
	}
	m.clean()
}
