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
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// add attaches a container. The order: everything that can be wrong in the question is found before anything is made;
// the record comes before what it records, so that whatever a crash leaves can be found and removed; the programs are on
// the interface before it is up; and the pod is in the maps before ADD answers.
func (p *Plugin) add(ctx context.Context, env *Env, c *Config) (any, error) {
	a := &adding{Plugin: p, env: env, c: c, key: env.key(c)}
	if err := a.validate(); err != nil {
		return nil, err
	}
	defer a.close()
	if err := a.make(ctx); err != nil {
		// The runtime may have given up on us: what we made goes all the same.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), uninterrupted)
		defer cancel()
		if undo := a.undo(ctx); undo != nil {
			p.log.Error("undo", "error", undo)
		}
		return nil, err
	}
	if a.mode == loader.Quick && p.Spawn != nil {
		if err := p.Spawn("settle", "--state-dir", c.StateDir, "--bpffs-dir", c.BPFFSDir, "--boot-id-file", c.BootIDFile); err != nil {
			p.log.Warn("start settling", "error", err) // the pod works as it is
		}
	}
	return a.result()
}

// adding is one ADD at work.
type adding struct {
	*Plugin
	env *Env
	c   *Config
	key node.Key

	pools    ipam.Config
	want     []netip.Addr
	ns       *netns.NS
	sides    *sides
	veth     *veth
	mode     loader.Mode
	sysctls  []sysctl
	record   node.Endpoint
	blocks   []netip.Prefix // of the addresses, when they are ours
	recorded bool
	foreign  bool // the foreign IPAM was asked
}

func (a *adding) close() {
	if a.sides != nil {
		a.sides.Close()
	}
	if a.ns != nil {
		a.ns.Close()
	}
}

// validate finds what is wrong with the question, and changes nothing.
func (a *adding) validate() (err error) {
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
	if a.c.ownIPAM() {
		if a.pools, err = a.c.pools(); err != nil {
			return err
		}
	}
	if err := a.openNamespace(); err != nil {
		return err
	}
	if _, err := a.sides.pod.LinkByName(a.env.IfName); err == nil {
		return fail(codeConflict, "interface %s exists in %s already", a.env.IfName, a.env.Netns)
	} else if !nl.IsNotFound(err) {
		return fmt.Errorf("look for %s in the pod: %w", a.env.IfName, err)
	}
	mtu := a.c.MTU
	if mtu == 0 {
		mtu = pathMTU(a.sides.host)
	}
	a.veth = &veth{hostName: HostIfName(a.env, a.c.Name), podName: a.env.IfName, mac: mac, mtu: mtu}
	if a.c.shaped() {
		a.mode = loader.TCX // the bandwidth plugin needs the place that clsact takes
		if !loader.HasTCX() {
			return fail(codeKernel, "shaped bandwidth needs TCX, which Linux 6.6 brought")
		}
	}
	return prepareBPFFS(a.c.BPFFSDir)
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
		return fail(codeState, "bpffs_dir %s: %s does not exist", dir, parent)
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
		{"predecessor", a.removePredecessor},
		{"address", a.foreignAddress},
		{"record", a.recordAll},
		{"sysctl", func(context.Context) error { return writeSysctls(a.sysctls) }},
		{"veth", a.createVeth},
		{"attach", func(context.Context) error {
			return loader.Attach(a.c.BPFFSDir, a.veth.hostName, a.veth.hostIndex, a.mode)
		}},
		{"host", a.configureHost},
		{"pod", func(context.Context) error { return a.veth.configurePod(a.sides) }},
		{"commit", a.commit},
		{"answer", func(context.Context) error { return nil }},
	} {
		if err := a.step(s.name); err != nil {
			return err
		}
		begin := time.Now()
		if err := s.run(ctx); err != nil {
			return err
		}
		a.log.Debug("step", "name", s.name, "duration", time.Since(begin).Round(time.Microsecond))
	}
	return nil
}

func (a *adding) load(context.Context) error {
	id := a.c.NodeName
	if id == "" {
		id = hostname()
	}
	return loader.Ensure(loader.Config{Dir: a.c.BPFFSDir, MaxFlows: a.c.MaxFlows, NodeID: id[:min(len(id), 31)]})
}

// removePredecessor removes what an earlier attachment of the same name, or of the same workload, left: a runtime that adds
// again has given the earlier one up.
func (a *adding) removePredecessor(ctx context.Context) error {
	var old []node.Endpoint
	err := a.read(ctx, func(tx *node.Tx) error {
		for _, find := range []func() (node.Endpoint, error){
			func() (node.Endpoint, error) { return tx.Endpoint(a.key) },
			func() (node.Endpoint, error) { return tx.EndpointByHostIfName(a.veth.hostName) },
		} {
			e, err := find()
			if err == nil && (len(old) == 0 || old[0].Key != e.Key) {
				old = append(old, e)
			} else if err != nil && !errors.Is(err, node.ErrNotFound) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, e := range old {
		a.log.Info("remove predecessor", "endpoint", e.Key.String(), "interface", e.HostIfName)
		if err := a.teardown(ctx, a.c, e.Key); err != nil {
			return err
		}
	}
	return nil
}

// read looks into the database as it is after this boot: opening it for writing releases what earlier boots left.
func (a *adding) read(ctx context.Context, fn func(*node.Tx) error) error {
	db, err := node.Open(ctx, a.c.StateDir, a.c.nodeOptions())
	if err != nil {
		return err
	}
	return errors.Join(db.View(fn), db.Close())
}

// recordAll is the one transaction: addresses and record.
func (a *adding) recordAll(ctx context.Context) (err error) {
	if a.sysctls, err = forwarding(true); err != nil {
		return err
	}
	db, err := node.Open(ctx, a.c.StateDir, a.c.nodeOptions())
	if err != nil {
		return err
	}
	defer db.Close()
	inode, err := a.ns.Inode()
	if err != nil {
		return err
	}
	return db.Update(func(tx *node.Tx) error {
		if a.c.ownIPAM() {
			v4, v6 := a.c.families(a.pools)
			addrs, err := ipam.Assign(tx, a.pools, ipam.Request{Key: a.key, Want: a.want, V4: v4, V6: v6})
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
		}
		if len(a.veth.addrs) == 0 {
			return fail(codeConfig, "the attachment would have no address: neither family is assigned")
		}
		if len(a.veth.addrs) > maps.PodAddresses {
			return fail(codeConfig, "%d addresses for one interface: at most %d", len(a.veth.addrs), maps.PodAddresses)
		}
		if err := recordSysctls(tx, a.sysctls); err != nil {
			return err
		}
		a.record = node.Endpoint{
			Key: a.key, HostIfName: a.veth.hostName, Netns: a.env.Netns, NetnsID: fmt.Sprint(inode),
			MAC: a.veth.mac.String(), HostMAC: hostMAC.String(), Addrs: a.veth.addrs, MTU: a.veth.mtu, Shaped: a.c.shaped(),
			PodName: a.env.Args["K8S_POD_NAME"], PodNamespace: a.env.Args["K8S_POD_NAMESPACE"], PodUID: a.env.Args["K8S_POD_UID"],
			Labels: a.c.labels(), IPAM: ipam.Name, Created: time.Now().UTC(),
		}
		if !a.c.ownIPAM() {
			a.record.IPAM = a.c.IPAM.Type
		}
		a.recorded = true // whatever becomes of the transaction
		return tx.PutEndpoint(a.record)
	})
}

func (a *adding) createVeth(context.Context) error {
	err := a.veth.create(a.sides)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	// Ours, left by a node whose database was lost? The pins and maps are the authority.
	old, lerr := a.sides.host.LinkByName(a.veth.hostName)
	if lerr != nil || !known(a.c.BPFFSDir, a.veth.hostName, old.Attrs().Index) {
		return fail(codeConflict, "interface %s exists on the host and is not Caracal's; remove it (ip link del %s)", a.veth.hostName, a.veth.hostName)
	}
	if err := a.sides.host.LinkDel(old); err != nil {
		return fmt.Errorf("remove stale %s: %w", a.veth.hostName, err)
	}
	return a.veth.create(a.sides)
}

// known tells whether an interface carries this node's programs.
func known(dir, ifname string, ifindex int) bool {
	_, err := loader.Attached(dir, ifname, ifindex)
	return err == nil
}

func (a *adding) configureHost(context.Context) error {
	if err := a.veth.configureHost(a.sides); err != nil {
		return err
	}
	for _, b := range a.blocks {
		if err := blackhole(a.sides.host, b); err != nil {
			return err
		}
	}
	return nil
}

// commit puts the pod into the maps, under the node lock.
func (a *adding) commit(ctx context.Context) error {
	host, err := hostAddresses(a.sides.host)
	if err != nil {
		return err
	}
	m, err := maps.Open(a.c.BPFFSDir)
	if err != nil {
		return err
	}
	defer m.Close()
	lock, err := node.LockNode(ctx, a.c.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	var blocks []netip.Prefix
	err = a.read(ctx, func(tx *node.Tx) error {
		e, err := tx.Endpoint(a.key)
		if err != nil || e.MAC != a.record.MAC {
			return fail(codeTryAgain, "%s was removed while it was added", a.key)
		}
		all, err := tx.Blocks()
		for _, b := range all {
			blocks = append(blocks, b.CIDR)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := commit.SetNode(m, host, blocks); err != nil {
		return err
	}
	return commit.AddPod(m, podOf(a.record, a.veth.hostIndex))
}

// podOf is the dataplane's view of a record.
func podOf(e node.Endpoint, hostIndex int) commit.Pod {
	mac, _ := net.ParseMAC(e.MAC)
	gw, _ := net.ParseMAC(e.HostMAC)
	return commit.Pod{
		IfIndex: hostIndex, Addrs: e.Addrs, MAC: mac, HostMAC: gw, MTU: e.MTU, Shaped: e.Shaped, Network: e.Network,
	}
}

// undo removes what make made.
func (a *adding) undo(ctx context.Context) error {
	var errs []error
	if a.recorded {
		errs = append(errs, a.teardown(ctx, a.c, a.key))
	}
	if a.foreign {
		errs = append(errs, a.foreignRelease(ctx, a.c))
	}
	return errors.Join(errs...)
}
