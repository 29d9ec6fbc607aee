package ctl

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// natRemedies are the ways out of what ends packets that are to be masqueraded.
var natRemedies = map[string]string{
	"drop_nat_ports":    "each flow to one address and port takes one: caracald --masquerade-ports sets a larger range",
	"drop_nat_address":  "give the uplink an address of that family; or pods of that family a pool without natOutgoing and no ipMasq",
	"drop_nat_protocol": "SCTP and protocols without ports keep their pod's address only in a pool without natOutgoing and without ipMasq, to which the outside has routes",
}

// masqueraded tells the families of which some pod leaves with the host's address.
func (d *doctor) masqueraded() (v4, v6 bool) {
	for _, e := range d.others {
		v4 = v4 || e.Masquerade4 && slices.ContainsFunc(e.Addrs, netip.Addr.Is4)
		v6 = v6 || e.Masquerade6 && slices.ContainsFunc(e.Addrs, netip.Addr.Is6)
	}
	return v4, v6
}

// waysOut names the interfaces by which masqueraded packets leave: those with a default route, and those that have entries.
func (d *doctor) waysOut() []string {
	v4, v6 := d.masqueraded()
	if !v4 && !v6 || d.maps == nil {
		return nil
	}
	var names []string
	defaults, _ := cni.DefaultUplinks(&netlink.Handle{}) // what can't be listed is checkMasquerade's to tell
	for name := range defaults {
		names = append(names, name)
	}
	entries, _ := d.maps.Uplinks()
	for index := range entries {
		if name, err := nl.Name(int(index)); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// checkMasquerade: what pods send to the outside gets an address that this host has, and ports that nobody else uses.
func (d *doctor) checkMasquerade() error {
	if d.maps == nil || d.mapsErr != nil {
		d.skipped("the kernel maps can't be read")
		return nil
	}
	v4, v6 := d.masqueraded()
	if !v4 && !v6 {
		d.skipped("no pod is masqueraded: neither natOutgoing of its IPPool nor ipMasq asks for it")
		return nil
	}
	s, err := d.maps.State()
	if err != nil {
		return err
	}
	if s.NATPorts == (maps.Ports{}) {
		d.fail("start the agent (systemctl start caracald), or add a pod that is masqueraded: both set them",
			"caracal_state has no ports for it: what masqueraded pods send to the outside is dropped (drop_nat_ports)")
	} else if err := d.comparePorts(s.NATPorts); err != nil {
		return err
	}
	outside, wrong, err := d.compareUplinks(v4, v6)
	if err != nil {
		return err
	}
	if len(wrong) > 0 { // unless the agent was at work
		d.pause()
		if outside, wrong, err = d.compareUplinks(v4, v6); err != nil {
			return err
		}
	}
	d.diagnoses = append(d.diagnoses, wrong...)
	for _, c := range d.before {
		if remedy := natRemedies[c.Verdict]; remedy != "" && c.Packets > 0 {
			d.found(statusWarn, c.Verdict, remedy, "%d packets at %s since the maps were made: %s", c.Packets, c.Hook, c.Meaning)
		}
	}
	if d.silent() {
		d.ok("pods leave as %s, from ports %s", strings.Join(outside, ", "), s.NATPorts)
	}
	return nil
}

// compareUplinks finds the addresses that pods leave with, and what is wrong with them.
func (d *doctor) compareUplinks(v4, v6 bool) (outside []string, wrong []diagnosis, err error) {
	entries, err := d.maps.Uplinks()
	if err != nil {
		return nil, nil, err
	}
	held, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses: %w", err)
	}
	add := func(status, name, format string, args ...any) {
		wrong = append(wrong, diagnosis{Name: d.check + " " + name, Status: status, Detail: fmt.Sprintf(format, args...),
			Remedy: "restart the agent (systemctl restart caracald), which writes what the interface has; if it has none: " + natRemedies["drop_nat_address"]})
	}
	for _, name := range d.uplinks() {
		index, err := nl.Index(name)
		if err != nil {
			continue // checkUplinks tells
		}
		if _, err := loader.AttachedNet(d.bpffsDir, name, index); err != nil {
			continue // likewise
		}
		u, there := entries[uint32(index)]
		if !there {
			add(statusFail, name, "caracal_uplinks has no entry of it: what masqueraded pods send by it is dropped (drop_nat_address)")
			continue
		}
		for _, f := range []struct {
			word   string
			number int
			wanted bool
			addr   netip.Addr
		}{{"IPv4", netlink.FAMILY_V4, v4, u.IPv4}, {"IPv6", netlink.FAMILY_V6, v6, u.IPv6}} {
			switch {
			case !f.wanted:
			case f.addr.IsValid() && slices.ContainsFunc(held, func(x netlink.Addr) bool { return x.IP.Equal(f.addr.AsSlice()) }):
				outside = append(outside, f.addr.String())
			case f.addr.IsValid():
				add(statusFail, name, "caracal_uplinks has %s, which this host has not: no answer comes back", f.addr)
			default:
				defaults, err := cni.DefaultUplinks(&netlink.Handle{}, f.number)
				if err != nil {
					return nil, nil, err
				}
				if _, ok := defaults[name]; ok {
					add(statusFail, name, "caracal_uplinks has no %s address of it, and the default route is by it: what masqueraded pods send is dropped (drop_nat_address)", f.word)
				}
			}
		}
	}
	return outside, wrong, nil
}

// comparePorts finds ports of masqueraded flows that the host's own connections may get, or that it listens on: an answer
// to the host would be taken for one to a pod, or the port is passed by.
func (d *doctor) comparePorts(ports maps.Ports) error {
	const remedy = "caracald --masquerade-ports names others; ip_local_port_range and ip_local_reserved_ports are the host's"
	text, err := sysctl("ipv4/ip_local_port_range") // of both families
	if err != nil {
		return err
	}
	var first, last uint16
	if _, err := fmt.Sscan(text, &first, &last); err != nil {
		return fmt.Errorf("sysctl net/ipv4/ip_local_port_range %q: %w", text, err)
	}
	if ports.First <= last && first <= ports.Last {
		d.warn(remedy, "pods leave from ports %s, and the host's own connections from %d-%d (net/ipv4/ip_local_port_range): two may meet", ports, first, last)
	}
	var taken []string
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		at, err := listening(table)
		if err != nil {
			return err
		}
		for _, a := range at {
			if !a.Addr().IsLoopback() && a.Port() >= ports.First && a.Port() <= ports.Last {
				taken = append(taken, fmt.Sprintf("%s/%d", strings.TrimSuffix(table, "6"), a.Port()))
			}
		}
	}
	slices.Sort(taken)
	if taken = slices.Compact(taken); len(taken) > 0 {
		more := ""
		if len(taken) > 8 {
			more, taken = fmt.Sprintf(" and %d more", len(taken)-8), taken[:8]
		}
		d.warn(remedy, "this host listens on ports that pods leave from (%s): %s%s", ports, strings.Join(taken, ", "), more)
	}
	return nil
}

// listening reads where sockets of a table of /proc/net (tcp, tcp6, udp, udp6) wait for anybody. None when the kernel lacks
// the family.
func listening(table string) ([]netip.AddrPort, error) {
	b, err := os.ReadFile("/proc/thread-self/net/" + table)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read sockets: %w", err)
	}
	return parseListening(string(b)), nil
}

// Socket states of /proc/net (the kernel's net/tcp_states.h). An unconnected UDP socket's is "closed".
const (
	tcpClose  = "07"
	tcpListen = "0A"
)

// parseListening reads proc(5)'s table of sockets. Lines that are none are passed by.
func parseListening(table string) (at []netip.AddrPort) {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != tcpListen && f[3] != tcpClose {
			continue
		}
		address, port, _ := strings.Cut(f[1], ":")
		b, err := hex.DecodeString(address)
		p, perr := strconv.ParseUint(port, 16, 16)
		if err != nil || perr != nil || len(b)%4 != 0 {
			continue
		}
		for i := 0; i < len(b); i += 4 { // each four bytes are a number of this machine's order
			binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
		}
		if a, ok := netip.AddrFromSlice(b); ok {
			at = append(at, netip.AddrPortFrom(a.Unmap(), uint16(p)))
		}
	}
	return at
}

// wayBack says what the receiver of a pod's packets needs a way back to.
func (d *doctor) wayBack(from node.Endpoint, to netip.Addr) string {
	r := d.routeTo(to)
	switch r.Kind {
	case maps.RouteLocalPod, maps.RouteHost, maps.RouteTunnel, maps.RoutePool, maps.RouteBlackhole:
		return "its way back to the pod"
	}
	own, ok := ownAddress(from, to)
	switch {
	case !ok || r.InPool:
		return "its way back to the pod"
	case own.Is4() && from.Masquerade4 || own.Is6() && from.Masquerade6:
		return "its way back to this host, whose address the pod leaves with"
	}
	return fmt.Sprintf("its way back to %s, with which the pod leaves (natOutgoing of its IPPool, or ipMasq, makes it the host's address)", own)
}
