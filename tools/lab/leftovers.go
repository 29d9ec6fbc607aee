package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
)

// Leftovers lists what is on the machine of a lab of that name, whether it is known to be up or not: namespaces, mounts,
// files, entries of libcni's machine-wide cache and processes with its marker. It is empty after Down.
func Leftovers(name string) []string {
	var out []string
	entries, _ := os.ReadDir(netns.RunDir)
	for _, e := range entries {
		if ownsNetns(name, e.Name()) {
			out = append(out, "network namespace "+e.Name())
		}
	}
	dir := filepath.Join(BaseDir, name)
	if mounts, err := mountsBelow(dir); err != nil {
		out = append(out, err.Error())
	} else {
		for _, m := range mounts {
			out = append(out, "mount "+m)
		}
	}
	if _, err := os.Lstat(dir); err == nil {
		out = append(out, "directory "+dir)
	}
	cached, _ := filepath.Glob("/var/lib/cni/results/" + name + "-*")
	for _, c := range cached {
		out = append(out, "file "+c)
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + cgroupPrefix + name + "-*")
	for _, g := range groups {
		out = append(out, "control group "+g)
	}
	for _, p := range labProcesses(name, nil) {
		out = append(out, "process "+p.String())
	}
	sort.Strings(out)
	return out
}

// ownsNetns tells whether a namespace's name is one that a lab of that name gives.
func ownsNetns(lab, namespace string) bool {
	rest, ok := strings.CutPrefix(namespace, lab+"-")
	return ok && labNetns.MatchString(rest)
}

var labNetns = regexp.MustCompile(`^(switch|outside|h[0-9]+(-.+)?)$`)

// baseline is what a machine had before a test's lab was made.
type baseline struct {
	links map[string]bool
}

func takeBaseline() (baseline, error) {
	b := baseline{links: map[string]bool{}}
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return b, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		b.links[l.Attrs().Name] = true
	}
	return b, nil
}

// newLinks lists links of the calling namespace that were not in the baseline and that a plugin of ours may have made
// there by mistake: cali*, and those that names lists. Others may work on the same machine.
func (b baseline) newLinks(names map[string]bool) ([]string, error) {
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var out []string
	for _, l := range links {
		n := l.Attrs().Name
		if !b.links[n] && (strings.HasPrefix(n, "cali") || names[n]) {
			out = append(out, "link "+n+" in the caller's own namespace")
		}
	}
	return out, nil
}

// heldNamespaces lists what this process itself still holds of namespaces with these inodes: descriptors, and threads
// inside. Either keeps a namespace and all its links alive after its name is gone.
func heldNamespaces(inodes map[uint64]string) []string {
	var out []string
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, e := range fds {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || !strings.HasPrefix(target, "net:[") && !strings.HasPrefix(target, netns.RunDir+"/") {
			continue
		}
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && inodes[st.Ino] != "" {
			out = append(out, fmt.Sprintf("open descriptor %d of namespace %s", fd, inodes[st.Ino]))
		}
	}
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, e := range tasks {
		var st unix.Stat_t
		if unix.Stat("/proc/self/task/"+e.Name()+"/ns/net", &st) == nil && inodes[st.Ino] != "" {
			out = append(out, fmt.Sprintf("thread %s in namespace %s", e.Name(), inodes[st.Ino]))
		}
	}
	return out
}
