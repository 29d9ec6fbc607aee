package containerd

import (
	"context"
	"sync"
	"testing"

	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/page"
	"github.com/caracal-net/caracal/tests/testenv"
)

// TestPages runs what docs/containerd.md and then docs/nerdctl.md tell a user to type.
func TestPages(t *testing.T) {
	program := nerdctl(t, "v2")
	all := bootCluster(t)
	h1, h2 := all[0], all[1]
	h1.sh("rm -r /opt/cni /etc/containerd")
	for _, m := range all {
		m.copy(testenv.Build(t, "./tests/containerd/crictl"), "/usr/local/bin/crictl")
		m.copy(program, "/usr/local/bin/nerdctl")
		m.copy(image.Busybox(t, t.TempDir(), busybox), "/root/busybox.tar")
		m.copy(image.Pause(t, t.TempDir(), pause), "/root/pause.tar")
	}
	var once sync.Once
	shells := map[string]page.Shell{"h1": h1.Sh, "h2": func(ctx context.Context, script string) (string, error) {
		once.Do(func() { // on h2 the same was done, says the page
			h2.install()
			must(t, h2.agent())
			h2.ready()
			h1.ready()
		})
		return h2.Sh(ctx, script)
	}}
	page.Run(t, "../../docs/containerd.md", shells)
	page.Run(t, "../../docs/nerdctl.md", shells)
}
