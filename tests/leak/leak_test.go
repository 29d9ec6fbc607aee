package leak

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tools/lab"
)

func TestLeaksAreSeen(t *testing.T) {
	if os.Geteuid() != 0 {
		lab.Skip(t, "network namespaces and bpffs need root")
	}
	if mine := Mine(); len(mine) != 0 {
		t.Fatalf("left before anything was made: %v", mine)
	}
	l, err := lab.Up(t.Context(), lab.Config{Name: lab.TestName(), Conflist: `{"cniVersion":"1.0.0","name":"x","plugins":[{"type":"ptp"}]}`})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Down(t.Context())
	if _, err := l.Host(1).NewPod(t.Context(), "web", lab.PodOptions{}); err != nil {
		t.Fatal(err)
	}
	sleep := exec.Command("sleep", "1000")
	if err := l.Host(1).Namespace().Start(sleep); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"directory " + l.Dir,
		"mount " + l.Dir + "/bpf",
		"network namespace " + l.Name + "-h1",
		"network namespace " + l.Name + "-h1-web",
		"network namespace " + l.Name + "-switch",
		fmt.Sprintf("process sleep[%d]", sleep.Process.Pid),
	}
	for name, list := range map[string]func() ([]string, error){
		"Machine": Machine,
		"Mine":    func() ([]string, error) { return Mine(), nil },
	} {
		got, err := list()
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !slices.Contains(got, w) {
				t.Errorf("%s lacks %q: %v", name, w, got)
			}
		}
	}
	child := fmt.Sprintf("child process sleep[%d]", sleep.Process.Pid)
	if !slices.Contains(Mine(), child) {
		t.Errorf("Mine lacks %q", child)
	}
	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Dead, and not waited for: still this process's to clean.
	if mine := Mine(); !slices.Equal(mine, []string{child}) {
		t.Errorf("after Down: %v, want only %q", mine, child)
	}
	sleep.Wait()
	if mine := Mine(); len(mine) != 0 {
		t.Errorf("at the end: %v", mine)
	}
	machine, err := Machine()
	if err != nil || strings.Contains(strings.Join(machine, "\n"), l.Name) {
		t.Errorf("Machine after Down: %v, %v", machine, err)
	}
}
