package ctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/cni"
	procs "github.com/caracal-net/caracal/internal/holder"
)

// network is a file of the directory in which runtimes look for networks.
type network struct {
	file  string
	data  []byte
	about verdict
}

// own tells whether it is one of ours.
func (n network) own() bool {
	return slices.ContainsFunc(n.about.Plugins, func(kind string) bool { return slices.Contains(ownTypes, kind) })
}

// networks reads the files that libcni takes for configurations, in the order in which runtimes do.
func (d *doctor) networks() ([]network, error) {
	entries, err := os.ReadDir(d.confDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for networks: %w", err)
	}
	var all []network
	for _, e := range entries {
		if e.IsDir() || !slices.Contains(networkExtensions, filepath.Ext(e.Name())) {
			continue
		}
		f, err := os.Open(filepath.Join(d.confDir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("read network: %w", err)
		}
		data, err := io.ReadAll(io.LimitReader(f, cni.MaxConfig))
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("read network: %w", err)
		}
		all = append(all, network{e.Name(), data, validate(data)})
	}
	return all, nil
}

// checkConfiguration: the networks that a runtime is told of can be read, ours is the one that it takes, and its plugins are there.
func (d *doctor) checkConfiguration() error {
	all, err := d.networks()
	if err != nil {
		return err
	}
	var ours []string
	first, named := "", make(map[string]string)
	for _, n := range all {
		path := filepath.Join(d.confDir, n.file)
		remedy := "caracalctl validate " + path + " names all that is wrong"
		for _, f := range n.about.Findings {
			if f.Severity == "error" && (n.own() || n.about.Kind == "") {
				where := fmt.Sprintf("%s:%d:%d: ", path, f.Line, f.Column)
				if f.Where != "" {
					where += f.Where + ": "
				}
				d.found(statusFail, printable(n.file), remedy, "%s%s", where, printable(f.Message))
				break
			}
		}
		if len(n.about.Plugins) > 0 && first == "" {
			first = n.file
		}
		if n.own() {
			ours = append(ours, n.file)
			if other := named[n.about.Name]; other != "" {
				d.found(statusWarn, printable(n.file), "remove one of them, or give it another name", "%s is of the network %s too", printable(other), n.about.Name)
			}
			named[n.about.Name] = n.file
			d.wantPlugins(n)
			d.wantSameDirs(n)
		}
	}
	if len(ours) > 0 && first != ours[0] {
		d.found(statusWarn, printable(ours[0]), "rename one of them, if a runtime is to take ours by itself",
			"%s comes first: runtimes that take the first network alone (containerd, CRI-O) don't take this one", printable(first))
	}
	switch {
	case !d.silent():
	case len(ours) == 0:
		d.skipped("no network in %s is Caracal's; --conf-dir, if it is another", d.confDir)
	default:
		d.ok("%s is valid, and its plugins are in %s", strings.Join(ours, ", "), d.binDir)
	}
	return nil
}

// inPod tells whether we run in a pod of a cluster: not all directories of the node are there.
func inPod() bool { return os.Getenv("KUBERNETES_SERVICE_HOST") != "" }

// wantPlugins looks for the programs that a network names.
func (d *doctor) wantPlugins(n network) {
	if _, err := os.Stat(d.binDir); inPod() && errors.Is(err, fs.ErrNotExist) {
		d.found(statusSkipped, "plugins", "", "this pod has no %s", d.binDir)
		return
	}
	kinds := slices.Clone(n.about.Plugins)
	for _, p := range n.entries() {
		if !slices.Contains(ownIPAMs, p.IPAM.Type) || !slices.Contains(ownTypes, p.Type) { // of which the IPAM is the same program
			kinds = append(kinds, p.IPAM.Type)
		}
	}
	slices.Sort(kinds)
	for _, kind := range slices.Compact(kinds) {
		if kind == "" || slices.ContainsFunc(filepath.SplitList(d.binDir), func(dir string) bool {
			path := filepath.Join(dir, kind)
			st, err := os.Stat(path)
			return err == nil && st.Mode().IsRegular() && unix.Access(path, unix.X_OK) == nil
		}) {
			continue
		}
		d.found(statusFail, printable(kind), "caracalctl install puts ours there, containernetworking-plugins the usual ones; --bin-dir, if it is another",
			"%s names the plugin, but no program of that name is in %s", printable(n.file), d.binDir)
	}
}

// entry is what doctor wants to know of a plugin's entry.
type entry struct {
	Type        string `json:"type"`
	StateDir    string `json:"state_dir"`
	BPFFSDir    string `json:"bpffs_dir"`
	LogFilePath string `json:"log_file_path"`
	IPAM        struct {
		Type string `json:"type"`
	} `json:"ipam"`
}

func (n network) entries() []entry {
	var list struct{ Plugins []json.RawMessage }
	if json.Unmarshal(n.data, &list) != nil || len(list.Plugins) == 0 {
		list.Plugins = []json.RawMessage{n.data}
	}
	all := make([]entry, len(list.Plugins))
	for i, raw := range list.Plugins {
		_ = json.Unmarshal(raw, &all[i]) // what is wrong with it is said elsewhere
	}
	return all
}

// wantSameDirs makes sure that doctor looks where the plugin writes.
func (d *doctor) wantSameDirs(n network) {
	for _, e := range n.entries() {
		if !slices.Contains(ownTypes, e.Type) {
			continue
		}
		for _, c := range []struct{ key, theirs, standard, flag, ours string }{
			{"state_dir", e.StateDir, cni.DefaultStateDir, "--state-dir", d.stateDir},
			{"bpffs_dir", e.BPFFSDir, cni.DefaultBPFFSDir, "--bpffs-dir", d.bpffsDir},
		} {
			if c.theirs == "" {
				c.theirs = c.standard
			}
			if filepath.Clean(c.theirs) != c.ours {
				d.found(statusWarn, printable(n.file), "caracalctl "+c.flag+" "+printable(c.theirs)+", and caracald likewise",
					"its %s is %s, but doctor looks at %s", c.key, printable(c.theirs), c.ours)
			}
		}
	}
}

// full is when a file system counts as full: a node's databases are some MB.
const full = 16 << 20 // bytes

// checkDirectories: plugin and agent can write where they must, and nothing lies there that had to be put aside.
func (d *doctor) checkDirectories() error {
	d.wantWritable(d.stateDir, "state_dir in the conflist, --state-dir of caracald", true)
	if dir := filepath.Dir(d.bpffsDir); d.mapsErr == nil || !errors.Is(d.mapsErr, errNotLoaded) { // else the kernel's check tells
		d.wantWritable(dir, "bpffs_dir in the conflist, --bpffs-dir of caracald", false)
	}
	d.wantWritable(filepath.Dir(d.socket), "--socket of caracald, agent_socket in the conflist", false)
	all, err := d.networks()
	if err != nil {
		return err
	}
	for _, n := range all {
		for _, e := range n.entries() {
			if slices.Contains(ownTypes, e.Type) && e.LogFilePath != "" && !inPod() {
				d.wantWritable(filepath.Dir(e.LogFilePath), "log_file_path in "+printable(n.file), true)
			}
		}
	}
	for _, b := range []struct{ name, what, remedy string }{
		{"policy.broken", "policy.db, what was known last of policy, could not be read and was moved there", "look at the disk (dmesg); an agent knows policy anew (systemctl start caracald), and the file can be removed then"},
		{"node.broken", "node.db could not be read after the machine went down and was moved there", "look at the disk (dmesg), and remove the file"},
	} {
		path := filepath.Join(d.stateDir, b.name)
		if st, err := os.Lstat(path); err == nil {
			d.found(statusWarn, b.name, b.remedy, "%s, of %s: %s", path, st.ModTime().UTC().Format(time.RFC3339), b.what)
		}
	}
	if d.silent() {
		d.ok("what must be written can be")
	}
	return nil
}

// wantWritable makes sure that a directory can be written, or made. option names another; disk: it is one's.
func (d *doctor) wantWritable(dir, option string, disk bool) {
	there := dir
	st, err := os.Stat(there)
	for errors.Is(err, fs.ErrNotExist) && there != "/" {
		there = filepath.Dir(there)
		st, err = os.Stat(there)
	}
	if err == nil && !st.IsDir() {
		err = fmt.Errorf("%s is a file", there)
	} else if err == nil {
		err = unix.Access(there, unix.W_OK|unix.X_OK)
	}
	var space unix.Statfs_t
	switch {
	case err != nil:
		d.found(statusFail, dir, "make it writable for who runs the plugin and caracald, or name another ("+option+")", "%s can't be written: %v", dir, err)
	case disk && unix.Statfs(there, &space) == nil && space.Bavail*uint64(space.Bsize) < full:
		d.found(statusFail, dir, "make room, or name another ("+option+")", "%s: %d kB are left on its file system", dir, space.Bavail*uint64(space.Bsize)>>10)
	}
}

// wantPorts finds who has the ports that an agent wants. One that runs says so itself.
func (d *doctor) wantPorts() {
	for _, p := range []struct{ address, what, flag string }{
		{agent.DefaultHealth, "/health", "--health"}, {agent.DefaultMetrics, "/metrics", "--metrics"},
		{fmt.Sprintf(":%d", bgp.DefaultPort), "BGP", "--bgp-port"},
	} {
		var port int
		if _, err := fmt.Sscanf(p.address[strings.LastIndexByte(p.address, ':'):], ":%d", &port); err != nil {
			continue
		}
		if who := procs.Port("tcp", port); who != "" {
			d.found(statusWarn, fmt.Sprintf("port %d", port), "end that, or give caracald another ("+p.flag+")", "%s has the port that caracald would take for %s", who, p.what)
		}
	}
}
