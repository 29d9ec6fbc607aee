package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
)

// Event is a packet that the programs told of.
type Event struct {
	Time        time.Time      `json:"time"`
	Kind        string         `json:"kind"` // EventDrop, EventLog
	Hook        string         `json:"hook"`
	Verdict     string         `json:"verdict,omitempty"`  // of a drop, as in docs/maps.md
	Protocol    string         `json:"protocol,omitempty"` // empty: it could not be parsed
	Source      netip.AddrPort `json:"source,omitzero"`    // of the packet
	Destination netip.AddrPort `json:"destination,omitzero"`
	ICMPType    uint8          `json:"icmpType,omitempty"`
	ICMPCode    uint8          `json:"icmpCode,omitempty"`
	IfIndex     uint32         `json:"ifindex"`
	RuleEgress  uint32         `json:"ruleEgress,omitempty"`  // that decided at the opener; 0: none, or something else ended it
	RuleIngress uint32         `json:"ruleIngress,omitempty"` // that decided at the responder; likewise
	Length      uint32         `json:"length"`                // bytes of frame
	Epoch       uint32         `json:"epoch"`
	Log         bool           `json:"log,omitempty"` // a rule that logs was met
}

// Kinds of events.
const (
	EventDrop = "drop"
	EventLog  = "log" // it opened a flow, and a rule that logs was met
)

var eventKinds = []string{"none", EventDrop, EventLog}

// Events reads caracal_events. One process does so at a time: who reads an event takes it away.
type Events struct {
	ring   *ebpf.Map
	reader *ringbuf.Reader
}

// Events opens the ring buffer. Its owner closes it.
func (m *Maps) Events() (*Events, error) {
	ring, err := m.pinned(bpf.DataplaneMapCaracalEvents)
	if err != nil {
		return nil, err
	}
	reader, err := ringbuf.NewReader(ring)
	if err != nil {
		ring.Close()
		return nil, fmt.Errorf("open events: %w", err)
	}
	return &Events{ring, reader}, nil
}

// SetDeadline makes Read return os.ErrDeadlineExceeded from then on, when there is nothing to read; zero: never.
func (e *Events) SetDeadline(t time.Time) { e.reader.SetDeadline(t) }

// Read waits for the next event. os.ErrClosed after Close.
func (e *Events) Read() (Event, error) {
	r, err := e.reader.Read()
	if err != nil {
		return Event{}, fmt.Errorf("read event: %w", err)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return Event{}, fmt.Errorf("read clock: %w", err)
	}
	return decodeEvent(r.RawSample, time.Now(), uint64(now.Nano()))
}

// Close ends a Read that waits.
func (e *Events) Close() error { return errors.Join(e.reader.Close(), e.ring.Close()) }

// decodeEvent reads a struct event. now and monotonic (ns) are the same moment by two clocks.
func decodeEvent(raw []byte, now time.Time, monotonic uint64) (Event, error) {
	var e bpf.DataplaneEvent
	if n, err := binary.Decode(raw, binary.NativeEndian, &e); err != nil || n != len(raw) {
		return Event{}, fmt.Errorf("event of %d bytes, want %d", len(raw), binary.Size(&e))
	}
	out := Event{
		Time: now.Add(-time.Duration(monotonic - e.Time)), Kind: word(eventKinds, e.Kind),
		Source:      netip.AddrPortFrom(FromAddress(e.Source), port(e.SourcePort)),
		Destination: netip.AddrPortFrom(FromAddress(e.Destination), port(e.DestinationPort)),
		ICMPType:    e.IcmpType, ICMPCode: e.IcmpCode, IfIndex: e.Ifindex, RuleEgress: e.RuleEgress, RuleIngress: e.RuleIngress,
		Length: e.Length, Epoch: e.Epoch, Log: e.Log != 0,
		Hook: named(bpf.Hooks, e.Hook),
	}
	if e.Verdict != 0 {
		out.Verdict = named(bpf.Verdicts, e.Verdict)
	}
	if e.Protocol != 0 || out.Source.Addr().IsValid() {
		out.Protocol = protocolName(e.Protocol)
	}
	return out, nil
}

func named(words []bpf.Word, n uint8) string {
	if int(n) < len(words) {
		return words[n].Word
	}
	return strconv.Itoa(int(n))
}

// EventsLost is how many events were never told: there were too many in a second, or nobody read the ones before.
func (m *Maps) EventsLost() (uint64, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalTold)
	if err != nil {
		return 0, err
	}
	defer pinned.Close()
	var perCPU []bpf.DataplaneTold
	if err := pinned.Lookup(uint32(0), &perCPU); err != nil {
		return 0, fmt.Errorf("read lost events: %w", err)
	}
	var lost uint64
	for _, t := range perCPU {
		lost += t.Lost
	}
	return lost, nil
}
