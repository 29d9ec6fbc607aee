package ctl

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

const (
	probeSize = 84 // bytes of IP packet, as ping sends
	patient   = 3  // how often what is not answered is asked
)

// probe is one destination that a pod asks.
type probe struct {
	what  string // the pod, this node, a node, --to
	to    netip.Addr
	route maps.Route // to it, in the maps; zero: none
	echo  echo
	err   error
}

// prober is the pod that asks: the first one that lives, or --pod's.
func (d *doctor) prober() (node.Endpoint, bool) {
	for _, e := range d.endpoints {
		if dead(e) == "" && len(e.Addrs) > 0 {
			return e, true
		}
	}
	return node.Endpoint{}, false
}

// ownAddress is the pod's address of another address's family.
func ownAddress(e node.Endpoint, to netip.Addr) (netip.Addr, bool) {
	i := slices.IndexFunc(e.Addrs, func(a netip.Addr) bool { return a.Is4() == to.Is4() })
	if i < 0 {
		return netip.Addr{}, false
	}
	return e.Addrs[i], true
}

// checkProbes: a pod reaches another one of this node, this node, the other nodes, and --to.
func (d *doctor) checkProbes() error {
	from, ok := d.prober()
	if !ok {
		d.skipped("no pod of this node lives that could send probes")
		return nil
	}
	if closed(from) {
		d.skipped(toEnter)
		return nil
	}
	probes := d.destinations(from)
	var all sync.WaitGroup
	limit := make(chan struct{}, 32) // sockets at a time
	for _, p := range probes {
		all.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			p.echo, p.err = d.once(from, p.to)
		})
	}
	all.Wait()
	for _, p := range probes {
		about := p.to.String()
		switch {
		case p.err != nil:
			d.found(statusFail, about, "", "%s: %v", p.what, p.err)
		case p.echo.heard:
			d.reached = append(d.reached, p)
			d.found(statusOK, about, "", "%s answers %s in %v, TTL %d", p.what, recorded(from).title(), p.echo.rtt.Round(time.Microsecond), p.echo.ttl)
		case p.echo.fault != "":
			d.found(statusFail, about, "mend what the lines above say, then the route there (ip route get "+about+")", "%s: %s", p.what, p.echo.fault)
		default:
			d.found(statusFail, about, "mend what the lines above say; else look at its own end, at "+d.wayBack(from, p.to)+", and for a firewall (caracalctl counters has what is dropped here)",
				"%s does not answer %s: %d echoes of %v each", p.what, recorded(from).title(), patient, d.timeout)
		}
	}
	if d.silent() {
		d.skipped("%s is alone: there is nothing to probe", recorded(from).title())
	}
	return nil
}

// destinations lists what a pod probes, each address once.
func (d *doctor) destinations(from node.Endpoint) []*probe {
	var all []*probe
	add := func(to netip.Addr, format string, args ...any) {
		known := slices.ContainsFunc(all, func(p *probe) bool { return p.to == to })
		if _, ok := ownAddress(from, to); ok && !known && !to.IsLinkLocalUnicast() {
			all = append(all, &probe{what: fmt.Sprintf(format, args...), to: to, route: d.routeTo(to)})
		}
	}
	for _, e := range d.others {
		if e.Key != from.Key && dead(e) == "" {
			for _, a := range e.Addrs {
				add(a, "pod %s", recorded(e).title())
			}
			break
		}
	}
	for _, v4 := range []bool{true, false} {
		i := slices.IndexFunc(d.routes, func(r maps.Route) bool { return r.Kind == maps.RouteHost && r.Prefix.Addr().Is4() == v4 })
		if i >= 0 {
			add(d.routes[i].Prefix.Addr(), "this node")
		}
	}
	for _, r := range d.remotes() {
		add(r.NextHop, "the node that has %s", r.Prefix)
	}
	for _, s := range d.to {
		to := netip.MustParseAddr(s).Unmap() // run has looked
		if _, ok := ownAddress(from, to); !ok {
			d.found(statusSkipped, s, "", "%s has no address of that family", recorded(from).title())
		}
		add(to, "--to")
	}
	return all
}

// routeTo is the route of the maps that covers an address; zero: none does.
func (d *doctor) routeTo(a netip.Addr) maps.Route {
	var best maps.Route
	for _, r := range d.routes {
		if r.Prefix.Contains(a) && (!best.Prefix.IsValid() || r.Prefix.Bits() > best.Prefix.Bits()) {
			best = r
		}
	}
	return best
}

// once asks until there is an answer or an error, some times.
func (d *doctor) once(from node.Endpoint, to netip.Addr) (echo, error) {
	own, _ := ownAddress(from, to)
	e, err := openEcho(from.Netns, own, to)
	if err != nil {
		return echo{}, err
	}
	defer e.close()
	return d.askFor(e, probeSize)
}

// askFor asks for one size until there is an answer or an error.
func (d *doctor) askFor(e *echoer, size int) (echo, error) {
	for range patient {
		got, err := e.ask(d.cmd.Context(), d.timeout, size)
		if err != nil {
			return echo{}, err
		}
		if got[0].heard || got[0].fault != "" {
			return got[0], nil
		}
	}
	return echo{size: size}, nil
}

// holes is after how many destinations that swallow large packets checkMTU looks at no more: each takes seconds.
const holes = 5

// checkMTU: packets as large as the pod's interface lets out pass, or somebody says that they are too large. One
// destination at a time, because ICMP errors are rationed.
func (d *doctor) checkMTU() error {
	from, ok := d.prober()
	if !ok || len(d.reached) == 0 {
		d.skipped("no probe was answered")
		return nil
	}
	mtu, err := podMTU(from)
	if err != nil {
		return err
	}
	bad, told := 0, ""
	for _, p := range d.reached {
		if bad == holes {
			d.found(statusSkipped, p.to.String(), "", "%d destinations swallow large packets already", holes)
			break
		}
		passes, vanishes, err := d.pathMTU(from, p, mtu)
		about := p.to.String()
		switch {
		case err != nil:
			d.found(statusFail, about, "", "%s: %v", p.what, err)
		case vanishes > 0:
			bad++
			d.found(statusFail, about, fmt.Sprintf("let the ICMP errors of what is on the way through, raise its MTU, or give pods a smaller one (mtu %d in the network configuration)", passes),
				"%s: %d bytes pass, from %d on packets vanish without an ICMP error (the pod's MTU is %d): a black hole", p.what, passes, vanishes, mtu)
		case p.route.Kind == maps.RouteRemote && p.route.MTU > 0 && passes < min(mtu, int(p.route.MTU)):
			d.found(statusWarn, about, "lower the uplink's MTU to what its network carries", "%s: %d bytes pass, the route says %d", p.what, passes, p.route.MTU)
		case passes < mtu:
			told += fmt.Sprintf(", %d to %s, as ICMP errors say", passes, about)
		}
	}
	if d.silent() {
		d.ok("%d bytes pass to what answered%s", mtu, told)
	}
	return nil
}

// podMTU is that of the pod's interface.
func podMTU(e node.Endpoint) (mtu int, err error) {
	err = netns.Do(e.Netns, func() error {
		l, err := netlink.LinkByName(e.Interface())
		if err != nil {
			return fmt.Errorf("interface %s in the pod: %w", e.Interface(), err)
		}
		mtu = l.Attrs().MTU
		return nil
	})
	return mtu, err
}

// pathMTU finds the largest packet that passes. vanishes is the smallest size that nobody answered and nobody refused, 0
// when there is none.
func (d *doctor) pathMTU(from node.Endpoint, p *probe, mtu int) (passes, vanishes int, err error) {
	own, _ := ownAddress(from, p.to)
	e, err := openEcho(from.Netns, own, p.to)
	if err != nil {
		return 0, 0, err
	}
	defer e.close()
	size := mtu
	for range 8 { // an ICMP error may come from each router on the way
		got, err := d.askFor(e, size)
		switch {
		case err != nil:
			return 0, 0, err
		case got.heard:
			return size, 0, nil
		case got.fault == "":
			return d.sweep(e, p, size)
		case got.mtu < probeSize || got.mtu >= size:
			return 0, 0, fmt.Errorf("%d bytes: %s", size, got.fault)
		}
		size = got.mtu
	}
	return 0, 0, errors.New("each ICMP error names a smaller MTU")
}

// sweep closes in on the largest packet that passes, between what was answered and what vanished, many sizes at a time.
func (d *doctor) sweep(e *echoer, p *probe, silent int) (passes, vanishes int, err error) {
	const abreast, tries = 16, 2
	wait := min(d.timeout, max(20*p.echo.rtt, 250*time.Millisecond))
	lo, hi := p.echo.size, silent
	for hi-lo > 1 {
		step := (hi - lo + abreast) / (abreast + 1)
		var sizes []int
		for s := lo + step; s < hi; s += step {
			sizes = append(sizes, s)
		}
		best := lo
		for range tries {
			echoes, err := e.ask(d.cmd.Context(), wait, sizes...)
			if err != nil {
				return 0, 0, err
			}
			for _, x := range echoes {
				if x.heard {
					best = max(best, x.size)
				}
			}
			sizes = slices.DeleteFunc(sizes, func(s int) bool { return s <= best })
		}
		if len(sizes) > 0 {
			hi = sizes[0]
		}
		lo = best
	}
	return lo, hi, nil
}

// checkDNS: the host's nameservers answer the pod. The pod's own resolv.conf is in its mount namespace, which is not
// recorded.
func (d *doctor) checkDNS() error {
	from, ok := d.prober()
	if !ok {
		d.skipped("no pod of this node lives that could ask")
		return nil
	}
	servers, err := nameservers(d.resolvConf)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(servers) == 0 {
		d.skipped("%s names no server, and the pod's own resolv.conf is not known here", d.resolvConf)
		return nil
	}
	if err != nil {
		return err
	}
	for _, s := range servers {
		own, ok := ownAddress(from, s)
		switch {
		case s.IsLoopback():
			d.found(statusSkipped, s.String(), "", "%s names a server of the host's loopback, which a pod can't reach; --resolv-conf names another file", d.resolvConf)
		case !ok:
			d.found(statusSkipped, s.String(), "", "%s has no address of that family", recorded(from).title())
		default:
			began := time.Now()
			if err := d.query(from.Netns, own, netip.AddrPortFrom(s, 53)); err != nil {
				d.found(statusWarn, s.String(), "a fault only if pods are to use this server: is it up, does a firewall let them through, and look at "+d.wayBack(from, s), "no answer to a query from %s: %v", recorded(from).title(), err)
			} else {
				d.found(statusOK, s.String(), "", "answers %s in %v", recorded(from).title(), time.Since(began).Round(time.Microsecond))
			}
		}
	}
	return nil
}

// nameservers reads the servers that a resolv.conf names.
func nameservers(path string) ([]netip.Addr, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var servers []netip.Addr
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			servers = append(servers, a.Unmap())
		}
	}
	return servers, nil
}

// rootQuery asks for the name servers of the root (RFC 1035, section 4): every server has an answer. Its identifier is the
// first two bytes.
var rootQuery = []byte{0xca, 0xca, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1}

// query asks a nameserver from inside a namespace. Whatever it answers, it answers.
func (d *doctor) query(path string, from netip.Addr, server netip.AddrPort) error {
	var c *net.UDPConn
	err := netns.Do(path, func() (err error) {
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(server))
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	for range patient {
		if err := c.SetDeadline(time.Now().Add(d.timeout)); err != nil {
			return err
		}
		if _, err = c.Write(rootQuery); err != nil {
			return err
		}
		b := make([]byte, 4096)
		n, err := c.Read(b)
		if err == nil && n > 2 && b[0] == rootQuery[0] && b[1] == rootQuery[1] {
			return nil
		}
		if errors.Is(err, unix.ECONNREFUSED) {
			return err
		}
		if err := d.cmd.Context().Err(); err != nil {
			return err
		}
	}
	return fmt.Errorf("silence, %d times %v", patient, d.timeout)
}
