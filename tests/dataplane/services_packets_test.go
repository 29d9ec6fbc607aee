package dataplane

import (
	"net/netip"
	"testing"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

const markJudged, markDeferred = 0x00100000, 0x00200000 // state.h

// Packets that no socket of a test sends, and what nobody translates, through the programs in the order in which they meet them.
func TestServicePackets(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "v4", true: "v6"}[v6], func(t *testing.T) {
			b := newBench(t, loader.Config{MaxFlows: 64})
			vip, host := netip.MustParseAddr("10.96.0.10"), outside
			if v6 {
				vip, host = netip.MustParseAddr("2001:db8:96::10"), netip.MustParseAddr("2001:db8:ff::1")
				b.hostHas(host)
			}
			services := []maps.Service{{Address: vip, Protocol: "sctp", Port: front}, {Address: vip, Protocol: "udp", Port: front}, {Address: vip, Protocol: "tcp", Port: front}, {Protocol: "sctp", Port: nodePort}}
			if came, went, err := commit.SetServices(b.maps, services); came != len(services) || went != 0 || err != nil {
				t.Fatalf("%d came, %d went: %v", came, went, err)
			}
			if came, went, err := commit.SetServices(b.maps, services); came != 0 || went != 0 || err != nil {
				t.Fatalf("again: %d came, %d went: %v", came, went, err)
			}
			x, y := b.a.addr(v6), b.b.addr(v6)
			b.rows(row(toBackend, 0, 0, 0, 0, deny, 1), row(toBackend, isBackend, 0, 0, 0, allow, 2))
			b.identify(isBackend, y)
			b.last = b.snapshot()
			from, to := uint32(b.a.commit.IfIndex), uint32(b.b.commit.IfIndex)
			step := func(what, hook string, frame []byte, s skb, verdict string, mark uint32) {
				t.Helper()
				if r := b.run(hook, frame, s); r.verdict != verdict || r.mark != mark {
					t.Fatalf("%s: %s with mark %#x, want %s with %#x", what, r.verdict, r.mark, verdict, mark)
				}
			}
			sent, stack := skb{ifindex: from}, skb{ifindex: to, ingress: from, mark: markDeferred}
			init := func(src, dst netip.AddrPort, chunk byte) []byte { return sctp(b.a, src, dst, chunk) }
			b.policy(b.a, toBackend, 0)

			// SCTP to an address and to a node port, as the stack leaves it and with the host's address.
			client, backend := at(x, 4000), at(y, behind)
			step("INIT", "from_pod", init(client, at(vip, front), 1), sent, "stack_service", markDeferred)
			step("INIT, translated", "to_pod", init(client, backend, 1), stack, "forward_from_stack", markDeferred)
			step("INIT ACK", "from_pod", sctp(b.b, backend, client, 2), skb{ifindex: to}, "stack_reply", 0)
			step("INIT ACK, translated back", "to_pod", sctp(b.b, at(vip, front), client, 2), skb{ifindex: from, ingress: to}, "forward_from_stack", 0)
			for _, f := range []maps.Flow{b.wantFlow("sctp", client, at(vip, front)), b.wantFlow("sctp", client, backend)} {
				if !f.Confirmed {
					t.Errorf("flow %+v", f)
				}
			}
			step("COOKIE ECHO", "from_pod", init(client, at(vip, front), 10), sent, "stack_service", markDeferred)
			client = at(x, 4001)
			step("INIT to a node port", "from_pod", init(client, at(host, nodePort), 1), sent, "stack_service", markDeferred)
			step("INIT, masqueraded", "to_pod", init(at(host, 7000), backend, 1), stack, "forward_from_stack", markDeferred)
			if f := b.wantFlow("sctp", at(host, 7000), backend); f.Sent.Sender != from || f.Sent.IfIndex != 0 {
				t.Errorf("flow %+v", f)
			}

			// Another pod in the place of the first: judged for itself, however fresh the flow.
			other := stack
			other.ingress = to
			b.policy(b.b, nobody, 0)
			b.identify(0, y)
			b.last = b.snapshot()
			step("another policy", "to_pod", init(at(host, 7000), backend, 10), stack, "drop_policy_egress", markDeferred)
			b.policy(b.b, 0, 0)
			step("masqueraded, of nobody here", "to_pod", init(at(host, 7000), backend, 10), skb{ifindex: to, ingress: uint32(b.up)}, "forward_from_stack", 0)
			step("masqueraded, of the pod again", "to_pod", init(at(host, 7000), backend, 10), stack, "drop_policy_egress", markDeferred)

			// To the net: with the host's address it is the pod's still; once judged, it is not judged again inside a tunnel's packet.
			far := at(netip.MustParseAddr(map[bool]string{false: "203.0.113.9", true: "2001:db8:fe::9"}[v6]), behind)
			net := skb{ifindex: uint32(b.up), ingress: from, mark: markDeferred}
			step("to the net", "to_net", udp(b.a, at(host, 7001), far, 9), net, "drop_policy_egress", markDeferred)
			// In the middle of a connection that was forgotten it is no answer: policy for what the pod is sent does not matter.
			step("to the net, of an old connection", "to_net", tcp(b.a, at(host, 7003), far, "A", 9), net, "drop_policy_egress", markDeferred)
			b.identify(isBackend, far.Addr())
			b.last = b.snapshot()
			step("to the net", "to_net", udp(b.a, at(host, 7001), far, 9), net, "forward_from_stack", markDeferred|markJudged)
			step("to the net, not a pod's", "to_net", udp(b.a, at(host, 7002), far, 9), skb{ifindex: uint32(b.up), ingress: from}, "stack_other", 0)

			// Nobody speaks for a Service to a pod that did not ask it, and no pod has its address.
			b.policy(b.a, 0, nobody)
			step("unasked", "to_pod", udp(b.r, at(vip, front), at(x, 5000), 9), skb{ifindex: from, ingress: uint32(b.up)}, "drop_policy_ingress", 0)
			step("spoofed", "from_pod", udp(b.a, at(vip, front), at(y, 5000), 9), sent, "drop_spoof", 0)

			// A flow that was judged by the Service's address before it was known to be one is deferred; one to what is a Service no
			// more stays so until it is over.
			b.policy(b.a, 0, 0)
			if _, went, err := commit.SetServices(b.maps, nil); went != len(services) || err != nil {
				t.Fatalf("%d went: %v", went, err)
			}
			client = at(x, 4002)
			b.last = b.snapshot()
			step("not a Service", "from_pod", udp(b.a, client, at(vip, front), 9), sent, "stack_routed", 0)
			if _, _, err := commit.SetServices(b.maps, services); err != nil {
				t.Fatal(err)
			}
			b.policy(b.a, nobody, 0)
			step("a Service", "from_pod", udp(b.a, client, at(vip, front), 9), sent, "stack_service", markDeferred)
			if _, _, err := commit.SetServices(b.maps, nil); err != nil {
				t.Fatal(err)
			}
			b.policy(b.a, nobody, 0)
			step("not one any more", "from_pod", udp(b.a, client, at(vip, front), 9), sent, "stack_service", markDeferred)
			step("nor translated", "to_net", udp(b.a, client, at(vip, front), 9), net, "drop_policy_egress", markDeferred)
			step("another flow", "from_pod", udp(b.a, at(x, 4003), at(vip, front), 9), sent, "drop_policy_egress", 0)
		})
	}
}

// A deferred flow counts against its pod's quota, and a full table refuses it like any other.
func TestServiceQuota(t *testing.T) {
	b := newBench(t, loader.Config{MaxFlows: 8}) // a pod may have half of them
	vip := netip.MustParseAddr("10.96.0.10")
	if _, _, err := commit.SetServices(b.maps, []maps.Service{{Address: vip, Protocol: "udp", Port: front}}); err != nil {
		t.Fatal(err)
	}
	b.last = b.snapshot()
	from, to := uint32(b.a.commit.IfIndex), uint32(b.b.commit.IfIndex)
	for port := range uint16(20) {
		there := b.run("from_pod", udp(b.a, at(b.a.v4, 4000+port), at(vip, front), 9), skb{ifindex: from})
		if port >= 4 {
			if there.verdict != "drop_quota" && there.verdict != "drop_flows_full" {
				t.Fatalf("flow %d: %s", port, there.verdict)
			}
			continue
		}
		if there.verdict != "stack_service" {
			t.Fatalf("flow %d: %s", port, there.verdict)
		}
		if back := b.run("to_pod", udp(b.b, at(vip, front), at(b.a.v4, 4000+port), 9), skb{ifindex: from, ingress: to}); back.verdict != "forward_from_stack" {
			t.Fatalf("answer of flow %d: %s", port, back.verdict)
		}
	}
	if n := b.held(t, b.a); n != 4 {
		t.Errorf("the pod holds %d flows, want 4", n)
	}
	b.purge(t)
	if n := b.held(t, b.a); n != 0 {
		t.Errorf("the pod holds %d flows after purge", n)
	}
}
