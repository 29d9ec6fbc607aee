package dataplane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/loader"
)

// FuzzPackets runs frames through all programs. Whatever the frame: one verdict, counted once; the action and the
// bytes that go with it; nothing with a source that is not the pod's is forwarded or left to the stack.
func FuzzPackets(f *testing.F) {
	b := newBench(f, loader.Config{})
	var tables []*ebpf.Map
	for _, name := range []string{bpf.DataplaneMapCaracalFlows, bpf.DataplaneMapCaracalOpens} {
		m, err := ebpf.LoadPinnedMap(bpf.MapPath(b.dir, name), nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { m.Close() })
		tables = append(tables, m)
	}
	for _, c := range packetCases(b.a, b.b) {
		f.Add(c.frame, uint16(0), uint8(0), false)
	}
	for _, c := range netCases(b) {
		f.Add(c.frame, uint16(0), uint8(0), false)
	}
	f.Add(tcp(b.a, b.v4pair()[0], b.v4pair()[1], "A", 3000), uint16(1400), uint8(3), false)
	f.Fuzz(func(t *testing.T, frame []byte, gsoSize uint16, gsoSegs uint8, process bool) {
		if len(frame) < 15 || len(frame) > 3400 {
			return
		}
		b.t = t
		s := skb{ifindex: uint32(b.a.commit.IfIndex), gsoSize: uint32(gsoSize), gsoSegs: uint32(gsoSegs)}
		r, ok := b.try("from_pod", frame, s)
		if !ok {
			return
		}
		if err := r.consistent(frame); err != nil {
			t.Fatalf("%s: %v; became %x", r.verdict, err, r.out)
		}
		src, isIP := sourceOf(frame)
		passed := r.verdict == "forward_pod" || len(r.verdict) > 6 && r.verdict[:6] == "stack_" && r.verdict != "stack_arp"
		if passed && (!isIP || src != b.a.v4 && src != b.a.v6) {
			t.Fatalf("%s with source %s", r.verdict, src)
		}
		if r.verdict == "forward_pod" && frame[0]&1 != 0 {
			t.Fatal("forwarded although its frame was not for the gateway")
		}
		if key, ok := keyOf(frame); ok && r.verdict == "forward_pod" {
			var flow bpf.DataplaneFlow
			if tables[0].Lookup(&key, &flow) != nil && tables[1].Lookup(&key, &flow) != nil {
				t.Fatalf("forwarded without a flow of key %+v", key)
			}
		}

		s.ifindex = uint32(b.b.commit.IfIndex)
		if !process {
			s.ingress = 77
		}
		if r, ok = b.try("to_pod", frame, s); !ok {
			return
		}
		if err := r.consistent(frame); err != nil {
			t.Fatalf("to_pod: %s: %v; became %x", r.verdict, err, r.out)
		}

		// From the net nothing is dropped that the host's stack may want, and only the other host's pods are let in.
		s.ifindex, s.ingress = uint32(b.up), 0
		if r, ok = b.try("from_net", frame, s); !ok {
			return
		}
		if err := r.consistent(frame); err != nil {
			t.Fatalf("from_net: %s: %v; became %x", r.verdict, err, r.out)
		}
		switch {
		case r.verdict == "forward_pod":
			if to := destinationOf(frame); to != b.a.v4 && to != b.a.v6 && to != b.b.v4 && to != b.b.v6 || own(src) {
				t.Fatalf("from_net: from %s to %s", src, to)
			}
		case r.action == actionShot:
			if r.verdict != "drop_spoof_net" && r.verdict != "drop_no_pod" && r.verdict != "drop_icmp_error" {
				t.Fatalf("from_net: %s", r.verdict)
			}
		}

		// What leaves is never changed.
		s.ingress = uint32(b.a.commit.IfIndex)
		if process {
			s.ingress = 0
		}
		if r, ok = b.try("to_net", frame, s); !ok {
			return
		}
		if err := r.consistent(frame); err != nil {
			t.Fatalf("to_net: %s: %v; became %x", r.verdict, err, r.out)
		}
		if r.action == actionShot && (process || r.verdict != "drop_icmp_error") {
			t.Fatalf("to_net: %s", r.verdict)
		}
	})
}

// try is run for frames that BPF_PROG_TEST_RUN may refuse: it takes no part of an IP header.
func (b *bench) try(hook string, frame []byte, s skb) (result, bool) {
	b.t.Helper()
	var r result
	ran := true
	b.do(func() error {
		var err error
		r, err = b.exec(hook, frame, s)
		if errors.Is(err, unix.EINVAL) {
			ran = false
			return nil
		}
		return err
	})
	if !ran {
		return r, false
	}
	r.verdict = b.counted(hook, max(1, uint64(s.gsoSegs)))
	return r, true
}

// sourceOf is the IP source of a frame.
func sourceOf(frame []byte) (netip.Addr, bool) {
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == 0x0800 && len(frame) >= 34:
		return netip.AddrFrom4([4]byte(frame[26:])), true
	case kind == 0x86dd && len(frame) >= 54:
		return netip.AddrFrom16([16]byte(frame[22:])), true
	}
	return netip.Addr{}, false
}

// destinationOf is the IP destination of a frame that sourceOf knows.
func destinationOf(frame []byte) netip.Addr {
	if frame[12] == 8 {
		return netip.AddrFrom4([4]byte(frame[30:]))
	}
	return netip.AddrFrom16([16]byte(frame[38:]))
}

// own tells the addresses of the bench's blocks.
func own(a netip.Addr) bool {
	return netip.MustParsePrefix("10.65.0.0/26").Contains(a) || netip.MustParsePrefix("2001:db8::/122").Contains(a)
}

// keyOf is the flow key of a plain TCP or UDP packet, built without looking at the C.
func keyOf(frame []byte) (bpf.DataplaneFlowKey, bool) {
	var (
		src, dst netip.Addr
		protocol byte
		l4       int
	)
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == 0x0800 && len(frame) >= 42 && frame[14] == 0x45 && binary.BigEndian.Uint16(frame[20:])&0x3fff == 0:
		src, dst = netip.AddrFrom4([4]byte(frame[26:])), netip.AddrFrom4([4]byte(frame[30:]))
		protocol, l4 = frame[23], 34
	case kind == 0x86dd && len(frame) >= 62:
		src, dst = netip.AddrFrom16([16]byte(frame[22:])), netip.AddrFrom16([16]byte(frame[38:]))
		protocol, l4 = frame[20], 54
	}
	if protocol != 6 && protocol != 17 {
		return bpf.DataplaneFlowKey{}, false
	}
	type end struct {
		addr [16]byte
		port [2]byte
	}
	x, y := end{src.As16(), [2]byte(frame[l4:])}, end{dst.As16(), [2]byte(frame[l4+2:])}
	word := func(e end, half int) uint64 { return binary.NativeEndian.Uint64(e.addr[half*8:]) }
	port := func(e end) uint16 { return binary.NativeEndian.Uint16(e.port[:]) }
	swap := false
	switch {
	case word(x, 1) != word(y, 1):
		swap = word(x, 1) > word(y, 1)
	case word(x, 0) != word(y, 0):
		swap = word(x, 0) > word(y, 0)
	default:
		swap = port(x) > port(y)
	}
	if swap {
		x, y = y, x
	}
	return bpf.DataplaneFlowKey{AddressA: x.addr, AddressB: y.addr, PortA: port(x), PortB: port(y), Protocol: protocol}, true
}

// The key of the fuzz target's oracle is the one that the programs use.
func TestKeyOf(t *testing.T) {
	b := newBench(t, loader.Config{})
	frame := udp(b.a, b.v6pair()[0], b.v6pair()[1], 1)
	check(t, frame, b.fromA(frame), "forward_pod")
	key, _ := keyOf(frame)
	m, err := ebpf.LoadPinnedMap(bpf.MapPath(b.dir, bpf.DataplaneMapCaracalOpens), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var flow bpf.DataplaneFlow
	if err := m.Lookup(&key, &flow); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(flow.Leg[flow.Opener].To.Hop[:6], b.b.commit.MAC) {
		t.Errorf("leg leads to %x, want %s", flow.Leg[flow.Opener].To.Hop[:6], b.b.commit.MAC)
	}
}
