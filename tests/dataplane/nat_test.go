package dataplane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// newNATBench is a bench whose pods leave with the addresses of its uplink.
func newNATBench(t testing.TB, cfg loader.Config) *bench {
	t.Helper()
	b := newBench(t, cfg)
	b.masquerade(maps.Ports{First: 61000, Last: 65535})
	b.hostHas(end1.v4.Addr(), end1.v6.Addr())
	for _, p := range []*pod{b.a, b.b} {
		p.commit.Masquerade4, p.commit.Masquerade6 = true, true
		if err := commit.AddPod(b.maps, p.commit); err != nil {
			t.Fatal(err)
		}
	}
	b.last = b.snapshot()
	return b
}

// hostHas names the host's own addresses.
func (b *bench) hostHas(addrs ...netip.Addr) {
	b.t.Helper()
	blocks := []netip.Prefix{netip.MustParsePrefix("10.65.0.0/26"), netip.MustParsePrefix("2001:db8::/122")}
	if err := commit.SetNode(b.maps, append(addrs, outside), blocks); err != nil {
		b.t.Fatal(err)
	}
}

// leave runs what pod p sends to the outside through both hooks on its way.
func (b *bench) leave(p *pod, frame []byte) result {
	b.t.Helper()
	if r := b.run("from_pod", frame, skb{ifindex: uint32(p.commit.IfIndex)}); r.verdict != "stack_routed" {
		return r
	}
	return b.run("to_net", frame, skb{ifindex: uint32(b.up), ingress: uint32(p.commit.IfIndex)})
}

// enter runs what comes for pod p through both hooks on its way. It is the result of the first that did not pass it on.
func (b *bench) enter(p *pod, frame []byte) result {
	b.t.Helper()
	r := b.fromNet(frame)
	if r.verdict == "stack_answer" {
		if d := b.run("to_pod", r.out, skb{ifindex: uint32(p.commit.IfIndex), ingress: uint32(b.up)}); d.verdict != "forward_from_stack" {
			return d
		}
	}
	return r
}

// mirror makes an answer of a packet: it goes back where it came from, and an echo request becomes a reply.
func mirror(frame []byte) []byte {
	out := bytes.Clone(frame)
	at, size, protocol, l4, ok := transportOf(frame)
	if !ok {
		return out
	}
	copy(out[at:], frame[at+size:at+2*size])
	copy(out[at+size:], frame[at:at+size])
	switch {
	case l4 == 0: // a later fragment
	case protocol == 6 || protocol == 17:
		copy(out[l4:], frame[l4+2:l4+4])
		copy(out[l4+2:], frame[l4:l4+2])
	case protocol == 1 && frame[l4] == 8:
		out[l4] = 0
	case protocol == 58 && frame[l4] == 128:
		out[l4] = 129
	}
	return summed(out)
}

// transportOf finds the addresses of an IP packet, their size, its protocol, and the transport header, 0 in later fragments.
// False: it is none whose checksums are known here. It shares nothing with the parser of the programs.
func transportOf(f []byte) (addresses, size int, protocol byte, l4 int, ok bool) {
	if len(f) < 54 || ipEnd(f) > len(f) {
		return
	}
	switch kind := binary.BigEndian.Uint16(f[12:]); {
	case kind == 0x0800 && f[14]>>4 == 4 && f[14]&15 >= 5:
		l4 = 14 + int(f[14]&15)*4
		if l4+8 > ipEnd(f) {
			return
		}
		if binary.BigEndian.Uint16(f[20:])&0x1fff != 0 {
			l4 = 0
		}
		return 26, 4, f[23], l4, f[23] == 1 || f[23] == 6 || f[23] == 17
	case kind == 0x86dd && f[14]>>4 == 6:
		protocol, l4 = f[20], 54
		for protocol == 0 || protocol == 60 || protocol == 44 {
			if l4+8 > ipEnd(f) {
				return
			}
			fragment := protocol == 44
			protocol = f[l4]
			if fragment {
				if binary.BigEndian.Uint16(f[l4+2:])>>3 != 0 {
					return 22, 16, protocol, 0, true
				}
				l4 += 8
				continue
			}
			l4 += 8 + int(f[l4+1])*8
		}
		return 22, 16, protocol, l4, l4+8 <= ipEnd(f) && (protocol == 6 || protocol == 17 || protocol == 58)
	}
	return
}

// ipEnd is where an IP packet ends in its frame: padding may follow.
func ipEnd(f []byte) int {
	if f[12] == 0x08 {
		return 14 + int(binary.BigEndian.Uint16(f[16:]))
	}
	return 54 + int(binary.BigEndian.Uint16(f[18:]))
}

// fragment tells the fragments, whose transport checksum is over bytes that are elsewhere.
func fragment(f []byte) bool {
	if f[12] == 0x08 {
		return binary.BigEndian.Uint16(f[20:])&0x3fff != 0
	}
	for next, at := f[20], 54; next == 0 || next == 60 || next == 44; next, at = f[at], at+8+int(f[at+1])*8 {
		if next == 44 {
			return true
		}
	}
	return false
}

// summed is a packet with the checksums that it should have (RFC 1071, RFC 8200 section 8.1). UDP without one stays without.
func summed(frame []byte) []byte {
	out := bytes.Clone(frame)
	at, size, protocol, l4, ok := transportOf(out)
	if !ok {
		return out
	}
	if size == 4 {
		checksum4(out)
	}
	if fragment(out) {
		return out
	}
	field := l4 + map[byte]int{1: 2, 6: 16, 17: 6, 58: 2}[protocol]
	if field+2 > ipEnd(out) {
		return out
	}
	if protocol == 17 && out[field] == 0 && out[field+1] == 0 {
		return out
	}
	out[field], out[field+1] = 0, 0
	start := uint32(protocol) + uint32(ipEnd(out)-l4) + uint32(sum16(0, out[at:at+2*size]))
	if protocol == 1 {
		start = 0
	}
	sum := ^sum16(start, out[l4:ipEnd(out)])
	if sum == 0 && protocol == 17 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(out[field:], sum)
	return out
}

// entries counts what a map of masqueraded flows holds.
func (b *bench) entries(name string) (n int) {
	b.t.Helper()
	m, err := ebpf.LoadPinnedMap(bpf.MapPath(b.dir, name), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	defer m.Close()
	var key bpf.DataplaneFlowKey
	var value bpf.DataplaneNat
	for all := m.Iterate(); all.Next(&key, &value); {
		n++
	}
	return n
}

// natCases are what a pod sends to the outside.
func natCases(p *pod) map[string][]byte {
	cases := make(map[string][]byte)
	for family, dst := range map[string]netip.Addr{"v4": stranger4, "v6": stranger6} {
		src := p.addr(family == "v6")
		cases[family+" udp"] = udp(p, at(src, 4000), at(dst, 53), 33)
		cases[family+" tcp"] = tcp(p, at(src, 4000), at(dst, 443), "S", 0)
		cases[family+" tcp data"] = tcp(p, at(src, 4001), at(dst, 443), "A", 1001)
		cases[family+" echo"] = echo(p, src, dst, 77, false)
		cases[family+" echo 0"] = echo(p, src, dst, 0, false)
	}
	cases["v4 options"] = options4(cases["v4 udp"])
	cases["v4 no checksum"] = patch(cases["v4 udp"], 40, 0, 0)
	cases["v4 fragment"] = part4(p, p.v4, stranger4, 17, 5, 0, true, patch(make([]byte, 64), 0, 0x0f, 0xa0, 0, 53, 1, 0, 7, 7))
	cases["v6 fragment"] = part6(p, p.v6, stranger6, 17, 5, 0, true, patch(make([]byte, 64), 0, 0x0f, 0xa0, 0, 53, 1, 0, 7, 7))
	cases["v6 options"] = chain6(p, p.v6, stranger6, cases["v6 udp"][54:], 17, 60)
	return cases
}

// FuzzMasquerade sends frames to the outside and their mirror images back: what leaves has the host's address and right
// checksums, computed here, and what comes back is the answer to what the pod sent, to the byte.
func FuzzMasquerade(f *testing.F) {
	b := newNATBench(f, loader.Config{})
	for _, frame := range natCases(b.a) {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < 54 || len(frame) > 3400 {
			return
		}
		b.t = t
		frame = summed(frame)
		up, in := skb{ifindex: uint32(b.up), ingress: uint32(b.a.commit.IfIndex)}, skb{ifindex: uint32(b.up)}
		if r, ok := b.try("from_pod", frame, skb{ifindex: uint32(b.a.commit.IfIndex)}); !ok || r.verdict != "stack_routed" {
			return
		}
		r, ok := b.try("to_net", frame, up)
		if !ok || r.verdict != "forward_masqueraded" {
			return
		}
		if src, _ := sourceOf(r.out); src != end1.v4.Addr() && src != end1.v6.Addr() {
			t.Fatalf("left with source %s", src)
		}
		at, size, _, _, known := transportOf(frame)
		if !known {
			return
		}
		if !bytes.Equal(r.out, summed(r.out)) {
			t.Fatalf("%x left as %x, want %x", frame, r.out, summed(r.out))
		}
		if !bytes.Equal(frame[at+size:at+2*size], r.out[at+size:at+2*size]) {
			t.Fatalf("%x left for elsewhere: %x", frame, r.out)
		}
		left := r.out
		if r, ok = b.try("from_net", b.quoting(left), in); ok && r.verdict == "stack_answer" {
			if err := b.quotes(r.out, frame); err != nil {
				t.Fatalf("error about %x: %v", frame, err)
			}
		}
		answer := mirror(left)
		r, ok = b.try("from_net", answer, in)
		if ok && r.verdict == "stack_answer" && !bytes.Equal(r.out, mirror(frame)) {
			t.Fatalf("%x came in as %x, want %x", answer, r.out, mirror(frame))
		}
	})
}

// quoting is a router's error about what left.
func (b *bench) quoting(left []byte) []byte {
	router := end2.v4.Addr()
	src, _ := sourceOf(left)
	if src.Is6() {
		router = end2.v6.Addr()
	}
	return summed(unreachable(b.r, router, src, left))
}

// quotes checks that an error is for who sent frame, and quotes its addresses and ports.
func (b *bench) quotes(e, frame []byte) error {
	src, _ := sourceOf(frame)
	if got := destinationOf(e); got != src {
		return fmt.Errorf("it is for %s", got)
	}
	if !bytes.Equal(e, summed(e)) {
		return fmt.Errorf("checksum of %x, want %x", e, summed(e))
	}
	at, size, protocol, l4, _ := transportOf(frame)
	quote := 14 + 20 + 8 // where it begins
	if src.Is6() {
		quote = 14 + 40 + 8
	}
	if got, want := e[quote+at-14:quote+at-14+2*size], frame[at:at+2*size]; !bytes.Equal(got, want) {
		return fmt.Errorf("it quotes addresses %x, want %x", got, want)
	}
	if size == 4 && sum16(0, e[quote:quote+int(e[quote]&15)*4]) != 0xffff {
		return errors.New("checksum of the quoted header")
	}
	ports := l4
	if protocol == 1 || protocol == 58 {
		ports += 4
	}
	if quote += ports - 14; quote+2 <= len(e) && !bytes.Equal(e[quote:quote+2], frame[ports:ports+2]) {
		return fmt.Errorf("it quotes port %x, want %x", e[quote:quote+2], frame[ports:ports+2])
	}
	return nil
}

// Every kind of packet there and back, and errors about it.
func TestMasqueradeThereAndBack(t *testing.T) {
	b := newNATBench(t, loader.Config{})
	for name, frame := range natCases(b.a) {
		t.Run(name, func(t *testing.T) {
			b.purge(t)
			var left []byte
			for range 3 {
				r := b.leave(b.a, frame)
				if r.verdict != "forward_masqueraded" || !bytes.Equal(r.out, summed(r.out)) && !fragment(frame) {
					t.Fatalf("%s: %x left as %x", r.verdict, frame, r.out)
				}
				if left != nil && !bytes.Equal(left, r.out) {
					t.Fatalf("left as %x, then as %x", left, r.out)
				}
				left = r.out
				if e := b.enter(b.a, b.quoting(left)); !strings.HasSuffix(name, "v6 options") { // the quoted options are not followed
					if e.verdict != "stack_answer" {
						t.Fatalf("error about %x: %s", frame, e.verdict)
					}
					if err := b.quotes(e.out, frame); err != nil {
						t.Fatalf("error about %x: %v", frame, err)
					}
				}
				back := mirror(left)
				if frame[12] == 0x08 && frame[23] == 6 { // an answer to a SYN, and to data
					back[47] |= 0x10
				} else if frame[12] == 0x86 && frame[20] == 6 {
					back[67] |= 0x10
				}
				back = summed(back)
				if r = b.enter(b.a, back); r.verdict != "stack_answer" || !bytes.Equal(r.out, summed(r.out)) {
					t.Fatalf("%s: %x came in as %x", r.verdict, back, r.out)
				}
				if got := destinationOf(r.out); got != b.a.v4 && got != b.a.v6 {
					t.Fatalf("came in for %s", got)
				}
			}
		})
	}
	b.purge(t)
	if n := b.entries(bpf.DataplaneMapCaracalNat); n != 0 {
		t.Errorf("%d entries of no flow", n)
	}
}

// All CPUs with the first packet of one flow: none is lost, and all leave from one port.
func TestMasqueradeSameFlowAtOnce(t *testing.T) {
	b := newNATBench(t, loader.Config{})
	for port := range uint16(300) {
		frame := udp(b.a, at(b.a.v4, 1000+port), at(stranger4, 53), 9)
		var wg sync.WaitGroup
		outs, errs := make([]result, 4), make([]error, 4)
		start := make(chan struct{})
		for i := range outs {
			wg.Go(func() {
				errs[i] = b.ns.Do(func() (err error) {
					<-start
					outs[i], err = b.exec("to_net", frame, skb{ifindex: uint32(b.up), ingress: uint32(b.a.commit.IfIndex)})
					return err
				})
			})
		}
		close(start)
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		for _, r := range outs {
			if r.action != actionNext || !bytes.Equal(r.out, outs[0].out) {
				t.Fatalf("flow %d: action %d, left as %x and as %x", port, r.action, r.out, outs[0].out)
			}
		}
	}
}

// Flows that are opened, answered, closed and removed on all CPUs at once leave no entries behind.
func TestMasqueradeLeaves(t *testing.T) {
	b := newNATBench(t, loader.Config{MaxFlows: 64, Timeouts: loader.Timeouts{UDP: time.Millisecond, TCP: 2 * time.Millisecond, Closed: time.Microsecond}})
	b.masquerade(maps.Ports{First: 61000, Last: 61015})
	var wg sync.WaitGroup
	stop, errs := make(chan struct{}), make(chan error, 8)
	for w := range 4 {
		wg.Go(func() {
			errs <- b.ns.Do(func() error {
				r := rand.New(rand.NewPCG(uint64(w), 1))
				for range 5000 {
					p, n := []*pod{b.a, b.b}[r.IntN(2)], uint16(r.IntN(8))
					frame := udp(p, at(p.v4, 100+n), at(stranger4, 53), 9)
					if r.IntN(2) == 0 {
						frame = tcp(p, at(p.v4, 100+n), at(stranger4, 53), []string{"S", "A", "FA", "R"}[r.IntN(4)], 0)
					}
					if _, err := b.exec("from_pod", frame, skb{ifindex: uint32(p.commit.IfIndex)}); err != nil {
						return err
					}
					out, err := b.exec("to_net", frame, skb{ifindex: uint32(b.up), ingress: uint32(p.commit.IfIndex)})
					if err != nil {
						return err
					}
					if src, _ := sourceOf(out.out); out.action != actionNext || src == p.v4 {
						continue
					}
					in, err := b.exec("from_net", mirror(out.out), skb{ifindex: uint32(b.up)})
					if err != nil {
						return err
					}
					to := destinationOf(in.out)
					if in.action != actionNext || to == end1.v4.Addr() {
						continue
					}
					if to != b.a.v4 && to != b.b.v4 {
						return fmt.Errorf("an answer went to %s", to)
					}
					q := map[netip.Addr]*pod{b.a.v4: b.a, b.b.v4: b.b}[to]
					if _, err := b.exec("to_pod", in.out, skb{ifindex: uint32(q.commit.IfIndex), ingress: uint32(b.up)}); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	var background sync.WaitGroup
	background.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := b.maps.PurgeFlows(b.a.commit.Addrs); err != nil {
					errs <- err
					return
				}
			}
		}
	})
	wg.Wait()
	close(stop)
	background.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	b.purge(t)
	if n := b.entries(bpf.DataplaneMapCaracalNat); n != 0 {
		t.Errorf("%d entries of no flow", n)
	}
	for _, p := range []*pod{b.a, b.b} {
		if n := b.held(t, p); n != 0 {
			t.Errorf("pod %s holds %d flows after purge", p.name, n)
		}
	}
}

// What comes for a flow that is over does not open one from outside: the pod's next packet leaves with the host's address
// again.
func TestMasqueradeExpired(t *testing.T) {
	const life = 50 * time.Millisecond
	b := newNATBench(t, loader.Config{Timeouts: loader.Timeouts{UDP: life}})
	frame := udp(b.a, at(b.a.v4, 4000), at(stranger4, 53), 9)
	left := b.leave(b.a, frame)
	if r := b.enter(b.a, mirror(left.out)); r.verdict != "stack_answer" {
		t.Fatalf("answer: %s", r.verdict)
	}
	until(t, "the flow to expire", func() bool {
		return b.wantFlow("udp", at(b.a.v4, 4000), at(stranger4, 53)).Idle > life+8*time.Millisecond
	})
	if r := b.fromNet(mirror(left.out)); r.verdict != "stack_other" {
		t.Errorf("late answer: %s", r.verdict)
	}
	if r := b.leave(b.a, frame); r.verdict != "forward_masqueraded" {
		t.Errorf("the pod's next packet: %s", r.verdict)
	}
}

// Nobody outside opens a connection in the place of a pod's, nor ends it so.
func TestMasqueradeForgedSYN(t *testing.T) {
	b := newNATBench(t, loader.Config{})
	src, dst := at(b.a.v4, 4000), at(stranger4, 443)
	left := b.leave(b.a, tcp(b.a, src, dst, "S", 0))
	host := at(end1.v4.Addr(), binary.BigEndian.Uint16(left.out[34:]))
	for _, step := range []struct{ out, flags, verdict string }{
		{"", "S", "stack_other"}, {"", "SA", "stack_answer"}, {"A", "", "forward_masqueraded"},
		{"", "A", "stack_answer"}, {"", "S", "stack_other"}, {"A", "", "forward_masqueraded"}, {"", "A", "stack_answer"},
	} {
		var r result
		if step.out != "" {
			r = b.leave(b.a, tcp(b.a, src, dst, step.out, 9))
		} else {
			r = b.enter(b.a, tcp(b.r, dst, host, step.flags, 0))
		}
		if r.verdict != step.verdict {
			t.Fatalf("%+v: %s", step, r.verdict)
		}
		if step.out != "" && !bytes.Equal(r.out[34:36], left.out[34:36]) {
			t.Fatalf("left from another port")
		}
	}
	// No pod speaks about the flows of others, in its own name or in theirs.
	for _, src := range []netip.Addr{b.b.v4, b.a.v4} {
		e := unreachable(b.b, src, stranger4, tcp(b.r, dst, at(b.a.v4, 4000), "A", 9))
		if r := b.leave(b.b, e); r.action != actionShot {
			t.Errorf("%s: pod b's error about a's flow, from %s", r.verdict, src)
		}
	}
	for _, forged := range [][]byte{
		tcp(b.r, at(stranger4, 444), host, "A", 0), tcp(b.r, at(netip.MustParseAddr("203.0.113.99"), 443), host, "A", 0),
		udp(b.r, dst, host, 9), unreachable(b.r, stranger4, end1.v4.Addr(), udp(b.a, host, dst, 9)),
	} {
		if r := b.fromNet(forged); r.verdict != "stack_other" {
			t.Errorf("%s: %x", r.verdict, forged)
		}
	}
}

// A confirmed flow whose address the host has lost goes on with another, which nothing displaces either.
func TestMasqueradeAddressLost(t *testing.T) {
	b := newNATBench(t, loader.Config{})
	frame := udp(b.a, at(b.a.v4, 4000), at(stranger4, 53), 9)
	if r := b.enter(b.a, mirror(b.leave(b.a, frame).out)); r.verdict != "stack_answer" {
		t.Fatalf("answer: %s", r.verdict)
	}
	other := netip.MustParseAddr("198.51.100.77")
	b.hostHas(other)
	if err := b.maps.PutUplink(uint32(b.up), maps.Uplink{IPv4: other}); err != nil {
		t.Fatal(err)
	}
	r := b.leave(b.a, frame)
	if src, _ := sourceOf(r.out); r.verdict != "forward_masqueraded" || src != other {
		t.Fatalf("%s with source %s", r.verdict, src)
	}
	if kept, open := b.entries(bpf.DataplaneMapCaracalNat), b.entries(bpf.DataplaneMapCaracalNatopen); kept != 2 || open != 0 {
		t.Errorf("%d entries kept, %d that may be displaced", kept, open)
	}
	if r := b.enter(b.a, mirror(r.out)); r.verdict != "stack_answer" {
		t.Errorf("answer: %s", r.verdict)
	}
	b.purge(t)
	if n := b.entries(bpf.DataplaneMapCaracalNat); n != 0 {
		t.Errorf("%d entries of no flow", n)
	}
}

// When the default route moves to another uplink, a flow keeps the address it has as long as that is the host's, and is
// answered by either; a new one has the other's.
func TestMasqueradeSecondUplink(t *testing.T) {
	b := newNATBench(t, loader.Config{})
	other := netip.MustParseAddr("198.51.100.77")
	b.hostHas(end1.v4.Addr(), other)
	first, second := b.up, 0
	b.do(func() error {
		l, err := netlink.LinkByName("p-up0")
		if err != nil {
			return err
		}
		second = l.Attrs().Index
		return netlink.LinkSetHardwareAddr(l, gatewayMAC)
	})
	if err := b.maps.PutUplink(uint32(second), maps.Uplink{IPv4: other}); err != nil {
		t.Fatal(err)
	}
	old, fresh := udp(b.a, at(b.a.v4, 4000), at(stranger4, 53), 9), udp(b.a, at(b.a.v4, 4001), at(stranger4, 53), 9)
	left := b.leave(b.a, old)
	for _, by := range []int{first, second} {
		b.up = by
		if r := b.enter(b.a, mirror(left.out)); r.verdict != "stack_answer" || !bytes.Equal(r.out, mirror(old)) {
			t.Fatalf("answer by interface %d: %s", by, r.verdict)
		}
		if r := b.leave(b.a, old); !bytes.Equal(r.out, left.out) {
			t.Errorf("%s: left by interface %d as %x, before as %x", r.verdict, by, r.out, left.out)
		}
	}
	r := b.leave(b.a, fresh)
	if src, _ := sourceOf(r.out); src != other {
		t.Errorf("%s: a new flow leaves from %s", r.verdict, src)
	}
	b.up = first
	if r := b.enter(b.a, mirror(r.out)); r.verdict != "stack_answer" {
		t.Errorf("answer by the other: %s", r.verdict)
	}
}
