package ctl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/nl"
)

// leftover is something of Calico's on this host.
type leftover struct {
	Kind  string `json:"kind"` // firewall, ipset, nftables, route, interface, file
	Name  string `json:"name"`
	State string `json:"state"` // left, removed, kept
	Why   string `json:"why,omitempty"`

	remove func(context.Context) error
}

// calicoFiles are what Calico's installer and agent keep on a host. The network configuration and its plugins are not among them:
// Caracal may work under their names.
var calicoFiles = []string{"/var/lib/calico", "/var/run/calico", "/etc/cni/net.d/calico-kubeconfig", "/etc/cni/net.d/calico-tls"}

// calicoProcesses lists Calico's own programs that run in this network namespace.
func calicoProcesses() ([]string, error) {
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, f := range files {
		comm, err := os.ReadFile(f)
		name := strings.TrimSpace(string(comm))
		if err != nil || !slices.Contains([]string{"calico-node", "calico-felix", "bird", "bird6", "confd"}, name) {
			continue
		}
		if there, err := os.Readlink(filepath.Join(filepath.Dir(f), "ns/net")); err == nil && there == here {
			found = append(found, fmt.Sprintf("%s (process %s)", name, filepath.Base(filepath.Dir(f))))
		}
	}
	return found, nil
}

// left lists what is left of Calico on this host, and how each is removed. The routes in taken are not: they will be Caracal's.
func (o *adoptOptions) left(ctx context.Context, pools []api.IPPool, taken []netip.Prefix) ([]leftover, error) {
	all := []leftover{}
	for _, find := range []func(context.Context) ([]leftover, error){
		leftFirewall, leftSets, leftTables, leftLinks,
		func(context.Context) ([]leftover, error) { return leftRoutes(pools, taken) },
		func(context.Context) ([]leftover, error) { return leftFiles() },
	} {
		found, err := find(ctx)
		if err != nil {
			return all, err
		}
		all = append(all, found...)
	}
	for i := range all {
		all[i].State = "left"
	}
	return all, nil
}

// cleanUp removes what can be removed, and notes it. It goes on after an error and returns all.
func (o *adoptOptions) cleanUp(ctx context.Context, all []leftover) error {
	var errs []error
	for i := range all {
		if all[i].remove == nil {
			all[i].State = "kept"
			continue
		}
		if err := all[i].remove(ctx); err != nil {
			errs = append(errs, fmt.Errorf("remove %s %s: %w", all[i].Kind, all[i].Name, err))
			continue
		}
		all[i].State = "removed"
	}
	return errors.Join(errs...)
}

// output runs a program that may not be there: then it has left nothing either.
func output(ctx context.Context, name string, args ...string) (string, error) {
	if _, err := exec.LookPath(name); err != nil {
		return "", nil
	}
	var errs bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return string(out), nil
}

// leftFirewall finds chains of iptables whose names Calico's begin with.
func leftFirewall(ctx context.Context) ([]leftover, error) {
	var all []leftover
	for _, program := range []string{"iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft"} {
		saved, err := output(ctx, program+"-save")
		if err != nil {
			continue // a kernel without that firewall has none of its rules
		}
		restore, chains := withoutCalico(saved)
		if chains > 0 {
			all = append(all, leftover{
				Kind: "firewall", Name: fmt.Sprintf("%d chains of %s", chains, program),
				Why:    "they filter what goes through the host's stack: what they do not know is dropped",
				remove: func(ctx context.Context) error { return feed(ctx, restore, program+"-restore", "--noflush") },
			})
		}
	}
	return all, nil
}

// withoutCalico turns what iptables-save wrote into what iptables-restore --noflush takes to remove Calico's chains and the rules
// that lead to them, and counts the chains.
func withoutCalico(saved string) (restore string, chains int) {
	var b strings.Builder
	var names, rules []string
	end := func() {
		for _, n := range names {
			fmt.Fprintf(&b, ":%s - [0:0]\n", n) // empties it
		}
		for _, r := range rules {
			fmt.Fprintln(&b, r)
		}
		for _, n := range names {
			fmt.Fprintf(&b, "-X %s\n", n)
		}
		chains += len(names)
		names, rules = nil, nil
	}
	for line := range strings.SplitSeq(saved, "\n") {
		words := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "*"):
			fmt.Fprintln(&b, line)
		case line == "COMMIT":
			end()
			fmt.Fprintln(&b, line)
		case strings.HasPrefix(line, ":cali-"):
			names = append(names, strings.TrimPrefix(words[0], ":"))
		case len(words) > 2 && words[0] == "-A" && !strings.HasPrefix(words[1], "cali-") && leadsToCalico(words):
			rules = append(rules, "-D"+strings.TrimPrefix(line, "-A"))
		}
	}
	return b.String(), chains
}

// leadsToCalico tells whether a rule is one that Calico has put into a chain of others: it marks them by a comment.
func leadsToCalico(words []string) bool {
	for i, w := range words[:len(words)-1] {
		if (w == "-j" || w == "-g") && strings.HasPrefix(words[i+1], "cali-") || w == "--comment" && strings.HasPrefix(words[i+1], `"cali:`) {
			return true
		}
	}
	return false
}

func feed(ctx context.Context, text, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// leftSets finds ipsets of Calico's. They go after the rules that name them.
func leftSets(ctx context.Context) ([]leftover, error) {
	names, err := output(ctx, "ipset", "list", "-n")
	if err != nil {
		return nil, nil // a kernel without ipsets
	}
	var found []string
	for name := range strings.FieldsSeq(names) {
		if strings.HasPrefix(name, "cali4") || strings.HasPrefix(name, "cali6") {
			found = append(found, name)
		}
	}
	if len(found) == 0 {
		return nil, nil
	}
	return []leftover{{Kind: "ipset", Name: fmt.Sprintf("%d sets", len(found)), remove: func(ctx context.Context) error {
		var errs []error
		for _, name := range found {
			_, err := output(ctx, "ipset", "destroy", name)
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}}}, nil
}

// leftTables finds tables of nftables that Calico's agent makes in that mode.
func leftTables(ctx context.Context) ([]leftover, error) {
	tables, err := output(ctx, "nft", "list", "tables")
	if err != nil {
		return nil, nil // a kernel without nftables
	}
	var all []leftover
	for line := range strings.SplitSeq(tables, "\n") {
		words := strings.Fields(line)
		if len(words) == 3 && words[2] == "calico" {
			all = append(all, leftover{Kind: "nftables", Name: words[1] + " " + words[2], remove: func(ctx context.Context) error {
				_, err := output(ctx, "nft", "delete", "table", words[1], words[2])
				return err
			}})
		}
	}
	return all, nil
}

// leftLinks finds the interfaces of Calico's tunnels, and the pair of its eBPF dataplane.
func leftLinks(context.Context) ([]leftover, error) {
	var all []leftover
	for _, name := range cni.CalicoTunnels {
		l, err := netlink.LinkByName(name)
		if nl.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for %s: %w", name, err)
		}
		addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", name, err)
		}
		left := leftover{Kind: "interface", Name: name}
		if name == "tunl0" { // the kernel's own, which comes with its module
			if len(addrs) == 0 {
				continue
			}
			left.remove = func(context.Context) error {
				var errs []error
				for _, addr := range addrs {
					errs = append(errs, netlink.AddrDel(l, &addr))
				}
				return errors.Join(append(errs, netlink.LinkSetDown(l))...)
			}
		} else {
			left.remove = func(context.Context) error { return netlink.LinkDel(l) }
		}
		all = append(all, left)
	}
	return all, nil
}

// leftRoutes finds routes in the pools that BIRD or Calico's agent has made, and that nobody has made Caracal's.
func leftRoutes(pools []api.IPPool, taken []netip.Prefix) ([]leftover, error) {
	const felix = 80 // DeviceRouteProtocol's default, and RemoteRouteProtocol's
	var all []leftover
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := nl.Dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			prefix, ok := nl.Prefix(r.Dst)
			if !ok || r.Protocol != unix.RTPROT_BIRD && r.Protocol != felix {
				continue
			}
			if slices.Contains(taken, prefix) || !slices.ContainsFunc(pools, func(p api.IPPool) bool { return p.CIDR.Bits() <= prefix.Bits() && p.CIDR.Contains(prefix.Addr()) }) {
				continue
			}
			all = append(all, leftover{Kind: "route", Name: prefix.String(), remove: func(context.Context) error {
				if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
					return err
				}
				return nil
			}})
		}
	}
	return all, nil
}

// leftFiles finds files of Calico's. The configuration of the network stays: it names the plugin that is to be called.
func leftFiles() ([]leftover, error) {
	var all []leftover
	for _, path := range calicoFiles {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		all = append(all, leftover{Kind: "file", Name: path, remove: func(context.Context) error { return os.RemoveAll(path) }})
	}
	configs, err := filepath.Glob("/etc/cni/net.d/*calico*.conf*")
	if err != nil {
		return nil, err
	}
	for _, path := range configs {
		all = append(all, leftover{Kind: "file", Name: path, Why: "the network's configuration, which Caracal's plugin takes as it is; a pod is known by its network's name"})
	}
	return all, nil
}
