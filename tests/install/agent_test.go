package install

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	testimage "github.com/caracal-net/caracal/tests/image"
)

// What the agent's container is started with: the least that it works with. Docker 20.10 knows neither CAP_BPF nor CAP_PERFMON, for
// which CAP_SYS_ADMIN stands. /proc/sys must be writable: the agent sets sysctls of the host's network.
const agentOptions = `--net=host --pid=host --cap-drop=ALL --cap-add=NET_ADMIN --cap-add=NET_BIND_SERVICE --cap-add=SYS_ADMIN --security-opt systempaths=unconfined \
	-v /sys/fs/bpf:/sys/fs/bpf -v /var/lib/caracal:/var/lib/caracal -v /run:/run:rslave -v /etc/caracal:/etc/caracal:ro `

// A container has a /proc of its own, where it would find the real machine's boot id.
const simulated = "-v /proc/sys/kernel/random/boot_id:/boot_id:ro -e CARACAL_BOOT_ID_FILE=/boot_id "

// The agent as a container: with the least that it works with, through a restart, with pods.
func agentContainer(t *testing.T, m machine) {
	m.sh("mkdir -p /var/lib/caracal; docker run --rm -e SLEEP=false -v /var/lib/caracal:/var/lib/caracal -v /etc/cni/net.d:/etc/cni/net.d -v /opt/cni/bin:/opt/cni/bin " + image)
	m.pod("a")
	m.sh("docker run -d --name caracald --restart=always --memory=256M --cpus=1 --health-interval 1s -e CARACAL_DOCKER=caracal " + agentOptions + simulated + image + " caracald")
	m.await("docker exec caracald caracalctl health; docker logs caracald 2>&1 | tail -5", "yes ")
	m.await("docker inspect caracald --format '{{.State.Health.Status}}'", "^healthy")
	m.sh("curl -sf http://localhost:9099/health && curl -sf http://localhost:9091/metrics | grep -q caracal_problems")
	m.pod("b")
	ping := "ip netns exec a ping -c 1 -W 5 10.244.0.1"
	m.sh(ping)
	m.sh("/root/caracal/caracalctl node status")
	m.sh("docker restart -t 5 caracald; " + ping)
	m.await("docker exec caracald caracalctl health; docker logs caracald 2>&1 | tail -5", "yes ")
	m.await("docker exec caracald caracalctl pods", "(?m)^-.* b .*ready")
	m.sh("docker exec caracald caracalctl ipam check")

	// It serves Docker's drivers, too.
	archive, err := os.ReadFile(testimage.Busybox(t, t.TempDir(), "busybox:test"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.Path("/root/busybox.tar"), archive, 0o600); err != nil {
		t.Fatal(err)
	}
	m.sh("docker load -qi /root/busybox.tar; docker network create --driver caracal --ipam-driver caracal-ipam n1")
	m.sh("docker run -d --name web --net n1 busybox:test sleep 1000; docker run --rm --net n1 busybox:test ping -c 1 -W 5 web; docker rm -f web; docker network rm n1")
	if out := m.sh("docker logs caracald 2>&1"); strings.Contains(out, "level=ERROR") || strings.Contains(out, "level=WARN") {
		t.Errorf("log: %s", out)
	}

	// One capability less, or a user that is not root: a sentence that names what is missing.
	for flag, name := range map[string]string{"SYS_ADMIN": "CAP_BPF, CAP_PERFMON", "NET_ADMIN": "CAP_NET_ADMIN", "NET_BIND_SERVICE": "CAP_NET_BIND_SERVICE"} {
		m.fails("docker run --rm "+strings.Replace(agentOptions, "--cap-add="+flag+" ", "", 1)+image+" caracald", "caracald lacks "+name+":")
	}
	m.fails("docker run --rm --user 1000 "+agentOptions+image+" caracald", "caracald lacks CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_NET_BIND_SERVICE:")
	m.sh("docker rm -f caracald; " + ping)
}

// The agent with the least that it works with where each capability can be given, with a tunnel, and with each of it missing.
func TestAgentCapabilities(t *testing.T) {
	m := boot(t, 1)[0]
	m.sh("ip route add default via 192.0.2.254")
	all := []string{"bpf", "net_admin", "perfmon", "net_bind_service"}
	agent := func(caps []string) string {
		return "setpriv --inh-caps=-all --bounding-set=-all,+" + strings.Join(caps, ",+") + " /root/caracal/caracald"
	}
	for n, missing := range all {
		m.fails(agent(slices.Delete(slices.Clone(all), n, n+1)), "caracald lacks CAP_"+strings.ToUpper(missing)+":")
	}
	m.fails(agent(all)+" --docker caracal", "caracald --docker lacks CAP_SYS_ADMIN:")
	if err := m.StartDaemon("caracald", "sh", "-c", "exec "+agent(all)); err != nil {
		t.Fatal(err)
	}
	m.await("/root/caracal/caracalctl health", "yes ")
	m.sh(`/root/caracal/caracalctl apply -f - <<end
{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: v4}, spec: {cidr: 10.244.0.0/16, natOutgoing: true, vxlanMode: Always}}
---
{apiVersion: projectcalico.org/v3, kind: Node, metadata: {name: h2}, spec: {bgp: {ipv4Address: 192.0.2.2/24}}}
---
{apiVersion: projectcalico.org/v3, kind: GlobalNetworkPolicy, metadata: {name: p}, spec: {selector: all(), ingress: [{action: Allow}], egress: [{action: Allow}]}}
end`)
	m.await("ip link show vxlan.caracal", "UP")
	m.sh("/root/caracal/caracalctl install")
	m.pod("a")
	m.pod("b")
	m.sh("ip netns exec a ping -c 1 -W 5 $(ip netns exec b ip -4 -o addr show eth0 | sed 's,.*inet \\([0-9.]*\\).*,\\1,')")
	m.await("/root/caracal/caracalctl policy show", "GlobalNetworkPolicy")
	m.await("/root/caracal/caracalctl health", "yes ")
	if err := m.Signal(t.Context(), "caracald", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := m.StartDaemon("caracald", "sh", "-c", "exec "+agent(all)); err != nil {
		t.Fatal(err)
	}
	m.await("/root/caracal/caracalctl health", "yes ")
	m.sh("/root/caracal/caracalctl doctor --timeout 200ms >/root/doctor; ! grep -v -e '^agent' /root/doctor | grep FAIL")
	// Who may do no more than the agent can't look into pods, and says so.
	m.sh(strings.TrimSuffix(agent(all), "caracald") + `caracalctl doctor --timeout 200ms >/root/doctor
cat /root/doctor; grep -E "^pods +ok .*on the host's side.*takes CAP_SYS_ADMIN" /root/doctor`)
}

// The plugin with the least that it works with, and with each of it missing.
func TestPluginCapabilities(t *testing.T) {
	m := boot(t, 1)[0]
	m.sh("/root/caracal/caracalctl install")
	with := func(caps string) string { return "setpriv --inh-caps=-all --bounding-set=-all," + caps + " -- env" }
	m.pod("a", with("+net_admin,+sys_admin"))
	m.pod("b", with("+net_admin,+sys_admin"))
	m.sh("ip netns exec a ping -c 1 -W 5 10.244.0.1")
	for _, command := range []string{"ADD", "DEL", "CHECK"} {
		m.fails(strings.Replace(add("a", with("+net_admin")), "=ADD", "="+command, 1), "the plugin lacks CAP_SYS_ADMIN:", `"code": 105`)
		m.fails(strings.Replace(add("a", with("+sys_admin")), "=ADD", "="+command, 1), "the plugin lacks CAP_NET_ADMIN:", `"code": 105`)
	}
	m.sh(strings.Replace(add("a", with("+net_admin,+sys_admin")), "=ADD", "=DEL", 1))
}
