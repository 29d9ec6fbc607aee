// Package leak lists what the machine holds of ours: network namespaces, links, pins, mounts, processes, files.
package leak

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/tools/lab"
)

// Dirs are places outside the labs in which Caracal keeps something by default.
var Dirs = []string{"/sys/fs/bpf/caracal", "/run/caracal", "/var/lib/caracal"}

// Machine lists everything of Caracal's and of all labs, sorted; empty on a machine that has neither. Listed are the labs
// (see lab.Leftovers), namespaces that look like a lab's without one, cali* links in the caller's network namespace, Dirs,
// and processes called caracal or caracald.
func Machine() ([]string, error) {
	var out []string
	names, err := lab.Names()
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		out = append(out, lab.Leftovers(n)...)
	}
	entries, err := os.ReadDir(netns.RunDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	for _, e := range entries {
		if looksLikeLab.MatchString(e.Name()) {
			out = append(out, "network namespace "+e.Name())
		}
	}
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "cali") {
			out = append(out, "link "+l.Attrs().Name)
		}
	}
	for _, d := range Dirs {
		if _, err := os.Lstat(d); err == nil {
			out = append(out, "directory "+d)
		}
	}
	comms, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, c := range comms {
		comm, err := os.ReadFile(c)
		if err != nil {
			continue
		}
		if n := strings.TrimSpace(string(comm)); n == "caracal" || n == "caracald" {
			out = append(out, fmt.Sprintf("process %s[%s]", n, filepath.Base(filepath.Dir(c))))
		}
	}
	return unique(out), nil
}

var looksLikeLab = regexp.MustCompile(`^(lab|t[0-9]+n[0-9]+)-(switch|outside|h[0-9]+(-.+)?)$`)

// Mine lists what is left of the labs of this test process (lab.TestName) and the processes that it started and did not
// wait for. Other tests may run on the same machine.
func Mine() []string {
	prefix := fmt.Sprintf("t%dn", os.Getpid())
	labs := map[string]bool{}
	names, err := lab.Names()
	if err != nil {
		return []string{err.Error()}
	}
	entries, _ := os.ReadDir(netns.RunDir)
	for _, e := range entries {
		n, _, _ := strings.Cut(e.Name(), "-")
		names = append(names, n)
	}
	cached, _ := filepath.Glob("/var/lib/cni/results/" + prefix + "*")
	for _, c := range cached {
		n, _, _ := strings.Cut(filepath.Base(c), "-")
		names = append(names, n)
	}
	for _, n := range names {
		if strings.HasPrefix(n, prefix) {
			labs[n] = true
		}
	}
	var out []string
	for n := range labs {
		out = append(out, lab.Leftovers(n)...)
	}
	return unique(append(out, children()...))
}

// children lists this process's children, zombies included.
func children() []string {
	var out []string
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, t := range tasks {
		data, err := os.ReadFile(t)
		if err != nil {
			continue
		}
		for _, pid := range strings.Fields(string(data)) {
			if _, err := strconv.Atoi(pid); err != nil {
				continue
			}
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			out = append(out, fmt.Sprintf("child process %s[%s]", strings.TrimSpace(string(comm)), pid))
		}
	}
	return out
}

func unique(s []string) []string {
	sort.Strings(s)
	var out []string
	for _, v := range s {
		if len(out) == 0 || out[len(out)-1] != v {
			out = append(out, v)
		}
	}
	return out
}
