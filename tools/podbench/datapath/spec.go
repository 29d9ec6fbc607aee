package datapath

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// DefaultCNIPath is where plugins are looked for unless told otherwise: the upstream place, then Debian's.
const DefaultCNIPath = "/opt/cni/bin:/usr/lib/cni"

// DirPlaceholder in a CNI configuration is replaced by a directory that is private to the node under test.
const DirPlaceholder = "@DIR@"

const subnetPlaceholder = "@SUBNET@" // in the built-in configurations

var (
	// ErrPluginMissing says that a plugin's binary is in none of the directories of the CNI path.
	ErrPluginMissing = errors.New("CNI plugin not found")
	// ErrBadConflist says that a file is not a usable CNI network configuration list.
	ErrBadConflist = errors.New("unusable CNI configuration")
	// ErrUnknown says that a name is none of the built-in datapaths.
	ErrUnknown = errors.New("unknown datapath")
)

// Kinds of datapaths.
const (
	KindVeth     = "veth"     // two pods, one veth pair
	KindRedirect = "redirect" // two pods, two veth pairs, a program that only redirects
	KindCNI      = "cni"      // pods wired by a CNI plugin
)

// Names lists the built-in datapaths, in the order of the table.
func Names() []string {
	return []string{"veth", "redirect", "redirect-clsact", "bridge", "ptp", "ptp-iptables", "ptp-nft", "caracal"}
}

// Spec says how to build a datapath.
type Spec struct {
	Name    string
	Kind    string
	Attach  string   // redirect: "tcx", "clsact" or "" for TCX with clsact as the fallback
	Beside  int      // cni: pods that exist beside those that are measured
	Hosts   int      // cni: 2: each of those that are measured has a host of its own; 0 or 1: one host for both
	Rules   int      // cni: policy rules in force between the pods that are measured, of which the last allows it
	CNIPath []string // cni: directories of plugins, first match wins

	conf map[string]any // cni: the configuration list, with DirPlaceholder and subnetPlaceholder in it
	host int            // which of Hosts

	filter filter // cni: what enforces Rules; nil: the plugin
}

// Options of Builtin and FromConflist.
type Options struct {
	CNIPath string // directories separated by colons; empty: DefaultCNIPath
	Caracal string // path of the caracal plugin's binary; its base name must be its CNI type, "caracal"
}

var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]{0,31}$`)

// Builtin returns one of Names; or NAME+N: one of them that is a plugin's, with N pods beside those that are measured; or
// NAME/2: ptp or caracal, on two hosts joined by a veth pair; or NAME@N: caracal, ptp-iptables or ptp-nft, with N rules.
// The error is ErrUnknown, ErrPluginMissing or ErrFilterMissing.
func Builtin(name string, opts Options) (Spec, error) {
	base, count, ruled := strings.Cut(name, "@")
	spec, err := unruled(base, opts)
	if err != nil {
		return spec, err
	}
	can := spec.filter != nil || spec.usesCaracal() && spec.Hosts < 2
	switch {
	case ruled && !can:
		return Spec{}, fmt.Errorf("%w %q: rules can have caracal, on one host, ptp-iptables and ptp-nft", ErrUnknown, name)
	case ruled:
		spec.Name = name
		if spec.Rules, err = strconv.Atoi(count); err != nil || spec.Rules < 1 || spec.Rules > MaxRules {
			return Spec{}, fmt.Errorf("%w %q: a number of rules belongs behind the '@', 1 to %d", ErrUnknown, name, MaxRules)
		}
	case spec.filter != nil:
		return Spec{}, fmt.Errorf("%w %q: say how many rules, %s@1000; without rules it is ptp", ErrUnknown, name, name)
	}
	return spec, nil
}

func unruled(name string, opts Options) (Spec, error) {
	if base, ok := strings.CutSuffix(name, "/2"); ok {
		spec, err := builtin(base, opts)
		if err == nil && base != "ptp" && base != "caracal" {
			err = fmt.Errorf("%w %q: of two hosts there are ptp and caracal", ErrUnknown, name)
		}
		spec.Name, spec.Hosts = name, 2
		return spec, err
	}
	base, more, full := strings.Cut(name, "+")
	if !full {
		return builtin(name, opts)
	}
	n, err := strconv.ParseUint(more, 10, 16)
	if err != nil {
		return Spec{}, fmt.Errorf("%w %q: a number of pods belongs behind the '+', at most 65535", ErrUnknown, name)
	}
	spec, err := builtin(base, opts)
	if err == nil && spec.Kind != KindCNI {
		err = fmt.Errorf("%w %q: %s has no other pods", ErrUnknown, name, base)
	}
	spec.Name, spec.Beside = name, int(n)
	return spec, err
}

func builtin(name string, opts Options) (Spec, error) {
	path := filepath.SplitList(opts.CNIPath)
	if len(path) == 0 {
		path = filepath.SplitList(DefaultCNIPath)
	}
	hostLocal := map[string]any{
		"type":    "host-local",
		"dataDir": DirPlaceholder + "/ipam",
		"ranges":  []any{[]any{map[string]any{"subnet": subnetPlaceholder}}},
		"routes":  []any{map[string]any{"dst": "0.0.0.0/0"}},
	}
	spec := Spec{Name: name, Kind: KindCNI, CNIPath: path}
	var plugin map[string]any
	version := "1.0.0"
	switch name {
	case "veth":
		return Spec{Name: name, Kind: KindVeth}, nil
	case "redirect":
		return Spec{Name: name, Kind: KindRedirect}, nil
	case "redirect-clsact":
		return Spec{Name: name, Kind: KindRedirect, Attach: AttachClsact}, nil
	case "bridge":
		plugin = map[string]any{"type": "bridge", "bridge": "pb0", "isGateway": true, "ipMasq": false, "ipam": hostLocal}
	case "ptp", "ptp-iptables", "ptp-nft":
		var err error
		switch name {
		case "ptp-iptables":
			spec.filter, err = byIPTables, needTables()
		case "ptp-nft":
			spec.filter, err = byNFT, needNFT()
		}
		if err != nil {
			return Spec{}, fmt.Errorf("datapath %s: %w", name, err)
		}
		plugin = map[string]any{"type": "ptp", "ipMasq": false, "ipam": hostLocal}
	case "caracal":
		if filepath.Base(opts.Caracal) != "caracal" {
			return Spec{}, fmt.Errorf("%w: the caracal binary must be called caracal, as its CNI type, not %q", ErrPluginMissing, opts.Caracal)
		}
		spec.CNIPath = append([]string{filepath.Dir(opts.Caracal)}, path...)
		version = "1.1.0"
		plugin = map[string]any{
			"type":      "caracal",
			"log_level": "warning",
			"state_dir": DirPlaceholder + "/state",
			"bpffs_dir": DirPlaceholder + "/bpf/caracal",
			"ipam":      map[string]any{"type": "caracal-ipam", "ipv4_pools": []any{subnetPlaceholder}},
		}
	default:
		return Spec{}, fmt.Errorf("%w %q: known are %s; others by --conflist NAME=FILE", ErrUnknown, name, strings.Join(Names(), ", "))
	}
	spec.conf = map[string]any{"cniVersion": version, "name": "pb-" + name, "plugins": []any{plugin}}
	return spec, spec.check()
}

// FromConflist returns the datapath of arg, "NAME=FILE" or "FILE" (named after the file), a CNI network configuration
// list or a single plugin's configuration. State that would be shared with the machine is moved into the node's
// private directory where the key for it is known: host-local's dataDir, caracal's state_dir and bpffs_dir; others
// can be written with DirPlaceholder. The error is ErrBadConflist or ErrPluginMissing.
func FromConflist(arg string, opts Options) (Spec, error) {
	name, file, named := strings.Cut(arg, "=")
	if !named {
		file = arg
		name = strings.ToLower(strings.TrimSuffix(filepath.Base(file), filepath.Ext(file)))
	}
	if !validName.MatchString(name) {
		return Spec{}, fmt.Errorf("%w: name %q must be 1 to 32 of a-z, 0-9, '-', '_', '.', starting with a letter or digit", ErrBadConflist, name)
	}
	if slices.Contains(Names(), name) && named {
		return Spec{}, fmt.Errorf("%w: the name %q is a built-in datapath's", ErrBadConflist, name)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return Spec{}, fmt.Errorf("%w: %w", ErrBadConflist, err)
	}
	var conf map[string]any
	if err := json.Unmarshal(raw, &conf); err != nil {
		return Spec{}, fmt.Errorf("%w: %s: %w", ErrBadConflist, file, err)
	}
	if _, single := conf["type"]; single {
		conf = map[string]any{"cniVersion": conf["cniVersion"], "name": conf["name"], "plugins": []any{conf}}
	}
	path := opts.CNIPath
	if path == "" {
		path = DefaultCNIPath
	}
	spec := Spec{Name: name, Kind: KindCNI, CNIPath: filepath.SplitList(path), conf: conf}
	if opts.Caracal != "" {
		spec.CNIPath = append(spec.CNIPath, filepath.Dir(opts.Caracal))
	}
	if err := spec.check(); err != nil {
		if errors.Is(err, ErrBadConflist) {
			err = fmt.Errorf("%s: %w", file, err)
		}
		return Spec{}, err
	}
	for _, p := range spec.plugins() {
		setDefault := func(m map[string]any, key, value string) {
			if _, set := m[key]; !set {
				m[key] = value
			}
		}
		if p["type"] == "caracal" {
			setDefault(p, "state_dir", DirPlaceholder+"/state")
			setDefault(p, "bpffs_dir", DirPlaceholder+"/bpf/caracal")
		}
		if ipam, ok := p["ipam"].(map[string]any); ok && ipam["type"] == "host-local" {
			setDefault(ipam, "dataDir", DirPlaceholder+"/ipam")
		}
	}
	return spec, nil
}

// Select returns the built-in datapaths of names and the conflists, in that order, each name once.
func Select(names, conflists []string, opts Options) ([]Spec, error) {
	var specs []Spec
	add := func(s Spec, err error) error {
		if err != nil {
			return err
		}
		if slices.ContainsFunc(specs, func(o Spec) bool { return o.Name == s.Name }) {
			return fmt.Errorf("datapath %q is given twice", s.Name)
		}
		specs = append(specs, s)
		return nil
	}
	for _, name := range names {
		if err := add(Builtin(name, opts)); err != nil {
			return nil, err
		}
	}
	for _, c := range conflists {
		if err := add(FromConflist(c, opts)); err != nil {
			return nil, err
		}
	}
	if len(specs) == 0 {
		return nil, errors.New("no datapath to measure: give --datapath or --conflist")
	}
	return specs, nil
}

// plugins returns the chain's plugin configurations; writing to them changes the spec.
func (s Spec) plugins() []map[string]any {
	var out []map[string]any
	list, _ := s.conf["plugins"].([]any)
	for _, p := range list {
		if m, ok := p.(map[string]any); ok {
			out = append(out, m)
		}
	}
	return out
}

// usesCaracal tells whether the chain's main plugin is ours: one that attaches programs, in the background too.
func (s Spec) usesCaracal() bool {
	p := s.plugins()
	return len(p) > 0 && p[0]["type"] == "caracal"
}

// types lists the plugins a chain executes, main and IPAM.
func (s Spec) types() []string {
	var out []string
	for _, p := range s.plugins() {
		kind, _ := p["type"].(string)
		out = append(out, kind)
		if ipam, ok := p["ipam"].(map[string]any); ok {
			// Our own IPAM runs inside the plugin.
			if t, ok := ipam["type"].(string); ok && t != "" && kind != "caracal" {
				out = append(out, t)
			}
		}
	}
	return out
}

// check finds out before anything is built whether the configuration can work.
func (s Spec) check() error {
	if s.Kind != KindCNI {
		return nil
	}
	if _, err := s.list("/nonexistent"); err != nil {
		return err
	}
	for _, t := range s.types() {
		if _, err := s.find(t); err != nil {
			return err
		}
	}
	return nil
}

// subnet is where the host's pods get their addresses.
func (s Spec) subnet() netip.Prefix {
	if s.Hosts < 2 {
		return netip.MustParsePrefix("10.244.0.0/16")
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(s.host) * 128, 0}), 17)
}

// list renders the configuration for a node whose private directory is dir.
func (s Spec) list(dir string) (*libcni.NetworkConfigList, error) {
	raw, err := json.Marshal(s.conf)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadConflist, err)
	}
	replace := strings.NewReplacer(DirPlaceholder, dir, subnetPlaceholder, s.subnet().String())
	list, err := libcni.NetworkConfFromBytes([]byte(replace.Replace(string(raw))))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadConflist, err)
	}
	return list, nil
}

// debianPlugins are the binaries of Debian's package containernetworking-plugins.
var debianPlugins = []string{
	"bandwidth", "bridge", "dhcp", "firewall", "host-device", "host-local", "ipvlan", "loopback", "macvlan",
	"portmap", "ptp", "sbr", "static", "tuning", "vlan", "vrf",
}

// find returns the path of a plugin's binary.
func (s Spec) find(plugin string) (string, error) {
	for _, dir := range s.CNIPath {
		file := filepath.Join(dir, plugin)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	hint := "give its directory by --cni-path"
	switch {
	case plugin == "caracal":
		hint = "build it (make build) or give its path by --caracal"
	case slices.Contains(debianPlugins, plugin):
		hint = "install the package containernetworking-plugins or give its directory by --cni-path"
	}
	return "", fmt.Errorf("%w: %q (datapath %s) is not in %s: %s", ErrPluginMissing, plugin, s.Name, strings.Join(s.CNIPath, ":"), hint)
}
