package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/internal/tc"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

// add attaches a container. The order: everything that can be wrong in the question is found before anything is made;
// the record comes before what it records, so that whatever a crash leaves can be found and removed; the programs are on
// the interface before it is up; and the pod and its policy are in the maps before ADD answers.
func (p *Plugin) add(ctx context.Context, env *Env, c *Config) (any, error) {
	a := &adding{Plugin: p, env: env, c: c, key: env.key(c)}
	a.findAnnotations(ctx)
	err := a.validate()
	if err == nil {
		defer a.close()
		err = a.attach(ctx)
	}
	if err != nil {
		a.tellDenied(ctx, err)
		return nil, err
	}
	return a.result()
}

// Denied is what the agent is told of a pod that could not be added, at /v1/pods/denied on its socket.
type Denied struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Message   string `json:"message"`
}

// tellPatience is how long the agent has to take what it is told.
const tellPatience = 200 * time.Millisecond

// tellDenied has the agent tell whoever looks at the pod in Kubernetes why it does not start, if there is an agent.
func (a *adding) tellDenied(ctx context.Context, why error) {
	d := Denied{a.env.Args["K8S_POD_NAMESPACE"], a.env.Args["K8S_POD_NAME"], a.env.Args["K8S_POD_UID"], why.Error()}
	if d.Namespace == "" || d.Name == "" || d.UID == "" {
		return
	}
	if err := ask(context.WithoutCancel(ctx), a.c.AgentSocket, "/v1/pods/denied", a.trace.Values(), d, tellPatience); err != nil && !errors.Is(err, errNoAgent) {
		a.log.Debug("tell the agent", "error", err)
	}
}

// attach makes the attachment, or nothing.
func (a *adding) attach(ctx context.Context) error {
	if err := a.make(ctx); err != nil {
		// Who asked may have given up on us: what we made goes all the same.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), uninterrupted)
		defer cancel()
		if undo := a.undo(ctx); undo != nil {
			a.log.Error("undo", "error", undo)
		}
		return err
	}
	a.spawnSettler()
	return nil
}

// spawnSettler has somebody settle the pod, which works as it is.
func (a *adding) spawnSettler() {
	if a.Spawn == nil || settling(a.c.StateDir) {
		return
	}
	if err := a.Spawn("settle", "--state-dir", a.c.StateDir, "--bpffs-dir", a.c.BPFFSDir, "--boot-id-file", a.c.BootIDFile); err != nil {
		a.log.Warn("start settling", "error", err)
	}
}

// adding is one ADD at work.
type adding struct {
	*Plugin
	env *Env
	c   *Config
	key node.Key

	pools    ipam.Config
	want     []netip.Addr
	had      []netip.Addr // what an earlier ADD of this very attachment had
	ns       *netns.NS
	sides    *sides
	veth     *veth
	mode     loader.Mode
	sysctls  []sysctl
	record   node.Endpoint
	blocks   []netip.Prefix // of the addresses, when they are ours
	recorded bool
	foreign  bool // the foreign IPAM was asked
	maps     *maps.Maps
	judged   bool // there may be policy for the pod
	unheard  bool // the agent has waited for Kubernetes to tell of the pod
}

func (a *adding) close() {
	if a.sides != nil {
		a.sides.Close()
	}
	if a.ns != nil {
		a.ns.Close()
	}
	if a.maps != nil {
		a.maps.Close()
	}
}

// validate finds what is wrong with the question, and changes nothing.
func (a *adding) validate() (err error) {
	if err := a.c.RuntimeConfig.PodAnnotations.check(); err != nil {
		return err
	}
	if a.want, err = a.c.requested(a.env); err != nil {
		return err
	}
	mac, err := a.c.mac(a.env)
	if err != nil {
		return err
	}
	if mac == nil {
		mac = randomMAC()
	}
	ports, err := a.c.ports()
	if err != nil {
		return err
	}
	if a.c.ownIPAM() {
		if a.pools, err = a.c.pools(); err != nil {
			return err
		}
		if a.pools.Only, err = AnnotatedPools(a.c.RuntimeConfig.PodAnnotations); err != nil {
			return err
		}
	}
	if err := a.openNamespace(); err != nil {
		return err
	}
	if err := a.vacant(); err != nil {
		return err
	}
	a.veth = &veth{hostName: HostIfName(a.env, a.c.Name), podName: a.env.IfName, mac: mac, hostMAC: hostMAC, mtu: a.c.mtu(a.sides.host)}
	a.record = node.Endpoint{
		Key: a.key, Netns: a.env.Netns, Shaped: a.c.shaped(), IPAM: ipam.Name, Labels: a.c.labels(), Ports: ports,
		PodName: a.env.Args["K8S_POD_NAME"], PodNamespace: a.env.Args["K8S_POD_NAMESPACE"], PodUID: a.env.Args["K8S_POD_UID"],
	}
	if !a.c.ownIPAM() {
		a.record.IPAM = a.c.IPAM.Type
	}
	if a.c.shaped() {
		a.mode = loader.TCX // the bandwidth plugin needs the place that clsact takes
		if !loader.HasTCX() {
			return fail(codeKernel, "shaped bandwidth needs TCX, which Linux 6.6 brought")
		}
	}
	if a.c.Type == "calico" {
		a.mode = loader.TCX // Calico's networks chain the bandwidth plugin without telling the first one
	}
	return prepareBPFFS(a.c.BPFFSDir)
}

// mtu is what the pair gets unless a tunnel takes less, bytes.
func (c *Config) mtu(host *netlink.Handle) int {
	if c.MTU != 0 {
		return c.MTU
	}
	return pathMTU(host)
}

// vacant makes sure that the container has no interface of the requested name, other than what an ADD or a DEL of this very
// attachment left that was killed on its way: a pair of ours that is down, or not in the maps.
func (a *adding) vacant() error {
	l, err := a.sides.pod.LinkByName(a.env.IfName)
	if nl.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s in the pod: %w", a.env.IfName, err)
	}
	exists := fail(codeConflict, "interface %s exists in %s already", a.env.IfName, a.env.Netns)
	host, err := a.sides.host.LinkByName(HostIfName(a.env, a.c.Name))
	if err != nil || !ours(host) || l.Attrs().ParentIndex != host.Attrs().Index || host.Attrs().ParentIndex != l.Attrs().Index {
		return exists
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		return nil
	}
	m, err := maps.Open(a.c.BPFFSDir)
	if errors.Is(err, maps.ErrNotLoaded) {
		return nil
	}
	if err != nil {
		return err
	}
	defer m.Close()
	if _, err := m.Pod(uint32(host.Attrs().Index)); !errors.Is(err, maps.ErrNotFound) {
		return exists
	}
	return nil
}

func (a *adding) openNamespace() error {
	ns, err := netns.Open(a.env.Netns)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail(codeUnknown, "CNI_NETNS %s does not exist", quoted(a.env.Netns))
	case errors.Is(err, netns.ErrNotNamespace):
		return fail(codeEnvironment, "CNI_NETNS %s is not a network namespace", quoted(a.env.Netns))
	case err != nil:
		return fail(codeEnvironment, "CNI_NETNS %s: %s", quoted(a.env.Netns), err)
	}
	a.ns = ns
	own, err := netns.Current()
	if err != nil {
		return err
	}
	defer own.Close()
	if same, err := ns.Same(own); err != nil {
		return err
	} else if same {
		return fail(codeEnvironment, "CNI_NETNS %s is the host's own network namespace", quoted(a.env.Netns))
	}
	a.sides, err = openSides(ns)
	return err
}

// prepareBPFFS makes sure that dir can hold pins. A bpffs is mounted only at /sys/fs/bpf and only in the machine's own
// mount namespace: elsewhere nobody else would see it.
func prepareBPFFS(dir string) error {
	parent := filepath.Dir(dir)
	err := loader.CheckBPFFS(parent)
	if err == nil {
		if err := unix.Access(parent, unix.W_OK|unix.X_OK); err != nil {
			return fail(codeState, "bpffs_dir %s: %s can't be written: %s; mount it writable, or name another", dir, parent, err)
		}
		return nil
	}
	const root = "/sys/fs/bpf"
	if parent == root && errors.Is(err, loader.ErrNotBPFFS) {
		ours, err1 := os.Readlink("/proc/self/ns/mnt")
		theirs, err2 := os.Readlink("/proc/1/ns/mnt")
		if err1 == nil && err2 == nil && ours == theirs {
			if err := unix.Mount("bpf", root, "bpf", 0, ""); err != nil {
				return fail(codeState, "mount a bpf file system at %s: %s", root, err)
			}
			return nil
		}
		return fail(codeState, "%s is not a bpf file system here, and this is a mount namespace of its own, where one would be seen by nobody else: mount it on the machine (mount -t bpf bpf %s) and run the plugin in a mount namespace that sees it", root, root)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fail(codeState, "bpffs_dir %s: %s does not exist; make it and mount a bpf file system there (mount -t bpf bpf %s), or name another", dir, parent, parent)
	}
	return fail(codeState, "bpffs_dir %s: %s; mount one there (mount -t bpf bpf %s)", dir, err, parent)
}

// make makes the attachment, step by step.
func (a *adding) make(ctx context.Context) error {
	for _, s := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"load", a.load},
		{"predecessor", a.removePredecessors},
		{"address", a.foreignAddress},
		{"record", a.recordAll},
		{"sysctl", func(context.Context) error { return writeSysctls(a.sysctls) }},
		{"attach", func(context.Context) error {
			return loader.Attach(tc.On(a.sides.host), a.c.BPFFSDir, a.veth.hostName, a.veth.hostIndex, a.mode)
		}},
		// Before the pod's end is up, so that what it sends first is not a stranger's, and is judged; and before the kernel
		// routes addresses here that may turn out to be another pod's.
		{"commit", a.commit},
		{"policy", a.enforce},
		{"host", a.configureHost},
		{"pod", a.configurePod},
		{"answer", func(context.Context) error { return nil }},
	} {
		if err := a.timed(s.name, func() error { return s.run(ctx) }); err != nil {
			return err
		}
	}
	return nil
}

// timed takes one step.
func (a *adding) timed(name string, run func() error) error {
	if err := a.step(name); err != nil {
		return err
	}
	begin := time.Now()
	err := run()
	a.log.Debug("step", "name", name, "duration", time.Since(begin).Round(time.Microsecond))
	return err
}

func (a *adding) load(context.Context) error { return loader.Ensure(a.c.loaderConfig()) }

func (c *Config) loaderConfig() loader.Config {
	id := c.NodeName
	if id == "" {
		id = hostname()
	}
	return loader.Config{Dir: c.BPFFSDir, MaxFlows: c.MaxFlows, NodeID: id[:min(len(id), loader.MaxNodeID)]}
}

// removePredecessors removes what an earlier attachment of the same name, or of the same workload, left: a runtime that
// adds again has given the earlier one up. With our own IPAM the recording transaction looks for them. A foreign plugin
// must have let go of the address before it is asked for one.
func (a *adding) removePredecessors(ctx context.Context) error {
	if a.c.ownIPAM() {
		return nil
	}
	var old []node.Endpoint
	err := a.read(ctx, a.c, func(tx *node.Tx) (err error) {
		old, err = a.predecessors(tx)
		return err
	})
	if errors.Is(err, node.ErrNoDatabase) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := a.removeAll(ctx, old); err != nil || !slices.ContainsFunc(old, func(e node.Endpoint) bool { return e.Key == a.key }) {
		return err
	}
	return a.foreignRelease(ctx, a.c)
}

func (a *adding) predecessors(tx *node.Tx) ([]node.Endpoint, error) {
	var old []node.Endpoint
	for _, find := range []func() (node.Endpoint, error){
		func() (node.Endpoint, error) { return tx.Endpoint(a.key) },
		func() (node.Endpoint, error) { return tx.EndpointByHostIfName(a.veth.hostName) },
	} {
		e, err := find()
		if err == nil && (len(old) == 0 || old[0].Key != e.Key) {
			old = append(old, e)
		} else if err != nil && !errors.Is(err, node.ErrNotFound) {
			return nil, err
		}
	}
	return old, nil
}

func (a *adding) removeAll(ctx context.Context, old []node.Endpoint) error {
	for _, e := range old {
		a.log.Debug("remove predecessor", "endpoint", e.Key.String(), "interface", e.HostIfName)
		if err := a.teardown(ctx, a.c, e.Key); err != nil {
			return err
		}
		if e.Key == a.key { // plugins behind this one were told of them, and of no DEL: portmap sends there still
			a.had = e.Addrs
		}
	}
	return nil
}

// read looks into the database beside other readers.
func (p *Plugin) read(ctx context.Context, c *Config, fn func(*node.Tx) error) error {
	db, err := node.OpenReadOnly(ctx, c.StateDir, c.nodeOptions())
	if err != nil {
		return err
	}
	return errors.Join(db.View(fn), db.Close())
}

// update changes the database in one transaction.
func (p *Plugin) update(ctx context.Context, c *Config, fn func(*node.Tx) error) error {
	db, err := node.Open(ctx, c.StateDir, c.nodeOptions())
	if err != nil {
		return err
	}
	return errors.Join(db.Update(fn), db.Close())
}

// rivals is how often ADD gives way to another ADD for the same workload before it gives up.
const rivals = 8

// recordAll makes the record, once no earlier attachment stands in its way.
func (a *adding) recordAll(ctx context.Context) (err error) {
	if a.sysctls, err = forwarding(hasV6(a.veth.addrs) || a.c.ownIPAM()); err != nil {
		return err
	}
	for range rivals {
		old, err := a.recordOnce(ctx)
		if err != nil || len(old) == 0 {
			return err
		}
		if err := a.removeAll(ctx, old); err != nil {
			return err
		}
	}
	return fail(codeTryAgain, "another attachment of the workload behind %s is being added", a.veth.hostName)
}

// recordOnce is the one transaction: addresses and record; or it finds predecessors and changes nothing. The database stays
// closed to others until the pair is there too: a DEL that finds the record finds the pair.
func (a *adding) recordOnce(ctx context.Context) (old []node.Endpoint, err error) {
	db, err := node.Open(ctx, a.c.StateDir, a.c.nodeOptions())
	if err != nil {
		return nil, err
	}
	defer db.Close()
	if a.ns != nil {
		inode, err := a.ns.Inode()
		if err != nil {
			return nil, err
		}
		a.record.NetnsID = fmt.Sprint(inode)
	}
	masquerade4, masquerade6 := false, false
	err = db.Update(func(tx *node.Tx) error {
		if old, err = a.predecessors(tx); err != nil || len(old) > 0 {
			return err
		}
		if err := a.freeName(); err != nil {
			return err
		}
		if err := a.freePorts(tx); err != nil {
			return err
		}
		if a.c.ownIPAM() {
			if a.pools.Only, err = a.only(tx); err != nil {
				return err
			}
			pools, _, err := ipam.Pools(tx, a.pools)
			if err != nil {
				return err
			}
			a.veth.pools = nil
			for _, p := range pools {
				a.veth.pools = append(a.veth.pools, p.CIDR)
			}
			v4, v6, err := a.c.families(tx, a.pools)
			if err != nil {
				return err
			}
			if a.record.IPAM == ipam.Docker { // which has requested them before
				held, err := tx.Held(a.key)
				if err != nil {
					return err
				}
				if len(held) == 0 {
					return fail(codeAddress, "%s holds no address of this node", a.key)
				}
			}
			addrs, err := ipam.Assign(tx, a.pools, ipam.Request{Key: a.key, Want: a.want, Had: a.had, V4: v4, V6: v6})
			if err != nil {
				return err
			}
			held, err := tx.Held(a.key)
			if err != nil {
				return err
			}
			a.blocks = nil
			for _, h := range held {
				a.blocks = append(a.blocks, h.Block)
			}
			a.veth.addrs = addrs
			if err := a.unused(); err != nil {
				return err
			}
			masquerade4, masquerade6 = ipam.NATOutgoing(pools, addrs)
			if a.c.MTU == 0 && slices.ContainsFunc(pools, api.IPPool.Encapsulates) {
				a.veth.mtu = min(a.veth.mtu, tunnelMTU(a.sides.host))
			}
		}
		if len(a.veth.addrs) == 0 && a.c.ownIPAM() && len(a.veth.pools) == 0 {
			return fail(codeAddress, "there is no pool that this node may use now; its agent says why (caracalctl node status)")
		}
		if len(a.veth.addrs) == 0 {
			return fail(codeConfig, "the attachment would have no address: neither family is assigned")
		}
		if len(a.veth.addrs) > maps.PodAddresses {
			return fail(codeConfig, "%d addresses for one interface: at most %d", len(a.veth.addrs), maps.PodAddresses)
		}
		if hasV6(a.veth.addrs) && a.veth.mtu < minMTU6 {
			return fail(codeConfig, "mtu %d: IPv6 needs %d at least; set mtu, or assign no IPv6 address", a.veth.mtu, minMTU6)
		}
		if err := recordSysctls(tx, a.sysctls); err != nil {
			return err
		}
		a.record.HostIfName, a.record.Addrs, a.record.MTU = a.veth.hostName, a.veth.addrs, a.veth.mtu
		a.record.MAC, a.record.HostMAC = a.veth.mac.String(), a.veth.hostMAC.String()
		a.record.IPMasq, a.record.Created = bool(a.c.IPMasq), time.Now().UTC()
		a.record.Masquerade4, a.record.Masquerade6 = masquerade4 || bool(a.c.IPMasq), masquerade6 || bool(a.c.IPMasq)
		a.about = a.record
		a.recorded = true // whatever becomes of the transaction
		return tx.PutEndpoint(a.record)
	})
	if err != nil || len(old) > 0 {
		return old, err
	}
	return nil, a.timed("veth", func() error { return a.veth.create(a.sides) })
}

// unused makes sure that nothing on this host has an address that nobody is recorded with: a pod of Calico's that was not adopted,
// or the host's end of a tunnel.
func (a *adding) unused() error {
	for _, addr := range a.veth.addrs {
		routes, err := a.sides.host.RouteGet(addr.AsSlice())
		if err != nil || len(routes) == 0 {
			continue // unreachable, or a blackhole
		}
		name, err := nl.Name(routes[0].LinkIndex)
		switch {
		case routes[0].Type == unix.RTN_LOCAL:
			return fail(codeAddress, "address %s is this host's own: remove it from its interface", addr)
		case err == nil && strings.HasPrefix(name, "cali") && routes[0].Gw == nil: // else it is this host's own way out, as a container's
			return fail(codeAddress, "address %s is held by another pod, behind %s, of which nothing is recorded: one of Calico's? Take them over first (caracalctl adopt)", addr, name)
		}
	}
	return nil
}

// freeName makes sure that no interface without a record has the host end's name: a record would make it ours to remove.
// One that is marked as ours was left by a node whose database was lost; it goes.
func (a *adding) freeName() error {
	if gone(a.veth.hostName) {
		return nil
	}
	old, err := a.sides.host.LinkByName(a.veth.hostName)
	if err != nil {
		return fmt.Errorf("look for %s: %w", a.veth.hostName, err)
	}
	if !ours(old) {
		return fail(codeConflict, "interface %s exists on the host and is not Caracal's; remove it (ip link del %s)", a.veth.hostName, a.veth.hostName)
	}
	if err := a.sides.host.LinkDel(old); err != nil {
		return fmt.Errorf("remove stale %s: %w", a.veth.hostName, err)
	}
	return nil
}

func (a *adding) configureHost(context.Context) error {
	if err := a.veth.configureHost(a.sides); err != nil {
		return err
	}
	for _, b := range a.blocks {
		if err := Blackhole(a.sides.host, b); err != nil {
			return err
		}
	}
	return nil
}

// configurePod configures the pod's end, unless whoever moves it into the pod's namespace does.
func (a *adding) configurePod(context.Context) error {
	if a.ns == nil {
		return nil
	}
	return a.veth.configurePod(a.sides)
}

// commit puts the pod into the maps, under the node lock, unless a DEL has removed it meanwhile.
func (a *adding) commit(ctx context.Context) error {
	m, err := maps.Open(a.c.BPFFSDir)
	if err != nil {
		return err
	}
	a.maps = m
	lock, err := node.LockNode(ctx, a.c.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	if name, err := nl.Name(a.veth.hostIndex); err != nil || name != a.veth.hostName {
		return a.removed()
	}
	if !commit.HasBlocks(m, a.blocks) {
		if err := a.setNode(ctx, a.c, a.sides.host, m); err != nil {
			return err
		}
	}
	// Looked at under the lock: who learns of the first policy later than this finds the pod in the maps.
	ids := policy.PodPolicies{}
	if a.judged = a.deniesUnknown() || enforce.Exists(a.c.StateDir) || a.mayHear(); a.judged {
		ids = unknownPolicy
	}
	if err := commit.AddPod(m, a.pod(ids)); err != nil {
		return err
	}
	if a.record.Masquerade4 || a.record.Masquerade6 {
		return a.openOutside(m)
	}
	return nil
}

// pod is what the maps are to have, judged by these ids.
func (a *adding) pod(ids policy.PodPolicies) commit.Pod {
	pod := commit.PodOf(a.record, a.veth.hostIndex)
	pod.Policy = &ids
	return pod
}

func (a *adding) removed() error {
	return fail(codeTryAgain, "%s was removed while it was added", a.key)
}

// setNode brings the node's own routes up to date in the maps. Callers hold the node lock.
func (p *Plugin) setNode(ctx context.Context, c *Config, host *netlink.Handle, m *maps.Maps) error {
	addrs, err := HostAddresses(host)
	if err != nil {
		return err
	}
	var blocks []netip.Prefix
	err = p.read(ctx, c, func(tx *node.Tx) error {
		all, err := tx.Blocks()
		for _, b := range all {
			blocks = append(blocks, b.CIDR)
		}
		return err
	})
	if err != nil {
		return err
	}
	return commit.SetNode(m, addrs, blocks)
}

// undo removes what make made.
func (a *adding) undo(ctx context.Context) error {
	var errs []error
	if a.recorded {
		errs = append(errs, a.teardown(ctx, a.c, a.key), a.removeOrphan())
	}
	if a.foreign {
		errs = append(errs, a.foreignRelease(ctx, a.c))
	}
	return errors.Join(errs...)
}

// removeOrphan removes our pair when the record is gone already: a DEL, or a successor, came while it was made. As long as
// the interface is there nobody else has its name, and the pins under the name are ours.
func (a *adding) removeOrphan() error {
	if a.veth.hostIndex == 0 {
		return nil
	}
	l, err := a.sides.host.LinkByIndex(a.veth.hostIndex)
	if nl.IsNotFound(err) || err == nil && l.Attrs().Name != a.veth.hostName {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s: %w", a.veth.hostName, err)
	}
	if err := loader.Detach(a.c.BPFFSDir, a.veth.hostName); err != nil {
		return err
	}
	return a.removeVeth(a.c, a.veth.hostIndex, a.record)
}
