package install

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/containerd/cri"
	"github.com/caracal-net/caracal/tests/testenv"
)

const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
`

// A containerd that runs sees the network come, and go.
func TestContainerdSeesIt(t *testing.T) {
	m := boot(t, 1)[0]
	testenv.NeedProgram(t, "containerd", "containerd")
	m.sh("mkdir -p /etc/containerd /etc/cni/net.d /opt/cni/bin; ln -s /usr/lib/cni/loopback /opt/cni/bin/")
	if err := os.WriteFile(m.Path("/etc/containerd/config.toml"), []byte(containerdConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.StartDaemon("containerd", "containerd"); err != nil {
		t.Fatal(err)
	}
	m.await("ctr version", "Server:")
	c, err := cri.Dial(m.Path("/run/containerd/containerd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ready := func(want bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			err := c.NetworkReady(ctx)
			cancel()
			if (err == nil) == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("the network is ready: want %v: %v", want, err)
			}
		}
	}
	ready(false)
	m.sh("/root/caracal/caracalctl install")
	ready(true)
	m.sh("/root/caracal/caracalctl uninstall")
	ready(false)
}
