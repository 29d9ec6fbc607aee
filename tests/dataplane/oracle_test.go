package dataplane

import (
	"fmt"
	"hash/fnv"
	stdmaps "maps"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/policy/policytest"
)

// TestOracle holds the programs against the evaluator: random policies are compiled, put into the maps of one node, one after
// the other, and random packets sent through its programs. Beside its own pods the node knows those of others.
func TestOracle(t *testing.T) {
	models, packets, least := 860, 160, 100_000
	if testing.Short() {
		models, least = 50, 5_000
	}
	o := newOracle(t, isLocal)
	policytest.Check(t, 1, models, packets, o.verify)
	if o.judged < least {
		t.Errorf("of %d packets %d were judged, want %d", models*packets, o.judged, least)
	}
	t.Logf("%d packets judged, %d of them denied; %d models refused", o.judged, o.denied, o.refused)
}

// TestSituations sends the packets of the situations that are known for what must come of them through the programs: with all
// pods on one node, and with some elsewhere, whose side of it the node has no say in.
func TestSituations(t *testing.T) {
	all := policytest.Situations(t, "../../policy/testdata")
	for name, local := range map[string]func(string) bool{"one node": func(id string) bool { return id != "" }, "several nodes": isLocal} {
		t.Run(name, func(t *testing.T) {
			o := newOracle(t, local)
			probes := 0
			for _, s := range all {
				var packets []policy.Packet
				for _, p := range s.Probes {
					packets = append(packets, p.Packet)
					if want := o.want(s.Model, p.Packet); name == "one node" && want != p.Want {
						t.Errorf("%s, line %d: %s, want %s", s.Name, p.Line, want, p.Want)
					}
				}
				probes += len(packets)
				if i, err := o.verify(s.Model, packets); err != nil {
					t.Errorf("%s, line %d: %v", s.Name, s.Probes[i].Line, err)
				}
			}
			if o.refused != 0 {
				t.Errorf("%d situations were refused", o.refused)
			}
			t.Logf("%d situations, %d of %d packets judged, %d of them denied", len(all), o.judged, probes, o.denied)
		})
	}
}

// oracle is a node that has one model after the other.
type oracle struct {
	*bench
	*enforcer
	spare []*pod // interfaces for endpoints
	local func(id string) bool

	judged, denied, refused int
	serial                  uint16
}

func isLocal(id string) bool {
	h := fnv.New32a()
	h.Write([]byte(id))
	return h.Sum32()%4 != 0
}

func newOracle(t *testing.T, local func(id string) bool) *oracle {
	b := newBench(t, loader.Config{MaxFlows: 4096})
	o := &oracle{bench: b, enforcer: newEnforcer(t, b.maps, local), local: local}
	for _, p := range []*pod{o.a, o.b} { // whose addresses endpoints may have
		if err := commit.RemovePod(o.maps, p.commit); err != nil {
			t.Fatal(err)
		}
	}
	for _, block := range []string{"10.65.0.0/26", "2001:db8::/122"} { // where nobody's addresses are
		if err := commit.RemoveBlock(o.maps, netip.MustParsePrefix(block)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 24 {
		p := &pod{name: fmt.Sprintf("o%d", i), hostIf: fmt.Sprintf("cali-o%d", i)}
		p.commit = commit.Pod{MAC: net.HardwareAddr{2, 0, 0, 0, 9, byte(i)}, HostMAC: gatewayMAC, MTU: 1500, Network: "test"}
		o.do(func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.HardwareAddr = p.hostIf, gatewayMAC
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "p-" + p.name, PeerHardwareAddr: p.commit.MAC}); err != nil {
				return err
			}
			l, err := netlink.LinkByName(p.hostIf)
			if err == nil {
				p.commit.IfIndex = l.Attrs().Index
			}
			return err
		})
		o.spare = append(o.spare, p)
	}
	return o
}

// set puts a model in force. False: the compiler refuses it.
func (o *oracle) set(m *policy.Model, pods map[string]*pod) bool {
	o.t.Helper()
	d, err := o.compile(m)
	if err != nil {
		return false
	}
	clear(o.ifindex)
	for id, p := range pods {
		o.ifindex[id] = uint32(p.commit.IfIndex)
	}
	if err := o.put(d); err != nil {
		o.t.Fatal(err)
	}
	return true
}

// wire makes the local endpoints of a model pods of the node. unwire takes the policy in force and them away.
func (o *oracle) wire(m *policy.Model) (pods map[string]*pod, unwire func()) {
	o.t.Helper()
	pods = make(map[string]*pod)
	for i, id := range slices.Sorted(stdmaps.Keys(m.Endpoints)) {
		if !o.local(id) {
			continue
		}
		p := o.spare[i]
		p.commit.Addrs = m.Endpoints[id].Addresses
		if err := commit.AddPod(o.maps, p.commit); err != nil {
			o.t.Fatal(err)
		}
		pods[id] = p
	}
	return pods, func() {
		if !o.set(&policy.Model{}, pods) {
			o.t.Fatal("no policy is refused")
		}
		for _, p := range pods {
			if err := commit.RemovePod(o.maps, p.commit); err != nil {
				o.t.Fatal(err)
			}
		}
		rows, err := o.maps.Policy()
		if err != nil {
			o.t.Fatal(err)
		}
		peers, err := o.maps.Peers()
		if err != nil {
			o.t.Fatal(err)
		}
		if len(rows) != 0 || len(peers) != 0 {
			o.t.Fatalf("without policy %d rows and %d peers stay", len(rows), len(peers))
		}
	}
}

// verify says which packet the programs and the evaluator differ about.
func (o *oracle) verify(m *policy.Model, packets []policy.Packet) (int, error) {
	pods, unwire := o.wire(m)
	defer unwire()
	if !o.set(m, pods) {
		o.refused++
		return 0, nil
	}
	seen := make(map[policy.Packet]bool)
	for i, p := range packets {
		back := p
		back.Source, back.Destination, back.SourcePort, back.TargetPort = p.Destination, p.Source, p.TargetPort, p.SourcePort
		back.ICMPType, back.ICMPCode = 0, 0
		frame, hook, s, ok := o.frame(m, pods, p)
		if !ok {
			continue
		}
		if seen[back] { // else it would be a reply
			if _, err := o.maps.PurgeFlows([]netip.Addr{p.Source}); err != nil {
				o.t.Fatal(err)
			}
			delete(seen, back)
		}
		plain := p
		plain.ICMPType, plain.ICMPCode = 0, 0
		seen[plain] = true
		var r result
		o.do(func() (err error) {
			r, err = o.exec(hook, frame, s)
			return err
		})
		want := o.want(m, p)
		o.judged++
		if want == policy.Deny {
			o.denied++
		}
		if got := map[bool]policy.Action{true: policy.Deny, false: policy.Allow}[r.action == actionShot]; got != want {
			return i, fmt.Errorf("%s: %s by %s, the evaluator says %s", p, got, hook, want)
		}
		f := m.Flow(p)
		for _, end := range []struct {
			verdict     *policy.Verdict
			direction   policy.Direction
			own, remote netip.Addr
		}{{f.Egress, policy.Egress, p.Source, p.Destination}, {f.Ingress, policy.Ingress, p.Destination, p.Source}} {
			if pod := pods[holder(m, end.own.String())]; pod != nil {
				if err := o.explained(pod, end.direction, end.remote, p, *end.verdict); err != nil {
					return i, fmt.Errorf("%s: %s: %w", p, end.direction, err)
				}
			}
		}
	}
	return 0, nil
}

// explained holds what the maps say of one end, by whom it is decided too, against what the evaluator says.
func (o *oracle) explained(at *pod, d policy.Direction, remote netip.Addr, p policy.Packet, want policy.Verdict) error {
	own, err := o.maps.Pod(uint32(at.commit.IfIndex))
	if err != nil {
		return err
	}
	id := map[policy.Direction]uint32{policy.Egress: own.PolicyEgress, policy.Ingress: own.PolicyIngress}[d]
	if id == 0 {
		if want.Rule.Policy != "" {
			return fmt.Errorf("no policy id, the evaluator says %s by %s", want.Action, want.Rule)
		}
		return nil
	}
	peer, err := o.maps.Peer(remote)
	if err != nil {
		return err
	}
	port := p.TargetPort
	if p.Protocol == 1 || p.Protocol == 58 {
		port = uint16(p.ICMPType)<<8 | uint16(p.ICMPCode)
	}
	row, err := o.maps.Decide(id, peer.Identity, p.Protocol, port, p.SourcePort)
	if err != nil {
		return err
	}
	rule, known := o.compiler.Tables().Rules[row.Rule]
	if row.Rule == 0 { // no rule, not even the end of a list
		rule, known = policy.RuleInfo{RuleRef: policy.RuleRef{Index: policy.NoRule}, Direction: d}, true
	}
	if !known || (row.Action == maps.PolicyAllow) != (want.Action == policy.Allow) || rule.RuleRef != want.Rule || rule.Direction != d {
		return fmt.Errorf("row %+v, of %s %s; the evaluator says %s by %s", row, rule.Direction, rule.RuleRef, want.Action, want.Rule)
	}
	return nil
}

// want is what the evaluator says of a packet as far as this node judges it.
func (o *oracle) want(m *policy.Model, p policy.Packet) policy.Action {
	f := m.Flow(p)
	from, to := holder(m, p.Source.String()), holder(m, p.Destination.String())
	if f.Egress != nil && o.local(from) && f.Egress.Action == policy.Deny {
		return policy.Deny
	}
	if f.Ingress != nil && o.local(to) && f.Ingress.Action == policy.Deny {
		return policy.Deny
	}
	return policy.Allow
}

// holder is the endpoint that has an address, "" if none has.
func holder(m *policy.Model, address string) string {
	for id, e := range m.Endpoints {
		for _, a := range e.Addresses {
			if a.String() == address {
				return id
			}
		}
	}
	return ""
}

// frame makes the opening packet of a flow, and says where it comes in. False: it does not come by, or policy is not asked.
func (o *oracle) frame(m *policy.Model, pods map[string]*pod, p policy.Packet) (frame []byte, hook string, s skb, ok bool) {
	from, to := holder(m, p.Source.String()), holder(m, p.Destination.String())
	sender, local := pods[from]
	receiver := pods[to]
	switch {
	case from == to && from != "":
		return nil, "", s, false // a pod always reaches itself
	case local:
		hook, s.ifindex = "from_pod", uint32(sender.commit.IfIndex)
	case receiver != nil:
		sender = o.r
		hook, s.ifindex, s.ingress = "to_pod", uint32(receiver.commit.IfIndex), uint32(o.up)
	default:
		return nil, "", s, false
	}
	o.serial++
	src, dst := at(p.Source, p.SourcePort), at(p.Destination, p.TargetPort)
	switch p.Protocol {
	case 1, 58:
		if p.Source.Is4() && p.ICMPType == 3 || p.Source.Is6() && p.ICMPType < 128 {
			return nil, "", s, false // an error belongs to a flow
		}
		return o.icmp(sender, p), hook, s, true
	case 6:
		return tcp(sender, src, dst, "S", 0), hook, s, true
	case 17:
		return udp(sender, src, dst, 8), hook, s, true
	case 132:
		return sctp(sender, src, dst, 1), hook, s, true
	default:
		return raw(sender, p.Source, p.Destination, layers.IPProtocol(p.Protocol), make([]byte, 20)), hook, s, true
	}
}

func (o *oracle) icmp(sender *pod, p policy.Packet) []byte {
	if p.Source.Is4() {
		return build(append(network(sender, p.Source, p.Destination, layers.IPProtocolICMPv4),
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(p.ICMPType, p.ICMPCode), Id: o.serial}, gopacket.Payload("echo"))...)
	}
	return icmp6(sender, p.Source, p.Destination, p.ICMPType, p.ICMPCode, 64, []byte{byte(o.serial >> 8), byte(o.serial), 0, 1})
}
