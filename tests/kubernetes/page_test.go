//go:build cluster

package kubernetes

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/page"
	"github.com/caracal-net/caracal/tests/testenv"
)

// TestPage runs docs/kubernetes.md: Caracal is installed, asked, upgraded and removed. TestMigrateFromCalico and TestMigrateFromFlannel run the rest.
func TestPage(t *testing.T) {
	c := start(t, options{bare: true})
	for _, n := range c.nodes {
		n.sh("ctr -n k8s.io images tag docker.io/library/caracal:v1 docker.io/library/caracal:v2")
	}
	c.eventually("both nodes are there", "n1 n2", "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}")
	before := make([]string, len(c.nodes))
	for i, n := range c.nodes {
		before[i] = n.left()
	}
	shells := c.shells()
	must(t, os.Mkdir(c.control.path(".kube"), 0o700))
	must(t, os.Symlink("../admin.kubeconfig", c.control.path(".kube/config")))
	page.Run(t, "../../docs/kubernetes.md", shells, "Install")
	page.Run(t, "../../docs/kubernetes.md", shells, "Ask", "Troubleshooting")
	page.Run(t, "../../docs/kubernetes.md", shells, "Upgrade", "Uninstall")
	for i, n := range c.nodes {
		if after := n.left(); after != before[i] {
			t.Errorf("left on %s:\n%s\nbefore:\n%s", n.name, after, before[i])
		}
	}
}

// left is what of Caracal's there may be on a node.
func (n *node) left() string {
	n.t.Helper()
	return n.sh(`ls /opt/cni/bin /etc/cni/net.d; ls -d /var/lib/caracal /sys/fs/bpf/* || true; ip route; ip -o link | grep -v lo: | awk '{print $2}'; sysctl net.ipv4.ip_forward; tc filter show dev eth0 ingress; tc filter show dev eth0 egress`)
}

// shells are where a page's commands are run: an operator's, and those on nodes.
func (c *cluster) shells() map[string]page.Shell {
	shells := map[string]page.Shell{"": c.shell}
	for _, n := range c.nodes {
		shells[n.name] = n.Sh
	}
	return shells
}

// shell runs an operator's commands: where kubectl is, in the project's directory.
func (c *cluster) shell(ctx context.Context, script string) (string, error) {
	root, err := testenv.Root()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.Dir = root
	cmd.Env = []string{"PATH=" + c.control.bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "KUBECONFIG=" + c.control.path("admin.kubeconfig"), "HOME=" + c.control.Dir()}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err = c.control.Namespace().Run(cmd)
	return out.String(), err
}
