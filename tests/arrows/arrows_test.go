// Package arrows holds the project's import arrows, as docs/ARCHITECTURE.md draws them.
package arrows

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/caracal-net/caracal"

// may says which of our rooms a room imports. internal is a leaf that everyone may import; cmd, tests and tools may
// import everything.
var may = map[string][]string{
	"bpf":     {},
	"api":     {},
	"deploy":  {},
	"maps":    {"bpf"},
	"loader":  {"bpf"},
	"node":    {"api"},
	"ipam":    {"api", "node"},
	"store":   {"api", "kube"},
	"kube":    {"store", "api"},
	"policy":  {"api"},
	"commit":  {"maps", "node", "api", "policy"},
	"bgp":     {},
	"enforce": {"maps", "node", "api", "policy", "commit"},
	"whatif":  {"loader", "maps", "policy", "commit"},
	"agent":   {"bgp", "store", "cni", "loader", "maps", "ipam", "node", "policy", "commit", "enforce", "api"},
	"docker":  {"cni", "ipam", "node", "store", "api"},
	"cni":     {"loader", "maps", "ipam", "node", "policy", "commit", "enforce", "api"},
}

// owners says which rooms may import a third party's library.
var owners = map[string][]string{
	"github.com/cilium/ebpf":          {"bpf", "maps", "loader"},
	"github.com/vishvananda/netlink":  {"cni", "internal", "agent"},
	"go.etcd.io/bbolt":                {"node", "store", "enforce", "internal"},
	"github.com/osrg/gobgp":           {"bgp"},
	"go.etcd.io/etcd":                 {"store"},
	"k8s.io/client-go":                {"kube"},
	"k8s.io/apimachinery":             {"kube"},
	"k8s.io/api":                      {"kube"},
	"github.com/containernetworking/": {"cni"},
	"github.com/docker/":              {"docker"},
}

// neverInPlugin must not be linked into the CNI plugin: its start-up time and size are part of ADD's latency.
var neverInPlugin = []string{"github.com/osrg/gobgp", "go.etcd.io/etcd", "k8s.io/", "github.com/spf13/cobra", "github.com/docker/", "go.opentelemetry.io/"}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Deps"}, args...)...)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// room is the top-level directory of one of our packages, "" for others'.
func room(path string) string {
	rest, ok := strings.CutPrefix(path, module+"/")
	if !ok {
		return ""
	}
	r, _, _ := strings.Cut(rest, "/")
	return r
}

func TestArrows(t *testing.T) {
	for _, p := range list(t, "./...") {
		from := room(p.ImportPath)
		if slices.Contains([]string{"cmd", "tests", "tools"}, from) || p.ImportPath == module+"/bpf/gen" {
			continue
		}
		allowed, known := may[from]
		if !known && from != "internal" {
			t.Errorf("%s is in a room without arrows; add it to this test and to docs/ARCHITECTURE.md", p.ImportPath)
		}
		for _, i := range p.Imports {
			if to := room(i); to != "" && to != from && to != "internal" && !slices.Contains(allowed, to) {
				t.Errorf("%s imports %s: no such arrow", p.ImportPath, i)
			}
			for library, rooms := range owners {
				if strings.HasPrefix(i, library) && !slices.Contains(rooms, from) {
					t.Errorf("%s imports %s, which belongs to %v", p.ImportPath, i, rooms)
				}
			}
		}
	}
}

func TestPluginLinksNothingHeavy(t *testing.T) {
	for _, p := range list(t, "./cmd/caracal") {
		for _, d := range p.Deps {
			for _, heavy := range neverInPlugin {
				if strings.HasPrefix(d, heavy) {
					t.Errorf("the plugin links %s", d)
				}
			}
		}
	}
}
