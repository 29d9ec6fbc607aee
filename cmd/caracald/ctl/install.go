package ctl

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/atomicfile"
	"github.com/caracal-net/caracal/internal/fault"
	"github.com/caracal-net/caracal/store/config"
)

// Where container runtimes look for plugins and networks, and what ours is called.
const (
	defaultBinDir   = "/opt/cni/bin"
	defaultConfDir  = "/etc/cni/net.d"
	defaultConfName = "10-caracal.conflist"
	defaultPool     = "10.244.0.0/16"
	defaultCNILog   = "/var/log/caracal/cni.log"
	defaultHealth   = "127.0.0.1:9099"
)

// imageVariable is set in the container image, where some defaults are others: the host's directories are mounted.
const imageVariable = "CARACAL_IMAGE"

const ipv6PoolVariable = "CALICO_IPV6POOL_CIDR"

// installVariables are the variables that stand for a flag; all but CNI_BIN_DIR and those that begin with CARACAL are Calico's.
var installVariables = []struct{ name, flag string }{
	{"CALICO_IPV4POOL_CIDR", "pool"},
	{ipv6PoolVariable, "pool"},
	{"CALICO_IPV4POOL_NAT_OUTGOING", "masquerade"},
	{"CALICO_IPV4POOL_VXLAN", "vxlan"},
	{"CNI_MTU", "mtu"},
	{"CNI_BIN_DIR", "bin-dir"},
	{"CNI_NET_DIR", "conf-dir"},
	{"CNI_CONF_NAME", "conf-name"},
	{"CNI_NETWORK_CONFIG_FILE", "conf-file"},
	{"SKIP_CNI_BINARIES", "skip"},
	{"UPDATE_CNI_BINARIES", "update"},
	{"SLEEP", "sleep"},
	{"CARACAL_CALICO_NAMES", "calico-names"},
	{"LOG_FILE_PATH", "log-file"},
	{"CARACAL_POLICY_UNKNOWN", "policy-unknown"},
	{"CARACAL_DEFER_NETWORK", "defer-network"},
}

type installOptions struct {
	*globals
	from, binDir, confDir, confName, confFile, health, logFile string
	vxlan, policyUnknown                                       string
	pools, skip                                                []string
	mtu                                                        int
	cluster, masquerade, update, calicoNames, deferNetwork     bool
	agent, sleep, force, dryRun                                bool
	wait                                                       time.Duration

	image bool
	said  map[string]string // flag -> the variable or flag that set it
	store config.Config
	items []item
}

// installed is what install did.
type installed struct {
	DryRun bool   `json:"dryRun"`
	Items  []item `json:"items"`
}

func newInstallCommand(g *globals) *cobra.Command {
	o := &installOptions{globals: g, image: os.Getenv(imageVariable) != "", said: make(map[string]string)}
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put the CNI plugin and a network where container runtimes look for them",
		Long: `install puts the plugins into --bin-dir and then a network into --conf-dir; with --agent also the agent and its systemd unit.
Each file is written beside its place and then renamed: a runtime sees the old one or the new one, and plugins that run go on.
What can't be done is said before anything is changed. It can be repeated.

Where a datastore is configured (ETCD_ENDPOINTS, -c FILE) the network is that of the cluster and its pools, and pods start once
this node's agent runs. Else the network has --pool by itself, and needs no agent. Either way install makes a pool of --pool
in the store, if that has none, and waits until it answers.

Instead of the network that install writes, another one can be given (--conf-file, or the text in CNI_NETWORK_CONFIG), with
Calico's placeholders (__CNI_MTU__, __KUBERNETES_NODE_NAME__, ...). Flags have the variables of Calico's image beside them:
` + variableHelp(),
		Example: `  caracalctl install --dry-run
  caracalctl install --agent
  CALICO_IPV4POOL_CIDR=192.168.0.0/16 caracalctl install
  caracalctl install --pool 10.244.0.0/16 --pool fd00:10:244::/64 --mtu 1450
  caracalctl install --calico-names --conf-file 10-calico.conflist.template --conf-name 10-calico.conflist`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.StringVar(&o.from, "from", "", "`DIR` that holds the plugin (caracal); none: that of this program, or --bin-dir if the plugin is only there")
	f.StringVar(&o.binDir, "bin-dir", defaultBinDir, "`DIR` for the plugins")
	f.StringVar(&o.confDir, "conf-dir", defaultConfDir, "`DIR` for the network")
	f.StringVar(&o.confName, "conf-name", defaultConfName, "`NAME` of the network's file")
	f.StringVar(&o.confFile, "conf-file", "", "`FILE` with the network, instead of the one that install writes")
	f.StringSliceVar(&o.pools, "pool", []string{defaultPool}, "`CIDR` that pods get addresses from, one of each family at most (repeatable)")
	f.BoolVar(&o.cluster, "cluster", false, "addresses come from the store's pools, as the agent claims them, also where the store is this machine's alone")
	f.BoolVar(&o.masquerade, "masquerade", true, "pods leave for the outside with the host's address")
	f.StringVar(&o.vxlan, "vxlan", "", "`MODE` of the pools that install makes: Always, CrossSubnet or Never; empty: Never")
	f.StringVar(&o.policyUnknown, "policy-unknown", "", "`VERDICT` on a pod whose policy is not known: allow or deny; empty: the plugin's own, allow")
	f.BoolVar(&o.deferNetwork, "defer-network", false, "leave the network in --state-dir, for an agent to put in place once pods can be added (caracald --network)")
	f.IntVar(&o.mtu, "mtu", 0, "MTU of pods, bytes; 0: that of the interface with the default route")
	f.StringVar(&o.logFile, "log-file", defaultCNILog, "`FILE` that the plugin logs to beside stderr; empty: none, as with CALICO_DISABLE_FILE_LOGGING=true")
	f.BoolVar(&o.calicoNames, "calico-names", o.image, "also under the names calico and calico-ipam")
	f.StringSliceVar(&o.skip, "skip", nil, "`NAME` of a plugin to leave out (repeatable)")
	f.BoolVar(&o.update, "update", true, "replace plugins that are there")
	f.BoolVar(&o.agent, "agent", false, "also the agent, into "+agentDir+", and its systemd unit")
	f.BoolVar(&o.force, "force", false, "replace files of these names that are not Caracal's")
	f.BoolVar(&o.sleep, "sleep", o.image, "when done, stay and tell on --health whether all is still there")
	f.StringVar(&o.health, "health", defaultHealth, "`ADDRESS` of /health while it stays; empty: nowhere")
	f.DurationVar(&o.wait, "wait", time.Minute, "how long the datastore may take to answer")
	f.BoolVar(&o.dryRun, "dry-run", false, "only say what would be done")
	return cmd
}

func variableHelp() string {
	var b strings.Builder
	for _, v := range installVariables {
		fmt.Fprintf(&b, "\n  %-28s --%s", v.name, v.flag)
	}
	return b.String()
}

func (o *installOptions) run(cmd *cobra.Command) error {
	if err := o.environment(cmd.Flags()); err != nil {
		return err
	}
	if err := o.directories(); err != nil {
		return err
	}
	var err error
	if o.store, err = storeConfig(configFile(o.config), o.stateDir); err != nil {
		if os.Getenv("ETCD_ENDPOINTS") != "" {
			err = fmt.Errorf("ETCD_ENDPOINTS: %w", err)
		}
		return err
	}
	pools, err := o.ipPools()
	if err != nil {
		return err
	}
	network, err := o.network(cmd, pools)
	if err != nil {
		return err
	}
	if o.items, err = o.plan(network); err != nil {
		return err
	}
	o.warnOfOthers(cmd, network)
	if slices.ContainsFunc(o.items, func(i item) bool { return i.Kind == "settings" && i.Done == doneKept }) {
		warn(cmd, "%s says other than the variables given here, and is kept: the agent goes by it; change it there, or remove it and repeat install", agentFile)
	}
	if o.dryRun {
		return o.show(cmd)
	}
	var health net.Listener
	if o.sleep {
		if health, err = o.listen(cmd); err != nil {
			return err
		}
		if health != nil {
			defer health.Close()
		}
	}
	if err := o.preparePools(cmd, pools); err != nil {
		return err
	}
	if err := o.place(); err != nil {
		return err
	}
	if err := o.show(cmd); err != nil || !o.sleep {
		return err
	}
	return o.stay(cmd, health)
}

// clustered tells whether the network's addresses are those that the agent claims in the store.
func (o *installOptions) clustered() bool { return o.cluster || o.store.Type != config.Bolt }

// environment takes what no flag says from the variables.
func (o *installOptions) environment(flags *pflag.FlagSet) error {
	flags.Visit(func(f *pflag.Flag) { o.said[f.Name] = "--" + f.Name })
	given := make(map[string]bool)
	for name := range o.said {
		given[name] = true
	}
	for _, v := range installVariables {
		value := os.Getenv(v.name)
		if value == "" || given[v.flag] {
			continue
		}
		if v.flag == "pool" && value == "none" {
			if o.said["pool"] == "" {
				o.pools = nil
			}
			o.said["pool"] = v.name
			continue
		}
		if v.flag == "pool" && strings.Contains(value, ":") != (v.name == ipv6PoolVariable) {
			return fmt.Errorf("%s=%q: a CIDR of the other family", v.name, value)
		}
		if v.name == ipv6PoolVariable && o.said["pool"] == "" {
			value = defaultPool + "," + value // as Calico does
		}
		f := flags.Lookup(v.flag)
		if err := flags.Set(v.flag, value); err != nil {
			return fmt.Errorf("%s=%q: %s", v.name, value, expected(f.Value.Type()))
		}
		if o.said[v.flag] != "" {
			o.said[v.flag] += ", "
		}
		o.said[v.flag] += v.name
	}
	if o.said["pool"] == "" && (o.confFile != "" || os.Getenv("CNI_NETWORK_CONFIG") != "") {
		o.pools = nil // that network has its own, or the store's
	}
	disabled, err := boolVariable("CALICO_DISABLE_FILE_LOGGING")
	if disabled && !given["log-file"] {
		o.logFile = ""
	}
	return errors.Join(err, o.checkFlags())
}

// by is who set a flag.
func (o *installOptions) by(flag string) string {
	if v := o.said[flag]; v != "" {
		return v
	}
	return "--" + flag
}

func expected(kind string) string {
	switch kind {
	case "bool":
		return "write true or false"
	case "int":
		return "write a number"
	}
	return "not a " + kind
}

func boolVariable(name string) (bool, error) {
	var b bool
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.BoolVar(&b, name, false, "")
	if v := os.Getenv(name); v != "" {
		if err := f.Set(name, v); err != nil {
			return false, fmt.Errorf("%s=%q: %s", name, v, expected("bool"))
		}
	}
	return b, nil
}

func (o *installOptions) checkFlags() error {
	var errs []error
	bad := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: "+format, append([]any{o.by(flag)}, args...)...))
	}
	if o.mtu != 0 && (o.mtu < 68 || o.mtu > 65535) {
		bad("mtu", "%d: not between 68 and 65535; 0: that of the interface with the default route", o.mtu)
	}
	if o.confName != filepath.Base(o.confName) || !slices.Contains(networkExtensions, filepath.Ext(o.confName)) || strings.HasPrefix(o.confName, ".") {
		bad("conf-name", "%q: a file's name alone, that ends with .conflist", o.confName)
	}
	for _, name := range o.skip {
		if name == "" || strings.ContainsAny(name, "/ ") {
			bad("skip", "%q: names of plugins, with commas between", name)
		}
	}
	for _, d := range []struct{ flag, path string }{{"bin-dir", o.binDir}, {"conf-dir", o.confDir}, {"log-file", o.logFile}} {
		if d.path != "" && !filepath.IsAbs(d.path) {
			bad(d.flag, "%q: not an absolute path", d.path)
		}
	}
	if !slices.Contains([]string{"", "allow", "deny"}, o.policyUnknown) {
		bad("policy-unknown", "%q: allow or deny", o.policyUnknown)
	}
	if o.agent && o.image {
		bad("agent", "it is for the host itself; in a container run caracald")
	}
	return errors.Join(errs...)
}

// directories finds where to write, and refuses where that can't be done.
func (o *installOptions) directories() error {
	var errs []error
	for _, d := range []struct {
		flag, usual string
		path        *string
	}{{"bin-dir", defaultBinDir, &o.binDir}, {"conf-dir", defaultConfDir, &o.confDir}} {
		mounted := "/host" + d.usual // where pods of Calico's manifest mount it
		if i, err := os.Stat(mounted); o.image && o.said[d.flag] != "--"+d.flag && err == nil && i.IsDir() {
			*d.path = mounted
		}
		errs = append(errs, o.writable(d.flag, *d.path, d.usual))
	}
	if o.agent {
		for _, dir := range []string{agentDir, filepath.Dir(unitFile), filepath.Dir(agentFile)} {
			errs = append(errs, o.writable("agent", dir, dir))
		}
	}
	return errors.Join(errs...)
}

func (o *installOptions) writable(flag, path, usual string) error {
	i, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && o.image:
		return fmt.Errorf("%s %s: no such directory in this container: mount the host's (docker run -v %s:%s)", o.by(flag), path, usual, path)
	case errors.Is(err, fs.ErrNotExist) && path == usual:
		return o.writable(flag, filepath.Dir(path), filepath.Dir(usual)) // it will be made
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s %s: no such directory; make it first, or is it another one?", o.by(flag), path)
	case err != nil:
		return fmt.Errorf("%s: %w", o.by(flag), err)
	case !i.IsDir():
		return fmt.Errorf("%s %s: not a directory", o.by(flag), path)
	}
	err = unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK|unix.X_OK, unix.AT_EACCESS)
	switch {
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%s %s: on a read-only file system; mount it writable (of a container: without :ro)", o.by(flag), path)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s %s: user %d may not write there; run it as root, or as the directory's owner", o.by(flag), path, os.Geteuid())
	case err != nil:
		return fmt.Errorf("%s %s: %w", o.by(flag), path, err)
	}
	return nil
}

// place writes everything beside its place, and when all of it is on the disk puts one after the other in place: the network
// last, because runtimes start to use it then.
func (o *installOptions) place() (err error) {
	dirs := make(map[string]*atomicfile.Dir)
	defer func() {
		for _, d := range dirs {
			err = errors.Join(err, d.Close())
		}
	}()
	var staged []*atomicfile.File
	for _, i := range o.items {
		if !i.writes() {
			continue
		}
		dir := filepath.Dir(i.Name)
		if dirs[dir] == nil {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("make directory: %w", err)
			}
			d, err := atomicfile.Open(dir)
			if err != nil {
				return err
			}
			dirs[dir] = d
		}
		f, err := i.stage(dirs[dir])
		if err != nil {
			return err
		}
		staged = append(staged, f)
		if err := step("stage " + filepath.Base(i.Name)); err != nil {
			return err
		}
	}
	for n, f := range staged {
		if err := f.Commit(); err != nil {
			return err
		}
		if err := step(fmt.Sprintf("place %d", n+1)); err != nil {
			return err
		}
	}
	return nil
}

func step(name string) error {
	if fault.Step == nil {
		return nil
	}
	return fault.Step(name)
}

func (o *installOptions) show(cmd *cobra.Command) error {
	t := newTable("KIND", "NAME", "DONE")
	for _, i := range o.items {
		t.add(i.Kind, i.Name, i.Done)
	}
	if o.dryRun && o.output == formatTable {
		fmt.Fprintln(cmd.OutOrStdout(), "would do:")
	}
	return o.print(cmd, installed{o.dryRun, o.items}, t)
}
