package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
)

const (
	ifName    = "eth0"           // the pod's interface
	delWithin = 30 * time.Second // a DEL that takes longer is given up on
	// settleWithin is how long a plugin may take to move a pod's programs from clsact to TCX after ADD.
	settleWithin = 15 * time.Second
)

// Node is one datapath's host: a namespace, a directory, and the pods attached to it. Its methods may be called
// concurrently; Close only when no other runs.
type Node struct {
	Spec Spec
	Dir  string // private directory; the bpffs is mounted at Dir/bpf

	session *Session
	name    string
	host    *netns.NS
	cni     *libcni.CNIConfig
	list    *libcni.NetworkConfigList

	mu       sync.Mutex
	pods     []*Pod
	detach   []func() error
	attach   string // redirect: how the program is attached
	far      *Node  // the second host, when there is one
	measured []netip.Addr
	programs []*ebpf.Program
	hostDel  bool
}

// Pod is one pod's namespace. Addr is valid once it is attached.
type Pod struct {
	Name string // of the namespace, below netns.RunDir; also the container id
	NS   *netns.NS
	Addr netip.Addr

	node     *Node
	attached bool // ADD was tried, so DEL is due
	parent   int  // index of the host's end of the veth pair, 0 when there is none
}

// Start makes the node's host namespace and directory; no pod and no plugin yet.
func (s Spec) Start(session *Session) (n *Node, err error) {
	id := session.next()
	n = &Node{Spec: s, Dir: filepath.Join(session.Dir, fmt.Sprintf("%s-%d", fileName(s.Name), id)), session: session}
	if err := os.Mkdir(n.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("create directory of datapath %s: %w", s.Name, err)
	}
	if n.name, n.host, err = session.namespace(fmt.Sprintf("%s-%d-host", fileName(s.Name), id)); err != nil {
		return nil, err
	}
	session.mu.Lock()
	session.nodes = append(session.nodes, n)
	session.mu.Unlock()
	if err := n.host.Do(func() error { return up("lo") }); err != nil {
		return nil, err
	}
	if s.Kind != KindCNI {
		return n, nil
	}
	if err := session.mountBPF(filepath.Join(n.Dir, "bpf")); err != nil {
		return nil, err
	}
	if n.list, err = s.list(n.Dir); err != nil {
		return nil, err
	}
	n.cni = libcni.NewCNIConfigWithCacheDir(s.CNIPath, filepath.Join(n.Dir, "cache"), nil)
	return n, nil
}

// fileName is a datapath's name as part of a namespace's name and of a directory's.
func fileName(name string) string {
	return strings.NewReplacer("+", ".", "/", ".", "@", ".").Replace(name)
}

// BPFDir is where a caracal plugin of this node pins its maps.
func (n *Node) BPFDir() string { return filepath.Join(n.Dir, "bpf", "caracal") }

// Programs are those of Caracal's that packets may meet on the node; none of other datapaths. Close closes them.
func (n *Node) Programs() ([]*ebpf.Program, error) {
	if !n.UsesCaracal() || n.programs != nil {
		return n.programs, nil
	}
	for _, h := range n.hosts() {
		for _, name := range []string{bpf.DataplaneProgFromPod, bpf.DataplaneProgToPod, bpf.DataplaneProgFromNet, bpf.DataplaneProgToNet} {
			p, err := ebpf.LoadPinnedProgram(bpf.ProgramPath(h.BPFDir(), name), nil)
			if err != nil {
				return nil, fmt.Errorf("open program %s of %s: %w", name, n.Spec.Name, err)
			}
			n.programs = append(n.programs, p)
		}
	}
	return n.programs, nil
}

// hosts are the node and the second host, when there is one.
func (n *Node) hosts() []*Node {
	if n.far == nil {
		return []*Node{n}
	}
	return []*Node{n, n.far}
}

// Pair makes the two pods whose packets are measured, attached and ready for traffic. There is one pair.
func (n *Node) Pair(ctx context.Context) (a, b *Pod, err error) {
	defer func() {
		if err == nil {
			n.measured = []netip.Addr{a.Addr, b.Addr}
		}
	}()
	if n.Spec.Hosts == 2 {
		return n.pairOfHosts(ctx)
	}
	if a, err = n.NewPod(); err != nil {
		return nil, nil, err
	}
	if b, err = n.NewPod(); err != nil {
		return nil, nil, err
	}
	switch n.Spec.Kind {
	case KindVeth:
		return a, b, n.joinByVeth(a, b)
	case KindRedirect:
		return a, b, n.joinByRedirect(a, b)
	}
	for _, p := range []*Pod{a, b} {
		if err := n.Add(ctx, p); err != nil {
			return nil, nil, err
		}
	}
	return a, b, nil
}

// Fill attaches the pods that are to exist beside those that are measured. progress may be nil.
func (n *Node) Fill(ctx context.Context, progress func(done, total int, what string)) error {
	for i := range n.Spec.Beside {
		if progress != nil {
			progress(i, n.Spec.Beside, "pods of "+n.Spec.Name)
		}
		p, err := n.NewPod()
		if err != nil {
			return err
		}
		if err := n.Add(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// NewPod makes a pod's namespace with its loopback interface up, not attached to anything.
func (n *Node) NewPod() (*Pod, error) {
	name, ns, err := n.session.namespace(fmt.Sprintf("%s-%d", fileName(n.Spec.Name), n.session.next()))
	if err != nil {
		return nil, err
	}
	p := &Pod{Name: name, NS: ns, node: n}
	n.mu.Lock()
	n.pods = append(n.pods, p)
	n.mu.Unlock()
	return p, ns.Do(func() error { return up("lo") })
}

// Add attaches the pod by a real CNI ADD, executed in the host namespace.
func (n *Node) Add(ctx context.Context, p *Pod) error {
	p.attached = true
	var res *current.Result
	err := n.host.Do(func() error {
		raw, err := n.cni.AddNetworkList(ctx, n.list, p.runtimeConf())
		if err != nil {
			return err
		}
		res, err = current.NewResultFromResult(raw)
		return err
	})
	if err != nil {
		return fmt.Errorf("CNI ADD of %s: %w", n.Spec.Name, err)
	}
	for _, ip := range res.IPs {
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return fmt.Errorf("CNI ADD of %s: result has address %v", n.Spec.Name, ip.Address)
		}
		if addr = addr.Unmap(); !p.Addr.IsValid() || addr.Is4() && !p.Addr.Is4() {
			p.Addr = addr
		}
	}
	if !p.Addr.IsValid() {
		return fmt.Errorf("CNI ADD of %s: result has no address", n.Spec.Name)
	}
	return nil
}

// Del detaches the pod by a real CNI DEL. Deleting a pod that was never added does nothing.
func (n *Node) Del(ctx context.Context, p *Pod) error {
	if !p.attached {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, delWithin)
	defer cancel()
	if err := n.host.Do(func() error { return n.cni.DelNetworkList(ctx, n.list, p.runtimeConf()) }); err != nil {
		return fmt.Errorf("CNI DEL of %s: %w", n.Spec.Name, err)
	}
	p.attached = false
	return nil
}

// Remove deletes the pod's namespace; Del comes first.
func (n *Node) Remove(p *Pod) error {
	n.mu.Lock()
	n.pods = slices.DeleteFunc(n.pods, func(o *Pod) bool { return o == p })
	n.mu.Unlock()
	p.NS.Close()
	return n.session.removeNamespace(p.Name)
}

func (p *Pod) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: p.Name, NetNS: netns.Path(p.Name), IfName: ifName}
}

// Settle waits until the pods' programs are attached for good and returns how: AttachTCX, AttachClsact or AttachNone.
// Our plugin may attach by clsact in ADD and move to TCX afterwards; a kernel without TCX keeps clsact.
func (n *Node) Settle(ctx context.Context, pods ...*Pod) (string, error) {
	if n.Spec.Kind != KindCNI {
		if n.attach != "" {
			return n.attach, nil
		}
		return AttachNone, nil
	}
	deadline := time.Now().Add(settleWithin)
	for {
		kinds := make([]string, len(pods))
		for i, p := range pods {
			var err error
			if kinds[i], err = n.attachment(p); err != nil {
				return "", err
			}
		}
		slices.Sort(kinds)
		worst := AttachNone
		if k := slices.Compact(kinds); len(k) == 1 {
			worst = k[0]
		} else if slices.Contains(k, AttachClsact) && !slices.Contains(k, AttachNone) {
			worst = AttachClsact
		}
		if !n.Spec.usesCaracal() || worst == AttachTCX {
			return worst, nil
		}
		if time.Now().After(deadline) {
			if worst == AttachNone {
				return "", fmt.Errorf("no program is attached to the host ends of %s %v after ADD", n.Spec.Name, settleWithin)
			}
			return worst, nil
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (n *Node) attachment(p *Pod) (string, error) {
	if p.parent == 0 {
		err := p.NS.Do(func() error {
			l, err := netlink.LinkByName(ifName)
			if err != nil {
				return fmt.Errorf("find %s of pod %s: %w", ifName, p.Name, err)
			}
			p.parent = l.Attrs().ParentIndex
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	kind := AttachNone
	if p.parent == 0 {
		return kind, nil
	}
	return kind, p.node.host.Do(func() (err error) {
		if _, err := netlink.LinkByIndex(p.parent); nl.IsNotFound(err) {
			return nil // the parent is elsewhere, as with host-device
		}
		kind, err = attachOf(p.parent)
		return err
	})
}

// HostLinks lists the interfaces of the host namespace, sorted: what is left after DEL shows here.
func (n *Node) HostLinks() ([]string, error) {
	var names []string
	err := n.host.Do(func() error {
		links, err := nl.Dump(netlink.LinkList)
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return nil
	})
	slices.Sort(names)
	return names, err
}

// Plugin describes one binary of the chain.
type Plugin struct {
	Type string `json:"type"`
	Path string `json:"path"`
	Size int64  `json:"size"` // bytes
	// Specs are the CNI specification versions it says it supports; IPAM plugins' are not asked for.
	Specs []string `json:"cni_versions,omitempty"`
}

// Plugins describes the binaries of the chain.
func (n *Node) Plugins(ctx context.Context) ([]Plugin, error) {
	var out []Plugin
	for _, t := range n.Spec.types() {
		path, err := n.Spec.find(t)
		if err != nil {
			return nil, err
		}
		p := Plugin{Type: t, Path: path}
		if st, err := os.Stat(path); err == nil {
			p.Size = st.Size()
		}
		info, err := n.cni.GetVersionInfo(ctx, t)
		if err != nil {
			return nil, fmt.Errorf("ask %s for its version: %w", path, err)
		}
		p.Specs = info.SupportedVersions()
		out = append(out, p)
	}
	return out, nil
}

// Close detaches and removes the node's pods and the node. It may be called again.
func (n *Node) Close(ctx context.Context) error {
	var errs []error
	n.mu.Lock()
	pods := slices.Clone(n.pods)
	n.mu.Unlock()
	for _, p := range slices.Backward(pods) {
		errs = append(errs, n.Del(ctx, p), n.Remove(p))
	}
	for _, f := range n.detach {
		errs = append(errs, f())
	}
	n.detach = nil
	for _, p := range n.programs {
		errs = append(errs, p.Close())
	}
	n.programs = nil
	if !n.hostDel {
		n.hostDel = true
		n.host.Close()
		errs = append(errs, n.session.removeNamespace(n.name))
	}
	if n.Spec.Kind == KindCNI {
		errs = append(errs, n.session.unmount(filepath.Join(n.Dir, "bpf")))
	}
	n.session.mu.Lock()
	n.session.nodes = slices.DeleteFunc(n.session.nodes, func(o *Node) bool { return o == n })
	n.session.mu.Unlock()
	return errors.Join(errs...)
}

// joinByVeth connects the pods directly:
//
//	[a eth0 198.18.0.1] ---------- [eth0 198.18.0.2 b]
func (n *Node) joinByVeth(a, b *Pod) error {
	if err := a.NS.Do(func() error { return addVeth("eth0", "eth0", b.NS) }); err != nil {
		return err
	}
	a.Addr, b.Addr = netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2") // RFC 2544
	macA, err := a.configure()
	if err != nil {
		return err
	}
	macB, err := b.configure()
	if err != nil {
		return err
	}
	return errors.Join(a.neighbour(b.Addr, macB), b.neighbour(a.Addr, macA))
}

// joinByRedirect connects the pods through a host that forwards by nothing but a redirecting program:
//
//	[a eth0] --- [host ha] ~~redirect_peer~~ [hb host] --- [eth0 b]
//
// Each pod reaches the other under its own host end's MAC address, so no packet needs rewriting.
func (n *Node) joinByRedirect(a, b *Pod) error {
	a.Addr, b.Addr = netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")
	var macs [2]net.HardwareAddr
	err := n.host.Do(func() error {
		var index [2]int
		for i, p := range []*Pod{a, b} {
			name := []string{"ha", "hb"}[i]
			if err := addVeth(name, ifName, p.NS); err != nil {
				return err
			}
			if err := up(name); err != nil {
				return err
			}
			l, err := netlink.LinkByName(name)
			if err != nil {
				return fmt.Errorf("find %s: %w", name, err)
			}
			index[i], macs[i] = l.Attrs().Index, l.Attrs().HardwareAddr
		}
		for i := range index {
			how, detach, err := attachRedirect(index[i], index[1-i], n.Spec.Attach)
			if err != nil {
				return err
			}
			n.attach, n.detach = how, append(n.detach, detach)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range []*Pod{a, b} {
		if _, err := p.configure(); err != nil {
			return err
		}
	}
	return errors.Join(a.neighbour(b.Addr, macs[0]), b.neighbour(a.Addr, macs[1]))
}

// addVeth makes a pair with one end here and the other in peer.
func addVeth(name, peerName string, peer *netns.NS) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: peerName, PeerNamespace: netlink.NsFd(peer.FD())}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("create veth pair %s: %w", name, err)
	}
	return nil
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// configure gives the pod's interface its address and returns its MAC address.
func (p *Pod) configure() (mac net.HardwareAddr, err error) {
	err = p.NS.Do(func() error {
		l, err := netlink.LinkByName(ifName)
		if err != nil {
			return fmt.Errorf("find %s: %w", ifName, err)
		}
		mac = l.Attrs().HardwareAddr
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr.AsSlice(), Mask: net.CIDRMask(24, 32)}}
		if err := netlink.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("add address %s: %w", p.Addr, err)
		}
		return up(ifName)
	})
	return mac, err
}

// neighbour tells the pod the other's MAC address for good, so that no measurement contains ARP.
func (p *Pod) neighbour(addr netip.Addr, mac net.HardwareAddr) error {
	return p.NS.Do(func() error {
		l, err := netlink.LinkByName(ifName)
		if err != nil {
			return fmt.Errorf("find %s: %w", ifName, err)
		}
		neigh := &netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac}
		if err := netlink.NeighSet(neigh); err != nil {
			return fmt.Errorf("set neighbour %s: %w", addr, err)
		}
		return nil
	})
}
