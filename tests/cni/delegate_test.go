package cni

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

// TestDelegate: every command reaches another IPAM plugin with the runtime's parameters and configuration, and what it
// refuses is refused.
func TestDelegate(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	goBuild(t, dir, ".", "./tests/cni/ipamdelegate")
	h.path += ":" + dir
	record := filepath.Join(dir, "record")
	ipam := object{"type": "ipamdelegate", "address": "10.9.0.7/24", "record": record}
	h.conf["ipam"] = ipam

	p := h.pod()
	p.add()
	p.ping(p.addr(false))
	do := func(command string, extra object) error {
		q := *p
		q.conf = extra
		return q.do(command)
	}
	must(t, do("CHECK", object{"prevResult": p.raw}))
	must(t, do("STATUS", nil))
	valid := []object{{"containerID": p.id, "ifname": p.ifname}}
	must(t, do("GC", object{"cni.dev/valid-attachments": valid}))
	p.ping(p.addr(false))
	for _, command := range []string{"STATUS", "GC"} {
		ipam["refuse"] = command
		if err := do(command, object{"cni.dev/valid-attachments": valid}); err == nil {
			t.Errorf("%s succeeded, which the IPAM plugin refused", command)
		}
	}
	delete(ipam, "refuse")
	p.del()
	h.clean()

	data, err := os.ReadFile(record)
	must(t, err)
	var commands []string
	for line := range bytes.Lines(data) {
		var c struct {
			Command, ContainerID, Netns, IfName string
			Config                              struct {
				Name, CNIVersion string
				IPAM             object
				Valid            []object `json:"cni.dev/valid-attachments"`
			}
		}
		must(t, json.Unmarshal(line, &c))
		commands = append(commands, c.Command)
		if c.Config.Name != "pods" || c.Config.CNIVersion != "1.1.0" || c.Config.IPAM["record"] != record {
			t.Errorf("%s was called with %s", c.Command, line)
		}
		switch c.Command {
		case "GC":
			if len(c.Config.Valid) != 1 || c.Config.Valid[0]["containerID"] != p.id {
				t.Errorf("GC was told of %v", c.Config.Valid)
			}
		case "ADD", "CHECK", "DEL":
			if c.ContainerID != p.id || c.IfName != p.ifname || c.Netns != p.netns {
				t.Errorf("%s was called for %s %s in %q", c.Command, c.ContainerID, c.IfName, c.Netns)
			}
		}
	}
	if want := []string{"ADD", "CHECK", "STATUS", "GC", "STATUS", "GC", "DEL"}; !slices.Equal(commands, want) {
		t.Errorf("called with %v, want %v", commands, want)
	}
}

// goBuild builds a package of a module, whose directory is told from this project's, into a directory.
func goBuild(t *testing.T, into, module, what string) {
	t.Helper()
	root, err := testenv.Root()
	must(t, err)
	build := exec.Command("go", "build", "-o", into, what)
	build.Dir, build.Env = filepath.Join(root, module), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
}
