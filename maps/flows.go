package maps

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// Flow is an entry of caracal_flows, or of caracal_opens while only its opener was heard.
type Flow struct {
	Protocol  string         `json:"protocol"`
	Opener    netip.AddrPort `json:"opener"`
	Responder netip.AddrPort `json:"responder"`
	State     string         `json:"state"`   // opening, answered, open, closing, closed
	Entered   string         `json:"entered"` // pod, stack, host, net, service
	Confirmed bool           `json:"confirmed"`
	Age       time.Duration  `json:"age"`      // since it was opened, ns
	Idle      time.Duration  `json:"idle"`     // since its last packet, ns
	Sent      Leg            `json:"sent"`     // by the opener
	Received  Leg            `json:"received"` // by the opener
	// What allowed it, as rule ids; 0: no policy applied.
	RuleEgress  uint32 `json:"ruleEgress,omitempty"`  // at the opener
	RuleIngress uint32 `json:"ruleIngress,omitempty"` // at the responder
	ICMPType    uint8  `json:"icmpType,omitempty"`    // of the packet that opened it
	ICMPCode    uint8  `json:"icmpCode,omitempty"`
	// Masquerade is what its pod's address and port are outside; zero: the same.
	Masquerade netip.AddrPort `json:"masquerade,omitzero"`
}

// Leg is one direction of a flow.
type Leg struct {
	Epoch   uint32 `json:"epoch"`            // in which it was judged; 0: it saw no packet
	IfIndex uint32 `json:"ifindex"`          // by which its packets come; 0: the host's stack
	Sender  uint32 `json:"sender,omitempty"` // of what the stack gave another source: the interface of the pod that sent it
	Forward string `json:"forward"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

var (
	protocols = map[uint8]string{1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
	states    = []string{"new", "opening", "answered", "open", "closing", "closed"}
	entries   = []string{"none", "pod", "stack", "host", "net", "service"}
	forwards  = []string{"unset", "pod", "stack", "shaped", "reply", "deliver", "net", "tunnel", "deferred", "unsure"}
)

func word[T ~uint8](words []string, v T) string {
	if int(v) < len(words) {
		return words[v]
	}
	return strconv.Itoa(int(v))
}

// ProtocolNumber is the IANA number of a Flow's Protocol.
func ProtocolNumber(name string) (uint8, error) {
	for number, word := range protocols {
		if word == name {
			return number, nil
		}
	}
	number, err := strconv.ParseUint(name, 10, 8)
	if err != nil {
		return 0, fmt.Errorf("protocol %q: neither a name that flows have nor a number", name)
	}
	return uint8(number), nil
}

func protocolName(number uint8) string {
	if name, ok := protocols[number]; ok {
		return name
	}
	return strconv.Itoa(int(number))
}

// Flows lists all flows, confirmed ones first, by protocol and opener. A flow that changes while it is listed may be
// seen twice or not at all.
func (m *Maps) Flows() ([]Flow, error) {
	at, err := m.now()
	if err != nil {
		return nil, err
	}
	confirmed, err := m.listFlows(bpf.DataplaneMapCaracalFlows, bpf.DataplaneMapCaracalNat, at, true)
	if err != nil {
		return nil, err
	}
	opening, err := m.listFlows(bpf.DataplaneMapCaracalOpens, bpf.DataplaneMapCaracalNatopen, at, false)
	return append(confirmed, opening...), err
}

func (m *Maps) listFlows(name, natMap string, at uint64, confirmed bool) ([]Flow, error) {
	pinned, err := m.pinned(name)
	if err != nil {
		return nil, err
	}
	defer pinned.Close()
	nat, err := m.pinned(natMap)
	if err != nil {
		return nil, err
	}
	defer nat.Close()
	var flows []Flow
	err = each(pinned, func(key *bpf.DataplaneFlowKey, value *bpf.DataplaneFlow) {
		f := decodeFlow(key, value, at)
		f.Confirmed = confirmed
		var outside bpf.DataplaneNat
		if value.Masqueraded != 0 && nat.Lookup(key, &outside) == nil {
			f.Masquerade = netip.AddrPortFrom(FromAddress(outside.Address), port(outside.Port))
		}
		flows = append(flows, f)
	})
	if err != nil {
		return nil, fmt.Errorf("list flows: %w", err)
	}
	slices.SortFunc(flows, func(a, b Flow) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), a.Opener.Compare(b.Opener), a.Responder.Compare(b.Responder))
	})
	return flows, nil
}

// now asks the programs for the time by their clock, ns.
func (m *Maps) now() (uint64, error) {
	p, err := m.program(bpf.DataplaneProgClock)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	var args bpf.DataplaneClockArgs
	if _, err := p.Run(&ebpf.RunOptions{Context: args, ContextOut: &args}); err != nil {
		return 0, fmt.Errorf("read the programs' clock: %w", err)
	}
	return args.Now, nil
}

func decodeFlow(k *bpf.DataplaneFlowKey, v *bpf.DataplaneFlow, at uint64) Flow {
	a := netip.AddrPortFrom(FromAddress(k.AddressA), port(k.PortA))
	b := netip.AddrPortFrom(FromAddress(k.AddressB), port(k.PortB))
	opener := v.Opener & 1
	if opener == 1 {
		a, b = b, a
	}
	seen := max(v.Leg[0].LastSeen, v.Leg[1].LastSeen)
	return Flow{
		Protocol: protocolName(k.Protocol), Opener: a, Responder: b,
		State: word(states, v.State), Entered: word(entries, v.Entered),
		Age: since(at, v.Opened), Idle: since(at, seen),
		Sent: decodeLeg(&v.Leg[opener]), Received: decodeLeg(&v.Leg[opener^1]),
		RuleEgress: v.RuleEgress, RuleIngress: v.RuleIngress, ICMPType: v.IcmpType, ICMPCode: v.IcmpCode,
	}
}

func decodeLeg(l *bpf.DataplaneFlowLeg) Leg {
	const sender = 1 << 31 // LEG_SENDER
	out := Leg{Epoch: l.Epoch, IfIndex: l.IfindexIn, Forward: word(forwards, l.To.Forward), Packets: l.Packets, Bytes: l.Bytes}
	if l.IfindexIn&sender != 0 {
		out.IfIndex, out.Sender = 0, l.IfindexIn&^sender
	}
	return out
}

func since(at, then uint64) time.Duration {
	if then > at {
		return 0
	}
	return time.Duration(at - then)
}

// port turns a port as it lies in memory, in wire order, into a number, and a number into that.
func port(raw uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], raw)
	return binary.BigEndian.Uint16(b[:])
}

// PurgeFlows removes the flows that one of the addresses is an end of, and all expired ones, and returns how many.
// The kernel does it, so that what they count against stays right. At most PodAddresses addresses.
func (m *Maps) PurgeFlows(addrs []netip.Addr) (int, error) {
	if len(addrs) > PodAddresses {
		return 0, fmt.Errorf("purge flows of %d addresses: at most %d", len(addrs), PodAddresses)
	}
	p, err := m.program(bpf.DataplaneProgPurge)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	var args bpf.DataplanePurgeArgs
	for i, a := range addrs {
		args.Address[i] = Address(a)
	}
	total := 0
	// A walk over a hash table that loses elements can miss some: repeat until one finds none.
	for range 10 {
		args.Removed = 0
		out := args
		if _, err := p.Run(&ebpf.RunOptions{Context: args, ContextOut: &out}); err != nil {
			return total, fmt.Errorf("purge flows: %w", err)
		}
		if out.Removed == 0 {
			return total, nil
		}
		total += int(out.Removed)
	}
	return total, nil
}

// SweepFlows removes expired flows from so many places of the table, the first of which is given, and returns how many went.
// There are State.MaxFlows places; one takes some hundred nanoseconds. Nobody waits for it, so callers need not hold the node
// lock. ErrNotLoaded when the programs that are loaded are of a build that can't.
func (m *Maps) SweepFlows(first, places uint32) (removed int, err error) {
	out, err := m.sweep(bpf.DataplaneSweepArgs{First: first, Places: places})
	return int(out.Removed), err
}

// SweepOpens removes expired flows from caracal_opens, and returns how many stay.
func (m *Maps) SweepOpens() (opening int, err error) {
	out, err := m.sweep(bpf.DataplaneSweepArgs{Opens: 1})
	return int(out.Opening), err
}

func (m *Maps) sweep(args bpf.DataplaneSweepArgs) (bpf.DataplaneSweepArgs, error) {
	p, err := m.program(bpf.DataplaneProgSweep)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: the loaded programs are of an earlier build, which caracalctl upgrade replaces", ErrNotLoaded)
	}
	if err != nil {
		return args, fmt.Errorf("sweep flows: %w", err)
	}
	defer p.Close()
	out := args
	if _, err := p.Run(&ebpf.RunOptions{Context: args, ContextOut: &out}); err != nil {
		return args, fmt.Errorf("sweep flows: %w", err)
	}
	return out, nil
}

// Churn is how many flows came and went since the node's programs were loaded.
type Churn struct {
	Opened    uint64 `json:"opened"`    // by a first packet: entries of caracal_opens
	Displaced uint64 `json:"displaced"` // of these, by newer ones, before both sides were heard; as exact as the moment allows
	Confirmed uint64 `json:"confirmed"` // both sides were heard
	Reclaimed uint64 `json:"reclaimed"` // expired, and removed when another needed the room
	Swept     uint64 `json:"swept"`     // expired, and removed by SweepFlows
	Opening   int    `json:"opening"`   // entries of caracal_opens now
	MaxOpens  int    `json:"maxOpens"`  // how many there may be
}

// Churn sweeps caracal_opens and adds up what all CPUs have counted.
func (m *Maps) Churn() (Churn, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalChurn)
	if err != nil {
		return Churn{}, err
	}
	defer pinned.Close()
	opens, err := m.pinned(bpf.DataplaneMapCaracalOpens)
	if err != nil {
		return Churn{}, err
	}
	defer opens.Close()
	c := Churn{MaxOpens: int(opens.MaxEntries())}
	if c.Opening, err = m.SweepOpens(); err != nil {
		return Churn{}, err
	}
	var perCPU []bpf.DataplaneChurn
	if err := pinned.Lookup(uint32(0), &perCPU); err != nil {
		return Churn{}, fmt.Errorf("read churn: %w", err)
	}
	displaced := -c.Opening // what opened, and neither left nor is there
	for _, n := range perCPU {
		c.Opened += n.Opened
		c.Confirmed += n.Confirmed
		c.Reclaimed += n.Reclaimed
		c.Swept += n.Swept
		displaced += int(n.Opened) - int(n.Left)
	}
	c.Displaced = uint64(max(0, displaced))
	return c, nil
}

func (m *Maps) program(name string) (*ebpf.Program, error) {
	p, err := ebpf.LoadPinnedProgram(bpf.ProgramPath(m.dir, name), nil)
	if err != nil {
		return nil, fmt.Errorf("open program %s: %w", name, err)
	}
	return p, nil
}
