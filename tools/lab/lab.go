// Package lab builds simulated hosts on one machine: each host is a network namespace with an uplink, a state
// directory, a bpffs directory and a boot id of its own; pods are namespaces wired by real CNI invocations.
//
//	              <name>-outside (optional: the world; 192.0.2.254, 198.51.100.1)
//	                     | eth0
//	 +-------------------+--------------------+   <name>-switch: bridge br0,
//	 |                  br0                   |   192.0.2.0/24 and 2001:db8:0:1::/64
//	 +------+----------------------+----------+
//	        | h1                   | h2
//	   eth0 |                 eth0 |
//	 <name>-h1              <name>-h2             192.0.2.1, 192.0.2.2, ... 2001:db8:0:1::1, ::2, ...
//	   |     |                 |
//	<name>-h1-web  ...      <name>-h2-db          addresses from the network's pools
//
// All that a lab owns is in /run/caracal-lab/<name> or bears names that follow from files there, and every such file is
// written before the thing it names is made. So Down finds everything, whoever was killed at whatever moment. Links
// are made inside the lab's namespaces, never in the caller's.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// BaseDir holds one directory per lab.
const BaseDir = "/run/caracal-lab"

// MaxHosts is how many hosts one lab may have: a host's number is the last byte of its address.
const MaxHosts = 200

var (
	// ErrNotFound says that there is no lab, host or pod of that name.
	ErrNotFound = errors.New("not found")
	// ErrExists says that the name of a lab, pod or namespace is taken.
	ErrExists = errors.New("already exists")
	// ErrClosing says that the lab is being taken down, or its making was interrupted.
	ErrClosing = errors.New("lab is not up")
)

// Lab names have no '-', so that the namespaces of two labs never share a name.
var (
	labName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,23}$`)
	podName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)
)

// Config says what Up builds. The zero value is one host with both address families and the caracal plugin.
type Config struct {
	Name    string // of the lab: lower-case letters, digits, '_'; default "lab"
	Hosts   int    // default 1, at most MaxHosts
	Outside bool   // add the namespace that stands for the outside world, and default routes to it
	MTU     int    // of the uplinks; default 1500

	// Pools of the network. nil means 10.244.0.0/16 and 2001:db8:244::/64, empty none of that family. With more than
	// one host and SharedPools false, host i (from 1) has the i-th /26 and /122 of each; SharedPools gives every host
	// the whole pools, for hosts that share a store.
	IPv4Pools, IPv6Pools []netip.Prefix
	SharedPools          bool

	// Cluster leaves the pools to the store that the hosts' agents share: the configuration list names none. See StartEtcd
	// and StartAgent.
	Cluster bool

	// StaticRoutes gives each host the routes to the others' parts of the pools (what BGP would bring), in the kernel.
	StaticRoutes bool

	Network    string           // the network's name in the configuration list; default: the lab's name
	CNIVersion string           // default "1.1.0"
	Plugin     map[string]any   // keys added to the caracal plugin's configuration, or replacing its keys
	Chain      []map[string]any // plugins that follow caracal in the list
	// Conflist, if set, replaces the built-in configuration list: a text/template over ConflistData. Network, CNIVersion,
	// Plugin and Chain are then only what the template makes of them. Pods are released with DEL before such a lab goes
	// down, because a foreign plugin may keep state where the lab cannot see it.
	Conflist string

	// Caracal is the path of the plugin's binary. Default: $CARACAL_BIN, else "caracal" next to the running executable,
	// in ./bin or in the PATH. It may be missing only with Conflist set. caracald is looked for next to it.
	Caracal string
	// CNIPath are the directories with other plugins; default /usr/lib/cni and /opt/cni/bin.
	CNIPath []string
}

// Lab is a lab that is up. Its methods may be called concurrently, and by several processes at once.
type Lab struct {
	Name string
	Dir  string // everything the lab keeps on disk
	file labFile
}

func (c *Config) setDefaults() error {
	if c.Name == "" {
		c.Name = "lab"
	}
	if !labName.MatchString(c.Name) {
		return fmt.Errorf("lab name %q: want lower-case letters, digits and '_', at most 24", c.Name)
	}
	if c.Hosts == 0 {
		c.Hosts = 1
	}
	if c.Hosts < 0 || c.Hosts > MaxHosts {
		return fmt.Errorf("%d hosts: want 1 to %d", c.Hosts, MaxHosts)
	}
	if c.MTU == 0 {
		c.MTU = 1500
	}
	if c.IPv4Pools == nil {
		c.IPv4Pools = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
	}
	if c.IPv6Pools == nil {
		c.IPv6Pools = []netip.Prefix{netip.MustParsePrefix("2001:db8:244::/64")}
	}
	if c.Network == "" {
		c.Network = c.Name
	}
	if c.CNIVersion == "" {
		c.CNIVersion = "1.1.0"
	}
	if c.CNIPath == nil {
		c.CNIPath = []string{"/usr/lib/cni", "/opt/cni/bin"}
	}
	if c.Caracal == "" {
		c.Caracal = findCaracal()
	}
	if c.Caracal == "" && c.Conflist == "" {
		return errors.New("find the caracal plugin: not next to this program, not in ./bin, not in the PATH; build it (make build) or set CARACAL_BIN")
	}
	if c.Caracal != "" {
		p, err := filepath.Abs(c.Caracal)
		if err != nil {
			return fmt.Errorf("find the caracal plugin: %w", err)
		}
		if c.Caracal, err = exec.LookPath(p); err != nil {
			return fmt.Errorf("find the caracal plugin: %w", err)
		}
	}
	return nil
}

func findCaracal() string {
	if p := os.Getenv("CARACAL_BIN"); p != "" {
		return p
	}
	candidates := []string{"bin/caracal"}
	if self, err := os.Executable(); err == nil {
		candidates = append([]string{filepath.Join(filepath.Dir(self), "caracal")}, candidates...)
	}
	for _, c := range candidates {
		if st, err := os.Stat(c); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return c
		}
	}
	p, err := exec.LookPath("caracal")
	if err != nil {
		return ""
	}
	return p
}

// Up builds a lab. It fails with ErrExists if one of that name is there, or a namespace that it would have to make.
// What a failed Up made is gone when it returns.
func Up(ctx context.Context, cfg Config) (_ *Lab, err error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	file, err := plan(cfg)
	if err != nil {
		return nil, err
	}
	l := &Lab{Name: cfg.Name, Dir: filepath.Join(BaseDir, cfg.Name), file: file}
	for _, name := range l.fixedNamespaces() {
		if _, err := os.Lstat(netns.Path(name)); err == nil {
			if _, err := os.Stat(l.Dir); err == nil {
				break // the lab's own: said better below
			}
			return nil, fmt.Errorf("network namespace %s, which is not a lab's: %w", name, ErrExists)
		}
	}
	unlock, err := l.take(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	defer func() {
		if err != nil {
			// Not ctx: it may be the reason for the failure.
			err = errors.Join(err, l.tearDown(context.Background()))
		}
	}()
	if err := l.save(); err != nil { // before anything it names is made
		return nil, err
	}
	if err := l.build(ctx, cfg); err != nil {
		return nil, err
	}
	l.file.Up = true
	return l, l.save()
}

// take makes and locks the directory of a new lab. Down may remove it in between, and Up of another process make it anew.
func (l *Lab) take(ctx context.Context) (unlock func(), err error) {
	exists := fmt.Errorf("lab %s: %w (lab down --name %s)", l.Name, ErrExists, l.Name)
	for {
		if err := makeLabDir(l.Dir); errors.Is(err, os.ErrExist) {
			return nil, exists
		} else if err != nil {
			return nil, fmt.Errorf("create lab: %w", err)
		}
		unlock, err := lockDir(ctx, l.Dir, unix.LOCK_EX)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if _, err := os.Stat(filepath.Join(l.Dir, labJSON)); err == nil {
			unlock()
			return nil, exists
		}
		return unlock, nil
	}
}

// makeLabDir makes the directory of a new lab; it repeats when the last other lab takes the base directory along.
func makeLabDir(dir string) error {
	for {
		if err := os.MkdirAll(BaseDir, 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
}

// build makes the directories, the bpffs, the namespaces and the links between them.
func (l *Lab) build(ctx context.Context, cfg Config) error {
	if err := l.linkBinaries(cfg.Caracal); err != nil {
		return err
	}
	if err := os.Mkdir(l.bpfDir(), 0o700); err != nil {
		return fmt.Errorf("create bpffs directory: %w", err)
	}
	if err := unix.Mount("bpf", l.bpfDir(), "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs at %s: %w", l.bpfDir(), err)
	}
	if err := l.buildSwitch(); err != nil {
		return err
	}
	if l.file.Outside {
		if err := l.buildOutside(); err != nil {
			return err
		}
	}
	for _, h := range l.Hosts() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := h.build(cfg); err != nil {
			return fmt.Errorf("host %s: %w", h.Name, err)
		}
	}
	return nil
}

// linkBinaries gives the lab a bin directory in which our plugins and tools are found under all their names.
func (l *Lab) linkBinaries(caracal string) error {
	if err := os.Mkdir(l.binDir(), 0o755); err != nil {
		return fmt.Errorf("create lab: %w", err)
	}
	if caracal == "" {
		return nil
	}
	links := map[string]string{"caracal": caracal, "caracal-ipam": caracal}
	if d := filepath.Join(filepath.Dir(caracal), "caracald"); isFile(d) {
		links["caracald"], links["caracalctl"] = d, d
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(l.binDir(), name)); err != nil {
			return fmt.Errorf("create lab: %w", err)
		}
	}
	return nil
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// Open finds a lab that is up. The error is ErrNotFound or ErrClosing (its making or taking down was interrupted).
func Open(name string) (*Lab, error) {
	l := &Lab{Name: name, Dir: filepath.Join(BaseDir, name)}
	if !labName.MatchString(name) {
		return nil, fmt.Errorf("lab %q: %w", name, ErrNotFound)
	}
	if err := l.load(); err != nil {
		return nil, err
	}
	if !l.file.Up {
		return nil, fmt.Errorf("lab %s: %w (lab down --name %s)", name, ErrClosing, name)
	}
	return l, nil
}

// Names lists the labs of this machine, those half made or half removed included, in order.
func Names() ([]string, error) {
	entries, err := os.ReadDir(BaseDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list labs: %w", err)
	}
	var names []string
	for _, e := range entries {
		if labName.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Host returns host i, counted from 1 as in its name (h1). It panics when there is none, as an index does.
func (l *Lab) Host(i int) *Host {
	return &Host{lab: l, Name: l.file.Hosts[i-1].Name, Number: i, file: l.file.Hosts[i-1]}
}

// HostByName finds a host by its name ("h1"). The error is ErrNotFound.
func (l *Lab) HostByName(name string) (*Host, error) {
	for i, h := range l.file.Hosts {
		if h.Name == name {
			return l.Host(i + 1), nil
		}
	}
	return nil, fmt.Errorf("host %q in lab %s: %w", name, l.Name, ErrNotFound)
}

// Hosts returns all hosts, in order.
func (l *Lab) Hosts() []*Host {
	var hosts []*Host
	for i := range l.file.Hosts {
		hosts = append(hosts, l.Host(i+1))
	}
	return hosts
}

// Network is the name of the CNI network of the lab's configuration lists.
func (l *Lab) Network() string { return l.file.Network }

// Outside is the namespace of the outside world, to run things in. It is meant for labs with Config.Outside.
func (l *Lab) Outside() Namespace {
	return Namespace{Netns: netns.Path(l.outsideNetns()), env: l.env()}
}

// Switch is the namespace with the bridge: a port is named after its host ("h1"), which is the place to cut a cable.
func (l *Lab) Switch() Namespace { return Namespace{Netns: netns.Path(l.switchNetns()), env: l.env()} }

func (l *Lab) switchNetns() string  { return l.Name + "-switch" }
func (l *Lab) outsideNetns() string { return l.Name + "-outside" }
func (l *Lab) bpfDir() string       { return filepath.Join(l.Dir, "bpf") }
func (l *Lab) binDir() string       { return filepath.Join(l.Dir, "bin") }

// fixedNamespaces are those that exist as long as the lab does: all but the pods'.
func (l *Lab) fixedNamespaces() []string {
	names := []string{l.switchNetns()}
	if l.file.Outside {
		names = append(names, l.outsideNetns())
	}
	for _, h := range l.file.Hosts {
		names = append(names, h.Netns)
	}
	return names
}

// marker is the variable by which processes of a lab are known.
const marker = "CARACAL_LAB"

// env is what processes of the lab get on top of the caller's environment.
func (l *Lab) env() []string {
	path := l.binDir()
	if p := os.Getenv("PATH"); p != "" {
		path += string(os.PathListSeparator) + p
	}
	return []string{marker + "=" + l.Name, "PATH=" + path}
}

func (l *Lab) String() string {
	var names []string
	for _, h := range l.file.Hosts {
		names = append(names, h.Name)
	}
	return fmt.Sprintf("lab %s (%s)", l.Name, strings.Join(names, " "))
}
