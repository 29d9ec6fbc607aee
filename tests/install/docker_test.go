package install

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

const image = "caracal:test"

// machine is a lab host as a computer of its own.
type machine struct {
	*lab.Machine
	t testing.TB
}

// boot starts machines that can reach each other.
func boot(t testing.TB, hosts int) []machine {
	t.Helper()
	testenv.NeedRoot(t)
	l := lab.New(t, lab.Config{Hosts: hosts, Caracal: testenv.Bin(t, "caracal")})
	var all []machine
	for n := range hosts {
		m, err := l.Host(n + 1).Boot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, machine{m, t})
	}
	return all
}

// sh runs a script that must succeed.
func (m machine) sh(script string) string {
	m.t.Helper()
	out, err := m.Sh(context.Background(), script)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// fails runs a script that must fail, and say all of want.
func (m machine) fails(script string, want ...string) {
	m.t.Helper()
	out, err := m.Sh(context.Background(), script)
	if err == nil {
		m.t.Errorf("%s: it succeeded: %s", script, out)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			m.t.Errorf("%s: want %q in: %s", script, w, out)
		}
	}
}

// await repeats a script until what it writes matches a pattern.
func (m machine) await(script, pattern string) string {
	m.t.Helper()
	want := regexp.MustCompile(pattern)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, err := m.Sh(context.Background(), script)
		if want.MatchString(out) {
			return strings.TrimSpace(out)
		}
		if time.Now().After(end) {
			m.t.Fatalf("%s: want %q: %v %s", script, pattern, err, out)
		}
	}
}

// docker starts dockerd with the image built by the project's own recipe.
func (m machine) docker() {
	m.t.Helper()
	testenv.NeedProgram(m.t, "dockerd", "docker.io")
	if err := m.StartDaemon("dockerd", "dockerd", "--iptables=false", "--ip-masq=false", "--bridge=none"); err != nil {
		m.t.Fatal(err)
	}
	m.await("docker version", "(?m)^Server:")
	root, err := testenv.Root()
	if err != nil {
		m.t.Fatal(err)
	}
	m.sh("mkdir -p /root/deploy")
	for _, name := range []string{"Dockerfile", "image.sh"} {
		text, err := os.ReadFile(filepath.Join(root, "deploy", name))
		if err != nil {
			m.t.Fatal(err)
		}
		if err := os.WriteFile(m.Path("/root/deploy/"+name), text, 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	m.sh("/root/deploy/image.sh /root/caracal " + image)
}

// pod makes a network namespace and calls the plugin for it as a runtime does, perhaps through another program.
func (m machine) pod(name string, through ...string) {
	m.t.Helper()
	text, err := os.ReadFile(m.Path("/etc/cni/net.d/10-caracal.conflist"))
	if err != nil {
		m.t.Fatal(err)
	}
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal(text, &list); err != nil {
		m.t.Fatal(err)
	}
	plugin := list.Plugins[0]
	plugin["cniVersion"], plugin["name"] = list.CNIVersion, list.Name
	if text, err = json.Marshal(plugin); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(m.Path("/root/plugin.json"), text, 0o600); err != nil {
		m.t.Fatal(err)
	}
	m.sh("ip netns add " + name)
	m.sh(add(name, through...))
}

// add is a script that calls the plugin.
func add(name string, through ...string) string {
	return fmt.Sprintf("CNI_COMMAND=ADD CNI_CONTAINERID=%s CNI_NETNS=/run/netns/%s CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin %s /opt/cni/bin/caracal </root/plugin.json",
		name, name, strings.Join(through, " "))
}

// What the image does, on one machine.
func TestDocker(t *testing.T) {
	m := boot(t, 1)[0]
	m.sh("ip route add default via 192.0.2.254")
	m.docker()
	for _, part := range []struct {
		name string
		run  func(*testing.T, machine)
	}{{"calico", calicoSession}, {"options", imageOptions}, {"agent", agentContainer}, {"datastore", datastore}} {
		t.Run(part.name, func(t *testing.T) {
			part.run(t, machine{m.Machine, t})
			m.sh(`docker rm -f $(docker ps -aq) >/dev/null; /root/caracal/caracalctl uninstall --force
				for p in $(ip netns list | cut -d" " -f1); do ip netns del $p; done; rm -rf /etc/cni/net.d/* /opt/cni/bin/* /etc/calico`)
		})
	}
}

// The command line with which people start Calico's CNI image, and all that they do then.
func calicoSession(t *testing.T, m machine) {
	if out := m.sh("docker image inspect " + image + " --format '{{.Size}}'"); len(out) > 8 || out > "60000000" && len(out) == 8 {
		t.Errorf("the image has %s bytes, more than 60 MB", out)
	} else {
		t.Logf("the image has %s bytes", out)
	}
	m.sh(`docker run -d \
		--name cni-calico \
		--restart=always \
		--net=host \
		-v /etc/cni/net.d:/etc/cni/net.d \
		-v /opt/cni/bin:/opt/cni/bin \
		-v /var/run/calico:/var/run/calico \
		-e CALICO_IPV4POOL_CIDR=10.244.0.0/16 \
		-e CALICO_DISABLE_FILE_LOGGING=true \
		` + image)
	m.await("docker logs cni-calico 2>&1", "Caracal is installed")
	if out := m.sh(`docker ps --filter "name=cni-calico" --format '{{.Status}}'`); !strings.HasPrefix(out, "Up") {
		t.Errorf("status %s", out)
	}
	if out := m.sh("docker logs cni-calico --tail=100 2>&1"); regexp.MustCompile(`(?i)error|fail`).MatchString(out) {
		t.Errorf("log: %s", out)
	}
	if out := m.sh("ls /etc/cni/net.d/"); out != "10-caracal.conflist" {
		t.Errorf("networks: %s", out)
	}
	if out := m.sh("ls /opt/cni/bin/ | grep calico"); out != "calico\ncalico-ipam" {
		t.Errorf("plugins: %s", out)
	}
	m.sh("curl -sf http://localhost:9099/health")
	m.sh("docker exec cni-calico caracalctl health")
	m.sh("docker exec -i cni-calico caracalctl validate < /etc/cni/net.d/10-caracal.conflist")
	if out := m.sh("docker stats --no-stream --format '{{.Name}}' cni-calico"); out != "cni-calico" {
		t.Error(out)
	}

	// Pods on it, by the plugin on the host.
	m.pod("a")
	m.pod("b")
	m.sh("ip netns exec a ping -c 1 -W 5 10.244.0.1")

	// What was installed and goes is told, and what ends starts again.
	m.sh("mv /opt/cni/bin/calico-ipam /root")
	m.fails("curl -sf http://localhost:9099/health")
	m.fails("docker exec cni-calico caracalctl health -o json", `"healthy": false`, "/opt/cni/bin/calico-ipam: no such file")
	m.sh("docker kill cni-calico >/dev/null; docker start cni-calico >/dev/null")
	m.await("ls /opt/cni/bin", "calico-ipam")
	m.await("curl -s http://localhost:9099/health", "ok")
	m.sh("kill -9 $(docker inspect cni-calico --format '{{.State.Pid}}')")
	m.await("docker inspect cni-calico --format '{{.RestartCount}} {{.State.Status}}'", "^1 running")
	m.await("curl -s http://localhost:9099/health", "ok")
	if out := m.sh("time -p docker stop -t 8 cni-calico 2>&1; docker inspect cni-calico --format '{{.State.ExitCode}}'"); !strings.HasSuffix(out, "\n0") {
		t.Errorf("stop: %s", out)
	}
	m.sh("docker rm cni-calico; docker run --rm " + image + " caracalctl version")
}

// Limits, the image's health check and Docker's own, and users that are not root.
func imageOptions(t *testing.T, m machine) {
	mounts := "--net=host -v /etc/cni/net.d:/etc/cni/net.d -v /opt/cni/bin:/opt/cni/bin "
	m.sh("docker run -d --name limited --memory=1G --memory-swap=1G --cpus=0.5 --health-interval 1s " + mounts + image)
	m.await("docker inspect limited --format '{{.State.Health.Status}}'", "^healthy")
	if out := m.sh("docker inspect limited --format '{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.State.OOMKilled}}'"); out != "1073741824 500000000 false" {
		t.Error(out)
	}
	m.sh("rm /etc/cni/net.d/10-caracal.conflist")
	m.await("docker inspect limited --format '{{.State.Health.Status}}'", "^unhealthy")
	m.sh("docker rm -f limited")
	m.sh("docker run --rm --memory=64M --memory-swap=64M --cpus=0.5 -e SLEEP=false " + mounts + image + "; rm /etc/cni/net.d/*")

	// As another user: where the directories are that user's.
	m.fails("docker run --rm --user 1000 "+mounts+image, "--bin-dir /opt/cni/bin: user 1000 may not write there", "--conf-dir /etc/cni/net.d: user 1000 may not write there")
	m.sh("chown 1000 /etc/cni/net.d /opt/cni/bin; rm -f /opt/cni/bin/*")
	m.sh("docker run --rm --user 1000 --cap-drop=ALL --read-only --security-opt no-new-privileges -e SLEEP=false " + mounts + image)
	if out := m.sh("stat -c '%u %a' /etc/cni/net.d/10-caracal.conflist"); out != "1000 600" {
		t.Error(out)
	}
	// Without the mounts nothing would reach the host.
	m.fails("docker run --rm -e SLEEP=false "+image, "/opt/cni/bin: no such directory in this container: mount the host's (docker run -v /opt/cni/bin:/opt/cni/bin)")
	m.fails("docker run --rm -e SLEEP=false -v /etc/cni/net.d:/etc/cni/net.d:ro -v /opt/cni/bin:/opt/cni/bin "+image, "read-only")
	// As pods of Calico's manifest mount them.
	m.sh("rm -rf /etc/cni/net.d/* /opt/cni/bin/*; docker run --rm -e SLEEP=false -e CNI_NET_DIR=/etc/cni/net.d -e CNI_CONF_NAME=10-calico.conflist " +
		"-v /etc/cni/net.d:/host/etc/cni/net.d -v /opt/cni/bin:/host/opt/cni/bin " + image)
	m.sh("ls /etc/cni/net.d/10-calico.conflist /opt/cni/bin/calico-ipam")
	// The health port is another's.
	if err := m.StartDaemon("other", "busybox", "httpd", "-f", "-p", "127.0.0.1:9099"); err != nil {
		t.Fatal(err)
	}
	m.await("curl -s http://127.0.0.1:9099/", "404")
	m.fails("docker run --rm "+mounts+image, "--health 127.0.0.1:9099: another program listens there")
	m.fails("/root/caracal/caracalctl install --sleep --force", "(busybox) listens there")
	if err := m.Signal(t.Context(), "other", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.sh("chown 0 /etc/cni/net.d /opt/cni/bin")
}
