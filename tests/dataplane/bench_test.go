package dataplane

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// What a TC program returns.
const (
	actionNext     = -1
	actionShot     = 2
	actionRedirect = 7
)

// bench is a node with pods a and b whose interfaces are down, so that nothing is counted but what a test runs. It has an
// uplink, behind which is the block of pod r.
type bench struct {
	*node
	a, b, r  *pod
	programs map[string]*ebpf.Program
	counts   *ebpf.Map
	last     []uint64
}

// quietPod is a pod that the maps know and that has an interface, but no namespace behind it.
func (n *node) quietPod(name string, index int, opts ...podOption) *pod {
	n.t.Helper()
	p := &pod{
		name: name, hostIf: "cali-" + name,
		v4: netip.MustParseAddr(fmt.Sprintf("10.65.0.%d", index)), v6: netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", index)),
	}
	p.commit = commit.Pod{
		Addrs: []netip.Addr{p.v4, p.v6}, MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(index)}, HostMAC: gatewayMAC,
		MTU: 1500, Network: "test",
	}
	for _, o := range opts {
		o(&p.commit)
	}
	n.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = p.hostIf, gatewayMAC
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "p-" + name, PeerHardwareAddr: p.commit.MAC}); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		link, err := netlink.LinkByName(p.hostIf)
		if err != nil {
			return err
		}
		p.commit.IfIndex = link.Attrs().Index
		return commit.AddPod(n.maps, p.commit)
	})
	return p
}

func newBench(t testing.TB, cfg loader.Config) *bench {
	t.Helper()
	n := newNode(t, cfg)
	b := &bench{node: n, a: n.quietPod("a", 1), b: n.quietPod("b", 2), programs: make(map[string]*ebpf.Program)}
	blocks := []netip.Prefix{netip.MustParsePrefix("10.65.0.0/26"), netip.MustParsePrefix("2001:db8::/122")}
	if err := commit.SetNode(n.maps, []netip.Addr{outside}, blocks); err != nil {
		t.Fatal(err)
	}
	b.addUplink()
	for _, hook := range []string{bpf.DataplaneProgFromPod, bpf.DataplaneProgToPod, bpf.DataplaneProgFromNet, bpf.DataplaneProgToNet} {
		p, err := ebpf.LoadPinnedProgram(bpf.ProgramPath(n.dir, hook), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		b.programs[hook] = p
	}
	var err error
	if b.counts, err = ebpf.LoadPinnedMap(bpf.MapPath(n.dir, bpf.DataplaneMapCaracalCounts), nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.counts.Close() })
	b.last = b.snapshot()
	return b
}

func (b *bench) addUplink() {
	b.t.Helper()
	b.r = &pod{name: "r", v4: netip.MustParseAddr("10.65.2.1"), v6: netip.MustParseAddr("2001:db8:0:2::1")}
	b.r.commit.MAC = net.HardwareAddr{2, 0, 0, 0, 2, 1}
	b.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = "up0", gatewayMAC
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "p-up0"}); err != nil {
			return fmt.Errorf("add uplink: %w", err)
		}
		l, err := netlink.LinkByName("up0")
		if err != nil {
			return err
		}
		b.up = l.Attrs().Index
		return nil
	})
	remote := maps.Route{Prefix: netip.MustParsePrefix("10.65.2.0/26"), Kind: maps.RouteRemote, IfIndex: uint32(b.up), NextHop: netip.MustParseAddr("198.51.100.2")}
	remote6 := remote
	remote6.Prefix, remote6.NextHop = netip.MustParsePrefix("2001:db8:0:2::/122"), netip.MustParseAddr("fe80::2")
	if err := commit.SetRemote(b.maps, []maps.Route{remote, remote6}); err != nil {
		b.t.Fatal(err)
	}
}

// snapshot reads the packets of every place of caracal_counts, the unnamed ones too.
func (b *bench) snapshot() []uint64 {
	b.t.Helper()
	out := make([]uint64, b.counts.MaxEntries())
	var perCPU []bpf.DataplaneCount
	for i := range out {
		if err := b.counts.Lookup(uint32(i), &perCPU); err != nil {
			b.t.Fatal(err)
		}
		for _, n := range perCPU {
			out[i] += n.Packets
		}
	}
	return out
}

// skb is what a packet has beside its bytes.
type skb struct {
	ifindex, ingress, mark, gsoSize, gsoSegs uint32
}

// result is what became of one packet.
type result struct {
	verdict string
	action  int32
	out     []byte
	mark    uint32
}

// exec runs a program on a frame and does not look at the counters. The calling thread is in the node's namespace.
func (b *bench) exec(hook string, frame []byte, s skb) (result, error) {
	// struct __sk_buff; the offsets are the kernel's ABI.
	ctx, back := make([]byte, 192), make([]byte, 192)
	for offset, v := range map[int]uint32{8: s.mark, 36: s.ingress, 40: s.ifindex, 164: s.gsoSegs, 176: s.gsoSize} {
		binary.NativeEndian.PutUint32(ctx[offset:], v)
	}
	opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: ctx, ContextOut: &back}
	action, err := b.programs[hook].Run(opts)
	if err != nil {
		return result{}, fmt.Errorf("run %s on %x: %w", hook, frame, err)
	}
	return result{action: int32(action), out: opts.DataOut, mark: binary.NativeEndian.Uint32(back[8:])}, nil
}

// run runs a program on a frame and tells its one verdict.
func (b *bench) run(hook string, frame []byte, s skb) result {
	b.t.Helper()
	var r result
	b.do(func() (err error) {
		r, err = b.exec(hook, frame, s)
		return err
	})
	r.verdict = b.counted(hook, max(1, uint64(s.gsoSegs)))
	return r
}

// counted tells which one counter of the hook gained exactly this many packets since it was last asked.
func (b *bench) counted(hook string, packets uint64) string {
	b.t.Helper()
	now, found := b.snapshot(), ""
	last := b.last
	b.last = now
	for i, n := range now {
		gained := n - last[i]
		if gained == 0 {
			continue
		}
		h, v := i/bpf.VerdictSpace, i%bpf.VerdictSpace
		if v < len(bpf.Verdicts) && bpf.Verdicts[v].Word == "answer_nd" && gained == 1 {
			gained = packets // an answer is one packet, however large the question
		}
		if v >= len(bpf.Verdicts) || v == 0 || bpf.Hooks[h].Word != hook || gained != packets || found != "" {
			b.t.Fatalf("counter %d (hook %d, verdict %d) gained %d beside %q, want %d at %s once", i, h, v, gained, found, packets, hook)
		}
		found = bpf.Verdicts[v].Word
	}
	if found == "" {
		b.t.Fatal("packet was not counted")
	}
	return found
}

// fromA runs from_pod on a frame that pod a sends.
func (b *bench) fromA(frame []byte) result {
	b.t.Helper()
	return b.run("from_pod", frame, skb{ifindex: uint32(b.a.commit.IfIndex)})
}

func (b *bench) fromB(frame []byte) result {
	b.t.Helper()
	return b.run("from_pod", frame, skb{ifindex: uint32(b.b.commit.IfIndex)})
}

// stackToB runs to_pod on a frame for pod b that came into the host by the given interface, 0: from a process.
func (b *bench) stackToB(frame []byte, ingress uint32) result {
	b.t.Helper()
	return b.run("to_pod", frame, skb{ifindex: uint32(b.b.commit.IfIndex), ingress: ingress})
}

// fromNet runs from_net on a frame that came in by the uplink.
func (b *bench) fromNet(frame []byte) result {
	b.t.Helper()
	return b.run("from_net", frame, skb{ifindex: uint32(b.up)})
}

// wantAction is the action that goes with a verdict.
func wantAction(verdict string) int32 {
	switch {
	case verdict == "forward_pod", verdict == "forward_net", verdict == "answer_arp", verdict == "answer_nd":
		return actionRedirect
	case verdict == "control", len(verdict) > 5 && verdict[:5] == "drop_":
		return actionShot
	}
	return actionNext
}

// check fails unless the packet had this verdict, the action that goes with it, and left as it should.
func check(t testing.TB, in []byte, r result, verdict string) {
	t.Helper()
	if r.verdict != verdict {
		t.Fatalf("verdict %s, want %s; packet %x", r.verdict, verdict, in)
	}
	if err := r.consistent(in); err != nil {
		t.Fatalf("%v; packet %x became %x", err, in, r.out)
	}
}

// consistent checks what holds for every packet: action and bytes go with the verdict.
func (r result) consistent(in []byte) error {
	if r.action != wantAction(r.verdict) {
		return fmt.Errorf("verdict %s came with action %d", r.verdict, r.action)
	}
	if r.action == actionShot {
		return nil
	}
	switch r.verdict {
	case "answer_arp", "answer_nd":
		return nil
	case "forward_from_stack", "forward_judged":
		if !bytes.Equal(in[6:], r.out[6:]) {
			return fmt.Errorf("more than the destination MAC was changed")
		}
	case "forward_net":
		if want := hopped(in, in[:12]); !bytes.Equal(want, r.out) {
			return fmt.Errorf("forwarded packet is not %x", want)
		}
	case "forward_pod":
		if want := hopped(in, r.out[:12]); !bytes.Equal(want, r.out) {
			return fmt.Errorf("forwarded packet is not %x", want)
		}
	default:
		if !bytes.Equal(in, r.out) {
			return fmt.Errorf("packet was changed with verdict %s", r.verdict)
		}
	}
	return nil
}

// hopped is what a router makes of a frame: other MAC addresses, one hop fewer, checksum changed to match (RFC 1624).
func hopped(frame, macs []byte) []byte {
	out := bytes.Clone(frame)
	copy(out, macs)
	if out[12] == 0x86 {
		out[14+7]--
		return out
	}
	old := binary.BigEndian.Uint16(out[14+8:])
	out[14+8]--
	sum := uint32(^binary.BigEndian.Uint16(out[14+10:])) + uint32(^old) + uint32(binary.BigEndian.Uint16(out[14+8:]))
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(out[14+10:], ^uint16(sum))
	return out
}

// build serializes layers with right lengths and checksums.
func build(all ...gopacket.SerializableLayer) []byte {
	var network gopacket.NetworkLayer
	for _, l := range all {
		switch l := l.(type) {
		case *layers.IPv4:
			network = l
		case *layers.IPv6:
			network = l
		case *layers.TCP:
			l.SetNetworkLayerForChecksum(network)
		case *layers.UDP:
			l.SetNetworkLayerForChecksum(network)
		case *layers.ICMPv6:
			l.SetNetworkLayerForChecksum(network)
		}
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, all...); err != nil {
		panic(err)
	}
	return bytes.Clone(buf.Bytes())
}

func eth(src *pod, kind layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: src.commit.MAC, DstMAC: gatewayMAC, EthernetType: kind}
}

// network is the Ethernet and IP header of a packet; the family is the addresses'.
func network(sender *pod, src, dst netip.Addr, protocol layers.IPProtocol) []gopacket.SerializableLayer {
	if src.Is4() {
		return []gopacket.SerializableLayer{eth(sender, layers.EthernetTypeIPv4),
			&layers.IPv4{Version: 4, IHL: 5, TTL: 64, Id: 7, Protocol: protocol, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}}
	}
	return []gopacket.SerializableLayer{eth(sender, layers.EthernetTypeIPv6),
		&layers.IPv6{Version: 6, HopLimit: 64, NextHeader: protocol, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}}
}

func udp(sender *pod, src, dst netip.AddrPort, payload int) []byte {
	return build(append(network(sender, src.Addr(), dst.Addr(), layers.IPProtocolUDP),
		&layers.UDP{SrcPort: layers.UDPPort(src.Port()), DstPort: layers.UDPPort(dst.Port())}, gopacket.Payload(make([]byte, payload)))...)
}

// tcp builds a segment; flags are letters of SAFR.
func tcp(sender *pod, src, dst netip.AddrPort, flags string, payload int) []byte {
	l := &layers.TCP{SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()), Window: 1000}
	for _, f := range flags {
		switch f {
		case 'S':
			l.SYN = true
		case 'A':
			l.ACK = true
		case 'F':
			l.FIN = true
		case 'R':
			l.RST = true
		}
	}
	return build(append(network(sender, src.Addr(), dst.Addr(), layers.IPProtocolTCP), l, gopacket.Payload(make([]byte, payload)))...)
}

// raw builds a packet of any protocol.
func raw(sender *pod, src, dst netip.Addr, protocol layers.IPProtocol, payload []byte) []byte {
	return build(append(network(sender, src, dst, protocol), gopacket.Payload(payload))...)
}

func sctp(sender *pod, src, dst netip.AddrPort, chunk byte) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	h[12], h[15] = chunk, 8
	return raw(sender, src.Addr(), dst.Addr(), layers.IPProtocolSCTP, h)
}

// echo builds an ICMP echo request, or reply, of either family.
func echo(sender *pod, src, dst netip.Addr, id uint16, reply bool) []byte {
	if src.Is4() {
		kind := uint8(layers.ICMPv4TypeEchoRequest)
		if reply {
			kind = layers.ICMPv4TypeEchoReply
		}
		return build(append(network(sender, src, dst, layers.IPProtocolICMPv4),
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(kind, 0), Id: id}, gopacket.Payload("echo"))...)
	}
	kind := uint8(layers.ICMPv6TypeEchoRequest)
	if reply {
		kind = layers.ICMPv6TypeEchoReply
	}
	return build(append(network(sender, src, dst, layers.IPProtocolICMPv6),
		&layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, 0)}, &layers.ICMPv6Echo{Identifier: id}, gopacket.Payload("echo"))...)
}

// unreachable builds an ICMP error from src to dst that quotes a frame's IP packet.
func unreachable(sender *pod, src, dst netip.Addr, frame []byte) []byte {
	quote := frame[14:]
	quote = quote[:min(len(quote), 60)]
	if src.Is4() {
		return build(append(network(sender, src, dst, layers.IPProtocolICMPv4),
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodePort)}, gopacket.Payload(quote))...)
	}
	return build(append(network(sender, src, dst, layers.IPProtocolICMPv6),
		&layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeDestinationUnreachable, 4)}, gopacket.Payload(make([]byte, 4)), gopacket.Payload(quote))...)
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// patch copies a frame and writes bytes at an offset.
func patch(frame []byte, offset int, b ...byte) []byte {
	out := bytes.Clone(frame)
	copy(out[offset:], b)
	return out
}

// policy writes the policy ids of a pod and raises the epoch.
func (n *node) policy(p *pod, egress, ingress uint32) {
	n.t.Helper()
	got, err := n.maps.Pod(uint32(p.commit.IfIndex))
	if err != nil {
		n.t.Fatal(err)
	}
	got.PolicyEgress, got.PolicyIngress = egress, ingress
	if err := n.maps.PutPod(got); err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.maps.RaiseEpoch(); err != nil {
		n.t.Fatal(err)
	}
}

// state reads the node's state.
func (n *node) state() maps.State {
	n.t.Helper()
	s, err := n.maps.State()
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}
