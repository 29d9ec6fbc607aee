package install

import (
	"context"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/page"
)

// Every command of docs/install.md.
func TestPage(t *testing.T) {
	m := boot(t, 1)[0]
	m.docker()
	m.systemd()
	m.sh("ip route add default via 192.0.2.254; ln -s caracal bin; docker rmi -f " + image)
	shell := func(ctx context.Context, script string) (string, error) {
		if strings.Contains(script, "node run") { // in a container the agent would find the real machine's boot id
			script = "export CARACAL_BOOT_ID_FILE=/var/lib/boot_id\n" + script
		}
		return m.Sh(ctx, script)
	}
	page.Run(t, "../../docs/install.md", map[string]page.Shell{"h1": shell})
}
