package lab

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
)

// Host is a simulated host of a lab.
type Host struct {
	Name   string // "h1"
	Number int    // from 1

	lab  *Lab
	file hostFile
}

// The lab's own addresses, from the ranges for documentation (RFC 5737, RFC 3849).
var (
	uplink4  = netip.MustParsePrefix("192.0.2.0/24")
	uplink6  = netip.MustParsePrefix("2001:db8:0:1::/64")
	gateway4 = netip.MustParseAddr("192.0.2.254")
	gateway6 = netip.MustParseAddr("2001:db8:0:1::fe")

	// Outside4 and Outside6 are addresses of the outside world that no host is on link with.
	Outside4 = netip.MustParseAddr("198.51.100.1")
	Outside6 = netip.MustParseAddr("2001:db8:ffff::1")
)

const (
	blockBits4 = 26
	blockBits6 = 122
)

// plan decides every name and address of a lab.
func plan(cfg Config) (labFile, error) {
	f := labFile{Name: cfg.Name, Created: time.Now().Round(0), Outside: cfg.Outside, MTU: cfg.MTU, Network: cfg.Network,
		Foreign: cfg.Conflist != ""}
	f.CNIPath = append([]string{filepath.Join(BaseDir, cfg.Name, "bin")}, cfg.CNIPath...)
	for i := 1; i <= cfg.Hosts; i++ {
		h := hostFile{
			Name:      fmt.Sprintf("h%d", i),
			Netns:     fmt.Sprintf("%s-h%d", cfg.Name, i),
			Addr4:     netip.PrefixFrom(nth(uplink4.Addr(), i), uplink4.Bits()),
			Addr6:     netip.PrefixFrom(nth(uplink6.Addr(), i), uplink6.Bits()),
			IPv4Pools: cfg.IPv4Pools,
			IPv6Pools: cfg.IPv6Pools,
		}
		if cfg.Hosts > 1 && !cfg.SharedPools {
			var err error
			if h.IPv4Pools, err = share(cfg.IPv4Pools, blockBits4, i); err != nil {
				return labFile{}, err
			}
			if h.IPv6Pools, err = share(cfg.IPv6Pools, blockBits6, i); err != nil {
				return labFile{}, err
			}
		}
		f.Hosts = append(f.Hosts, h)
	}
	return f, nil
}

// nth returns the address n after a. n is small enough never to carry beyond the last 32 bits.
func nth(a netip.Addr, n int) netip.Addr {
	b := a.AsSlice()
	tail := b[len(b)-4:]
	binary.BigEndian.PutUint32(tail, binary.BigEndian.Uint32(tail)+uint32(n))
	out, _ := netip.AddrFromSlice(b)
	return out
}

// share returns the i-th (from 1) block of each pool.
func share(pools []netip.Prefix, bits, i int) ([]netip.Prefix, error) {
	out := []netip.Prefix{}
	for _, p := range pools {
		b := netip.PrefixFrom(nth(p.Masked().Addr(), (i-1)<<(p.Addr().BitLen()-bits)), bits)
		if p.Bits() > bits || !p.Contains(b.Addr()) {
			return nil, fmt.Errorf("pool %s has no /%d for host h%d", p, bits, i)
		}
		out = append(out, b)
	}
	return out, nil
}

// Addr is the host's IPv4 address on the uplink.
func (h *Host) Addr() netip.Addr { return h.file.Addr4.Addr() }

// Addr6 is the host's IPv6 address on the uplink.
func (h *Host) Addr6() netip.Addr { return h.file.Addr6.Addr() }

// Pools are the host's pools as in its configuration list, IPv4 first.
func (h *Host) Pools() []netip.Prefix {
	return append(append([]netip.Prefix{}, h.file.IPv4Pools...), h.file.IPv6Pools...)
}

// Dir holds what the host keeps on disk; it is gone after Down, so test files may be put there.
func (h *Host) Dir() string { return filepath.Join(h.lab.Dir, h.Name) }

// StateDir is the plugin's state_dir on this host. The plugin makes it.
func (h *Host) StateDir() string { return filepath.Join(h.Dir(), "state") }

// BPFDir is the plugin's bpffs_dir on this host, in the lab's bpffs. The plugin makes it.
func (h *Host) BPFDir() string { return filepath.Join(h.lab.bpfDir(), h.Name) }

// BootIDFile is the plugin's boot_id_file on this host.
func (h *Host) BootIDFile() string { return filepath.Join(h.Dir(), "boot-id") }

// ConfDir is a CNI configuration directory with the host's one configuration list.
func (h *Host) ConfDir() string { return filepath.Join(h.Dir(), "net.d") }

// ConfFile is the host's configuration list. It is read anew by each invocation and may be edited.
func (h *Host) ConfFile() string { return filepath.Join(h.ConfDir(), "10-lab.conflist") }

// CacheDir is libcni's cache of this host (in place of /var/lib/cni).
func (h *Host) CacheDir() string { return filepath.Join(h.Dir(), "cni-cache") }

// CNIPath are the directories in which this lab finds plugins; the first one has ours.
func (h *Host) CNIPath() []string { return h.lab.file.CNIPath }

// Netns is the path of the host's network namespace.
func (h *Host) Netns() string { return netns.Path(h.file.Netns) }

// Lab is the lab that the host belongs to.
func (h *Host) Lab() *Lab { return h.lab }

// Namespace is the host's network namespace to run things in.
func (h *Host) Namespace() Namespace {
	env := append(h.lab.env(),
		"CARACAL_LAB_HOST="+h.Name, "CARACAL_STATE_DIR="+h.StateDir(), "CARACAL_BPFFS_DIR="+h.BPFDir(),
		"CARACAL_BOOT_ID_FILE="+h.BootIDFile(), "CARACAL_NODENAME="+h.Name, "CARACAL_SOCKET="+h.Socket())
	if isFile(h.lab.storeFile()) {
		env = append(env, "CARACAL_CONFIG="+h.lab.storeFile())
	}
	return Namespace{Netns: h.Netns(), env: env}
}

// SetBootID writes a new boot id, as a reboot does. See also Reboot.
func (h *Host) SetBootID() error {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	id := fmt.Sprintf("%x-%x-%x-%x-%x\n", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	if err := os.WriteFile(h.BootIDFile()+".new", []byte(id), 0o644); err != nil {
		return fmt.Errorf("write boot id: %w", err)
	}
	if err := os.Rename(h.BootIDFile()+".new", h.BootIDFile()); err != nil {
		return fmt.Errorf("write boot id: %w", err)
	}
	return nil
}

func (h *Host) build(cfg Config) error {
	for _, dir := range []string{h.Dir(), h.podsDir(), h.ConfDir(), h.CacheDir()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("create host: %w", err)
		}
	}
	if err := h.SetBootID(); err != nil {
		return err
	}
	list, err := conflist(cfg, h)
	if err != nil {
		return err
	}
	if err := os.WriteFile(h.ConfFile(), list, 0o644); err != nil {
		return fmt.Errorf("create host: %w", err)
	}
	if err := h.plugIn(); err != nil {
		return err
	}
	if !cfg.StaticRoutes {
		return nil
	}
	return h.Namespace().Do(h.routeToOthers)
}

// plugIn makes the host's namespace and connects it to the switch.
func (h *Host) plugIn() error {
	gw4, gw6 := netip.Addr{}, netip.Addr{}
	if h.lab.file.Outside {
		gw4, gw6 = gateway4, gateway6
	}
	return h.lab.plug(h.file.Netns, h.Name, h.Number, []netip.Prefix{h.file.Addr4, h.file.Addr6}, gw4, gw6)
}

// routeToOthers runs in the host's namespace.
func (h *Host) routeToOthers() error {
	for _, o := range h.lab.Hosts() {
		if o.Number == h.Number {
			continue
		}
		for _, p := range o.Pools() {
			via := o.Addr()
			if p.Addr().Is6() {
				via = o.Addr6()
			}
			if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(p), Gw: via.AsSlice()}); err != nil {
				return fmt.Errorf("add route %s via %s: %w", p, via, err)
			}
		}
	}
	return nil
}

func (l *Lab) buildSwitch() error {
	if err := netns.Create(l.switchNetns()); err != nil {
		return err
	}
	return l.Switch().Do(func() error {
		if err := loopbackUp(); err != nil {
			return err
		}
		snooping := false // no querier here: without it a group joined is a group reached
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0", MTU: l.file.MTU}, MulticastSnooping: &snooping}
		if err := netlink.LinkAdd(br); err != nil {
			return fmt.Errorf("create bridge: %w", err)
		}
		if err := setSysctl("net/ipv6/conf/br0/disable_ipv6", "1"); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(br); err != nil {
			return fmt.Errorf("set bridge up: %w", err)
		}
		return nil
	})
}

func (l *Lab) buildOutside() error {
	addrs := []netip.Prefix{netip.PrefixFrom(gateway4, uplink4.Bits()), netip.PrefixFrom(gateway6, uplink6.Bits())}
	if err := l.plug(l.outsideNetns(), "outside", 254, addrs, netip.Addr{}, netip.Addr{}); err != nil {
		return err
	}
	return l.Outside().Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		for _, a := range []netip.Addr{Outside4, Outside6} {
			if err := addAddr(lo, netip.PrefixFrom(a, a.BitLen())); err != nil {
				return err
			}
		}
		return nil
	})
}

// plug makes a namespace with eth0 whose other end is port of the switch. An invalid gateway means no default route.
func (l *Lab) plug(name, port string, number int, addrs []netip.Prefix, gw ...netip.Addr) error {
	if err := netns.Create(name); err != nil {
		return err
	}
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		return err
	}
	defer ns.Close()
	err = l.Switch().Do(func() error {
		br, err := netlink.LinkByName("br0")
		if err != nil {
			return fmt.Errorf("find bridge: %w", err)
		}
		veth := &netlink.Veth{
			LinkAttrs:        netlink.LinkAttrs{Name: port, MTU: l.file.MTU, MasterIndex: br.Attrs().Index},
			PeerName:         "eth0",
			PeerHardwareAddr: net.HardwareAddr{0x02, 0xca, 0x2a, 0xca, 0x00, byte(number)},
			PeerNamespace:    netlink.NsFd(ns.FD()),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("create uplink: %w", err)
		}
		if err := setSysctl("net/ipv6/conf/"+port+"/disable_ipv6", "1"); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(veth); err != nil {
			return fmt.Errorf("set port %s up: %w", port, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return ns.Do(func() error { return configureUplink(l.file.MTU, addrs, gw) })
}

// unplug removes a port of the switch and waits for nothing: a namespace that ended may have taken it along already.
func (l *Lab) unplug(port string) error {
	return l.Switch().Do(func() error {
		link, err := netlink.LinkByName(port)
		if nl.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find port %s: %w", port, err)
		}
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove port %s: %w", port, err)
		}
		return nil
	})
}

// configureUplink runs in the namespace whose eth0 it sets up.
func configureUplink(mtu int, addrs []netip.Prefix, gw []netip.Addr) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	for _, s := range [][2]string{
		// A fresh host forwards nothing, whatever the machine does: that is for the plugin to change.
		{"net/ipv4/ip_forward", "0"},
		{"net/ipv6/conf/all/forwarding", "0"},
		{"net/ipv6/conf/eth0/accept_dad", "0"}, // usable at once
	} {
		if err := setSysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := netlink.LinkSetMTU(eth0, mtu); err != nil {
		return fmt.Errorf("set MTU of eth0: %w", err)
	}
	for _, a := range addrs {
		if err := addAddr(eth0, a); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("set eth0 up: %w", err)
	}
	for _, g := range gw {
		if !g.IsValid() {
			continue
		}
		any4or6 := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if g.Is6() {
			any4or6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(any4or6), Gw: g.AsSlice(), LinkIndex: eth0.Attrs().Index}); err != nil {
			return fmt.Errorf("add default route via %s: %w", g, err)
		}
	}
	return nil
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

func addAddr(link netlink.Link, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	a.IP = p.Addr().AsSlice()
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, a); err != nil {
		return fmt.Errorf("add address %s to %s: %w", p, link.Attrs().Name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// setSysctl writes a setting of the calling thread's network namespace. A machine without IPv6 has none of its settings.
func setSysctl(name, value string) error {
	err := os.WriteFile("/proc/sys/"+name, []byte(value), 0)
	if err != nil && !(errors.Is(err, os.ErrNotExist) && len(name) > 8 && name[:8] == "net/ipv6") {
		return fmt.Errorf("set sysctl: %w", err)
	}
	return nil
}
