package docker

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/tests/testenv"
)

// What the agent adds to the firewall of a host on which Docker has everything dropped is there once, and uninstall finds it.
func TestForwarding(t *testing.T) {
	testenv.NeedRoot(t)
	name := fmt.Sprintf("caracal-firewall-%d", os.Getpid())
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := netns.Delete(name); err != nil {
			t.Error(err)
		}
	}()
	err := netns.Do(netns.Path(name), func() error {
		do := func(what string, want int, fn func() ([]string, error)) {
			t.Helper()
			if rules, err := fn(); err != nil || len(rules) != want {
				t.Errorf("%s: %q, %v; want %d", what, rules, err, want)
			}
		}
		add := func() ([]string, error) { return allowForwarding(t.Context()) }
		look := func() ([]string, error) { return RemoveForwarding(t.Context(), true) }
		remove := func() ([]string, error) { return RemoveForwarding(t.Context(), false) }
		do("without Docker", 0, add)
		if out, err := exec.Command("iptables", "-P", "FORWARD", "DROP").CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		do("add", 2, add)
		do("add again", 0, add)
		do("dry run", 2, look)
		do("remove", 2, remove)
		do("remove again", 0, remove)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
