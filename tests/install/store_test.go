package install

import (
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

const calicoFile = `mkdir -p /etc/calico; cat >/etc/calico/calicoctl.cfg <<end
apiVersion: v1
kind: calicoApiConfig
metadata:
spec:
  datastoreType: "etcdv3"
  etcdEndpoints: "http://127.0.0.1:2379"
end
`

// With a datastore the network comes after that answers, and a node runs as a container by the command line of calicoctl.
func datastore(t *testing.T, m machine) {
	testenv.NeedProgram(t, "etcd", "etcd-server")
	m.fails("ETCD_ENDPOINTS=http://127.0.0.1:2379 /root/caracal/caracalctl install --wait 1s", "the datastore does not answer, so nothing was installed", "ETCD_ENDPOINTS (http://127.0.0.1:2379)")
	m.fails("ls /opt/cni/bin/caracal /etc/cni/net.d/10-caracal.conflist")
	m.sh("docker run -d --name install --net=host -v /etc/cni/net.d:/etc/cni/net.d -v /opt/cni/bin:/opt/cni/bin -e CALICO_IPV4POOL_CIDR=10.9.0.0/16 " +
		"-e CALICO_DISABLE_FILE_LOGGING=true -e ETCD_ENDPOINTS=http://127.0.0.1:2379 " + image + " caracalctl install --health 127.0.0.1:9098")
	if err := m.StartDaemon("etcd", "etcd", "--data-dir", "/var/lib/etcd"); err != nil {
		t.Fatal(err)
	}
	m.await("ls /etc/cni/net.d", "10-caracal.conflist")
	if out := m.sh("cat /etc/cni/net.d/10-caracal.conflist"); strings.Contains(out, "10.9.") || !strings.Contains(out, `"cluster": true`) {
		t.Errorf("network: %s", out)
	}
	m.sh(calicoFile)
	if out := m.sh("/root/caracal/caracalctl get ippools"); !strings.Contains(out, "default-ipv4-ippool") || !strings.Contains(out, "10.9.0.0/16") || !strings.Contains(out, "natOutgoing: true") {
		t.Errorf("pools: %s", out)
	}
	m.sh("cat /proc/sys/kernel/random/boot_id >/var/lib/boot_id")
	run := "CARACAL_BOOT_ID_FILE=/var/lib/boot_id /root/caracal/caracalctl node run --node-image=" + image + " -c /etc/calico/calicoctl.cfg "
	if out := m.sh(run + "--dry-run"); !strings.HasPrefix(out, "Running command to start the node:\n\ndocker run --detach --name=caracal-node --restart=always --net=host") {
		t.Errorf("dry run: %s", out)
	}
	m.fails("docker inspect caracal-node")
	m.fails(run+"--timeout 20s -- --masquerade-ports x", "masquerade-ports", "caracald ended", "docker logs caracal-node")
	m.fails(run, `The container name "/caracal-node" is already in use`, "docker rm -f caracal-node")
	m.sh("docker rm -f caracal-node")
	if out := m.sh(run + "2>&1"); !strings.Contains(out, "msg=registered") || !strings.HasSuffix(out, "Caracal node started successfully") {
		t.Errorf("run: %s", out)
	}
	if out := m.sh("docker ps --format '{{.Names}} {{.Status}}'"); !strings.Contains(out, "caracal-node Up") {
		t.Error(out)
	}
	m.fails(run, "an agent answers there already")
	if out := m.sh("/root/caracal/caracalctl node status"); !strings.Contains(out, "IPv4 BGP status") {
		t.Error(out)
	}
	m.pod("a")
	if out := m.sh("ip netns exec a ip -4 -o addr show eth0"); !strings.Contains(out, "10.9.") {
		t.Errorf("address: %s", out)
	}
}
