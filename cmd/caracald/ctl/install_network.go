package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/store"
)

// networkExtensions are what the names of files end with that libcni takes for networks.
var networkExtensions = []string{".conf", ".conflist", ".json"}

// ipPools are the pools that were asked for.
func (o *installOptions) ipPools() ([]api.IPPool, error) {
	var pools []api.IPPool
	families := make(map[bool]bool)
	for _, s := range o.pools {
		cidr, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is not a CIDR such as %s", o.by("pool"), s, defaultPool)
		}
		p, err := api.IPPool{CIDR: cidr, NATOutgoing: o.masquerade, VXLANMode: o.vxlan}.Defaulted()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.by("pool"), err)
		}
		if err := p.Complete(""); err != nil {
			return nil, fmt.Errorf("%s: %w", o.by("vxlan"), err)
		}
		if v6 := cidr.Addr().Is6(); families[v6] {
			return nil, fmt.Errorf("%s: two pools of one family; install makes one, caracalctl apply makes more", o.by("pool"))
		} else {
			families[v6] = true
		}
		pools = append(pools, p)
	}
	return pools, nil
}

// network is the file for the runtimes, checked.
func (o *installOptions) network(cmd *cobra.Command, pools []api.IPPool) ([]byte, error) {
	text, source, err := o.template()
	if err != nil {
		return nil, err
	}
	if text == nil {
		source = "the network that install writes"
		if len(pools) == 0 && !o.clustered() {
			return nil, fmt.Errorf("%s: no pool, and no datastore that has one", o.by("pool"))
		}
		if text, err = o.writeNetwork(cmd, pools); err != nil {
			return nil, err
		}
	}
	if len(text) > cni.MaxConfig {
		return nil, fmt.Errorf("%s: larger than %d bytes, the most that the plugin reads", source, cni.MaxConfig)
	}
	v := validate(text)
	var errs []error
	for _, f := range v.Findings {
		where := strings.TrimPrefix(f.Where+": ", ": ")
		switch f.Severity {
		case "error":
			errs = append(errs, fmt.Errorf("%s, line %d, column %d: %s%s", source, f.Line, f.Column, where, f.Message))
		default:
			warn(cmd, "%s, line %d, column %d: %s%s", source, f.Line, f.Column, where, f.Message)
		}
	}
	all := programs(text)
	switch {
	case len(errs) > 0:
		return nil, errors.Join(errs...)
	case !slices.ContainsFunc(ownTypes, func(t string) bool { return slices.Contains(all, t) }):
		return nil, fmt.Errorf("%s: its plugins are %s; none is %s", source, strings.Join(all, ", "), oneOf(ownTypes))
	case (v.Kind == "list") != (filepath.Ext(o.confName) == ".conflist"):
		return nil, fmt.Errorf("%s: a list of plugins is in a file that ends with .conflist, a single plugin in one that ends with .conf; %s is %s", source, o.by("conf-name"), o.confName)
	}
	for _, name := range v.Plugins {
		if !slices.Contains(ownTypes, name) && !o.hasPlugin(name) {
			warn(cmd, "%s: %s calls %s, which is not in %s: pods can't start without it", o.confName, v.Name, name, o.binDir)
		}
	}
	return text, nil
}

func (o *installOptions) hasPlugin(name string) bool {
	stat := os.Stat
	if o.image {
		stat = os.Lstat // what a link leads to need not be mounted here
	}
	_, err := stat(filepath.Join(o.binDir, name))
	return err == nil
}

// writeNetwork writes the usual network. Plugins behind ours are in it where their programs are there.
func (o *installOptions) writeNetwork(cmd *cobra.Command, pools []api.IPPool) ([]byte, error) {
	type capabilities map[string]bool
	type ipam struct {
		Type      string         `json:"type"`
		Cluster   bool           `json:"cluster,omitempty"`
		IPv4Pools []netip.Prefix `json:"ipv4_pools,omitempty"`
		IPv6Pools []netip.Prefix `json:"ipv6_pools,omitempty"`
	}
	type policy struct {
		Unknown string `json:"unknown"`
	}
	type plugin struct {
		Type         string       `json:"type"`
		Capabilities capabilities `json:"capabilities"`
		IPMasq       bool         `json:"ipMasq,omitempty"`
		MTU          int          `json:"mtu,omitempty"`
		NodeName     string       `json:"nodename,omitempty"`
		LogFile      string       `json:"log_file_path,omitempty"`
		LogMaxSize   int          `json:"log_file_max_size,omitempty"`
		LogMaxAge    int          `json:"log_file_max_age,omitempty"`
		LogMaxCount  int          `json:"log_file_max_count,omitempty"`
		LogLevel     string       `json:"log_level,omitempty"`
		IPAM         *ipam        `json:"ipam,omitempty"`
		Policy       *policy      `json:"policy,omitempty"`
	}
	own := plugin{
		Type: "caracal", Capabilities: capabilities{"ips": true, "mac": true, "io.kubernetes.cri.pod-annotations": true}, IPMasq: o.masquerade && !o.clustered(), MTU: o.mtu,
		NodeName: nodeVariable(), LogFile: o.logFile, LogLevel: os.Getenv("LOG_LEVEL"), IPAM: &ipam{Type: "caracal-ipam", Cluster: o.clustered()},
	}
	if o.policyUnknown != "" {
		own.Policy = &policy{o.policyUnknown}
	}
	for _, p := range pools {
		switch {
		case o.clustered():
		case p.CIDR.Addr().Is6():
			own.IPAM.IPv6Pools = append(own.IPAM.IPv6Pools, p.CIDR)
		default:
			own.IPAM.IPv4Pools = append(own.IPAM.IPv4Pools, p.CIDR)
		}
	}
	if o.logFile != "" {
		var errs [3]error
		own.LogMaxSize, errs[0] = numberVariable("LOG_FILE_MAX_SIZE", 10)
		own.LogMaxAge, errs[1] = numberVariable("LOG_FILE_MAX_AGE", 30)
		own.LogMaxCount, errs[2] = numberVariable("LOG_FILE_MAX_COUNT", 5)
		if err := errors.Join(errs[:]...); err != nil {
			return nil, err
		}
	}
	plugins := []plugin{own}
	for _, chained := range []struct{ name, capability, lost string }{
		{"portmap", "portMappings", "ports can't be published"}, {"bandwidth", "bandwidth", "bandwidth can't be limited"},
	} {
		if !o.hasPlugin(chained.name) {
			warn(cmd, "%s is not in %s: %s; put it there (Debian has it in containernetworking-plugins, /usr/lib/cni) and repeat install", chained.name, o.binDir, chained.lost)
			continue
		}
		plugins = append(plugins, plugin{Type: chained.name, Capabilities: capabilities{chained.capability: true}})
		own.Capabilities[chained.capability] = true // shaped pods' packets go through their queues, and no port is published twice
	}
	text, err := json.MarshalIndent(struct {
		CNIVersion string   `json:"cniVersion"` // containerd 1.6 and podman 4 know none later
		Name       string   `json:"name"`
		Plugins    []plugin `json:"plugins"`
	}{"1.0.0", "caracal", plugins}, "", "  ")
	return append(text, '\n'), err
}

// nodeVariable is this node's name, if one is given.
func nodeVariable() string {
	return FromEnv("KUBERNETES_NODE_NAME", FromEnv("CARACAL_NODENAME", os.Getenv("NODENAME")))
}

func numberVariable(name string, otherwise int) (int, error) {
	s := os.Getenv(name)
	if s == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%s=%q: %s", name, s, expected("int"))
	}
	return n, nil
}

// template is the network that somebody gave, with its placeholders filled; nil: none.
func (o *installOptions) template() (text []byte, source string, err error) {
	switch t := os.Getenv("CNI_NETWORK_CONFIG"); {
	case o.confFile != "":
		source = o.by("conf-file") + " " + o.confFile
		text, err = os.ReadFile(o.confFile)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", o.by("conf-file"), err)
		}
	case t != "":
		source, text = "CNI_NETWORK_CONFIG", []byte(t)
	default:
		return nil, "", nil
	}
	text, err = o.fill(text)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", source, err)
	}
	return text, source, nil
}

var placeholder = regexp.MustCompile(`__[A-Z][A-Z0-9_]*[A-Z0-9]__`)

// fill puts values in the place of Calico's placeholders (cni-plugin/pkg/install of its sources).
func (o *installOptions) fill(text []byte) ([]byte, error) {
	numbers := map[string]int{"LOG_FILE_MAX_SIZE": 100, "LOG_FILE_MAX_AGE": 30, "LOG_FILE_MAX_COUNT": 10}
	words := map[string]string{
		"LOG_LEVEL": "info", "LOG_FILE_PATH": o.logFile, "DATASTORE_TYPE": "kubernetes", "KUBECONFIG_FILEPATH": filepath.Join(defaultConfDir, "calico-kubeconfig"),
		"KUBERNETES_SERVICE_HOST": "", "KUBERNETES_SERVICE_PORT": "", "SERVICEACCOUNT_TOKEN": "",
		"ETCD_ENDPOINTS": "", "ETCD_DISCOVERY_SRV": "", "ETCD_CERT_FILE": "", "ETCD_CA_CERT_FILE": "", "ETCD_KEY_FILE": "",
	}
	if o.clustered() {
		words["DATASTORE_TYPE"] = "etcdv3"
	}
	var errs []error
	text = placeholder.ReplaceAllFunc(text, func(found []byte) []byte {
		name := strings.Trim(string(found), "_")
		word, isWord := words[name]
		number, isNumber := numbers[name]
		switch {
		case name == "CNI_MTU":
			return []byte(strconv.Itoa(o.mtu))
		case name == "KUBERNETES_NODE_NAME":
			if word = nodeVariable(); word == "" {
				word, _ = os.Hostname() // without a name the file is not valid
				word = strings.ToLower(word)
			}
		case isNumber:
			n, err := numberVariable(name, number)
			errs = append(errs, err)
			return []byte(strconv.Itoa(n))
		case isWord && name != "LOG_FILE_PATH": // of that o.logFile knows
			word = FromEnv(name, word)
		case !isWord:
			errs = append(errs, fmt.Errorf("no such placeholder: %s", found))
		}
		quoted, _ := json.Marshal(word) // a string always can be
		return quoted[1 : len(quoted)-1]
	})
	return text, errors.Join(errs...)
}

// preparePools waits until the datastore answers, and makes a pool of each wanted family if it has none at all.
func (o *installOptions) preparePools(cmd *cobra.Command, wanted []api.IPPool) error {
	kind, err := api.FindKind("IPPool")
	if err != nil {
		return err
	}
	if len(o.pools) == 0 && !o.clustered() || o.deferNetwork { // then the agent makes them
		return nil
	}
	if _, err := os.Stat(o.stateDir); o.image && !o.clustered() && errors.Is(err, fs.ErrNotExist) {
		return nil // not mounted: an agent's store, if there will be one, is elsewhere
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), o.wait)
	defer cancel()
	for {
		err := o.withStore(cmd.Context(), func(s store.Store) error {
			there, err := list(ctx, s, kind, "", nil)
			if err != nil {
				return err
			}
			if len(there) > 0 {
				return o.checkPools(cmd, there)
			}
			return o.createPools(cmd, s, kind, wanted)
		})
		if !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the datastore does not answer, so nothing was installed: %w; is ETCD_ENDPOINTS (%s) right? --wait gives it longer than %s", err, strings.Join(o.store.Etcd.Endpoints, ","), o.wait)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (o *installOptions) createPools(cmd *cobra.Command, s store.Store, kind api.Kind, wanted []api.IPPool) error {
	for _, p := range wanted {
		name := "default-ipv4-ippool"
		if p.CIDR.Addr().Is6() {
			name = "default-ipv6-ippool"
		}
		done, err := apply(cmd.Context(), s, api.Resource{Kind: kind, Metadata: api.Metadata{Name: name}, Spec: &p})
		if err != nil {
			return fmt.Errorf("make pool %s: %w", p.CIDR, err)
		}
		o.items = append(o.items, item{Kind: "pool", Name: name, Done: done})
	}
	return nil
}

// checkPools compares the wanted pools with those that the store has.
func (o *installOptions) checkPools(cmd *cobra.Command, there []api.Resource) error {
	var have []string
	for _, r := range there {
		if p, ok := r.Spec.(*api.IPPool); ok {
			have = append(have, p.CIDR.String())
		}
	}
	for _, want := range o.pools {
		switch {
		case slices.Contains(have, want):
		case !o.clustered():
			return fmt.Errorf("%s %s: this machine's store has other pools, %s; take one of these, or all that it has (--cluster), or add this one (caracalctl apply)", o.by("pool"), want, strings.Join(have, ", "))
		case o.said["pool"] != "":
			warn(cmd, "%s %s makes no pool: the datastore has %s already; caracalctl apply adds one", o.by("pool"), want, strings.Join(have, ", "))
		}
	}
	return nil
}

// warnOfOthers tells of files that stand in our network's way.
func (o *installOptions) warnOfOthers(cmd *cobra.Command, network []byte) {
	own := validate(network).Name
	entries, err := os.ReadDir(o.confDir) // sorted, as runtimes sort them
	if err != nil {
		return // it is about to be made
	}
	for _, e := range entries {
		if e.Name() == o.confName || !slices.Contains(networkExtensions, filepath.Ext(e.Name())) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(o.confDir, e.Name()))
		if err != nil {
			continue
		}
		v := validate(text)
		switch {
		case v.Name == own:
			warn(cmd, "%s is called %s too: remove it, or runtimes take the one or the other", filepath.Join(o.confDir, e.Name()), own)
		case e.Name() < o.confName:
			warn(cmd, "%s (network %q) is sorted before %s: runtimes that use the first network, as containerd's CRI does, use that one; remove it, or give ours an earlier name (CNI_CONF_NAME, --conf-name)",
				filepath.Join(o.confDir, e.Name()), v.Name, o.confName)
		}
	}
}
