package podman

import (
	"testing"

	"github.com/caracal-net/caracal/tests/page"
)

func TestPage(t *testing.T) {
	all := newMachines(t, 2)
	all[0].startStore()
	page.Run(t, "../../docs/podman.md", map[string]page.Shell{"h1": all[0].shell, "h2": all[1].shell})
	for _, m := range all {
		m.clean()
	}
}
