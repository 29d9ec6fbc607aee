package install

import (
	_ "embed"
	"os"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

//go:embed systemd.sh
var systemdScript string

// systemd starts a systemd on the machine, and waits until systemctl reaches it.
func (m machine) systemd() {
	m.t.Helper()
	testenv.NeedProgram(m.t, "systemctl", "systemd")
	if err := os.WriteFile(m.Path("/root/systemd.sh"), []byte(systemdScript), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := m.StartDaemon("systemd", "sh", "/root/systemd.sh"); err != nil {
		m.t.Fatal(err)
	}
	m.await("systemctl is-system-running 2>&1; cat /var/log/systemd.log", "^(running|degraded)")
}

// What a new user types: the agent under a real systemd, with its unit's confinement, started, killed, restarted, removed.
func TestSystemd(t *testing.T) {
	m := boot(t, 1)[0]
	m.systemd()
	m.sh("ip route add default via 192.0.2.254")
	m.sh("/root/caracal/caracalctl install --agent && systemctl enable --now caracald")
	m.await("caracalctl health", "yes ")
	m.await("systemctl show -p Before caracald", `\bdocker\.service\b`)
	m.pod("a")
	m.pod("b")
	ping := "ip netns exec a ping -c 1 -W 5 10.244.0.1"
	m.sh(ping)
	m.sh("caracalctl doctor --timeout 200ms >/root/doctor; ! grep FAIL /root/doctor")
	status := m.sh("grep ^Cap /proc/$(pgrep -x caracald)/status")
	if !strings.Contains(status, "CapEff:	000000c000001400") || !strings.Contains(status, "CapBnd:	000000c000001400") {
		t.Errorf("capabilities: %s", status)
	}
	m.sh("kill -9 $(pgrep -x caracald); " + ping)
	m.await("systemctl show -p NRestarts,ActiveState caracald", "NRestarts=1\nActiveState=active")
	m.await("caracalctl health", "yes ")

	// One capability less.
	m.sh(`mkdir -p /etc/systemd/system/caracald.service.d
		printf '[Service]\nCapabilityBoundingSet=~CAP_BPF\nRestart=no\nStandardError=append:/root/less.log\n' >/etc/systemd/system/caracald.service.d/less.conf
		systemctl daemon-reload; systemctl restart caracald || true`)
	m.await("cat /root/less.log", "caracald lacks CAP_BPF:")
	m.sh("rm -r /etc/systemd/system/caracald.service.d; systemctl daemon-reload; systemctl restart caracald; " + ping)

	m.await("caracalctl health", "yes ")
	m.fails("caracalctl uninstall", "an agent runs here")
	m.sh("systemctl disable --now caracald")
	m.fails("caracalctl uninstall", "2 pods are attached")
	m.sh("/root/caracal/caracalctl uninstall --force")
	if out := m.sh("find /opt/cni/bin /etc/cni/net.d /usr/local/bin /etc/systemd/system /sys/fs/bpf -mindepth 1 ! -name systemctl ! -name '*.debug'; ls -d /var/lib/caracal 2>/dev/null || true"); out != "" {
		t.Errorf("left: %s", out)
	}
}

// The unit has nothing that systemd complains about, and little exposure.
func TestUnit(t *testing.T) {
	m := boot(t, 1)[0]
	testenv.NeedProgram(t, "systemd-analyze", "systemd")
	m.sh("/root/caracal/caracalctl install --agent")
	if out := m.sh("systemd-analyze verify /etc/systemd/system/caracald.service 2>&1"); out != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	m.sh("systemd-analyze security --offline=true --threshold=65 /etc/systemd/system/caracald.service")
}
