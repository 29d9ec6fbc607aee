package agent

import (
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caracal-net/caracal/maps"
)

const (
	maxDrops = 4096        // kinds of drops that are remembered
	logAgain = time.Minute // after which a drop that goes on is logged again
	logRate  = 10          // lines of a kind in a second at most
)

// Drop is packets that were dropped alike: from one address to a port of another, for one reason.
type Drop struct {
	Alike
	Count uint64    `json:"count"` // packets that the programs told of
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	// Of the last of them.
	SourcePort uint16 `json:"sourcePort,omitempty"` // of ICMP the identifier
	IfIndex    uint32 `json:"ifindex"`              // of the interface
	Epoch      uint32 `json:"epoch"`                // in which it was judged
}

// Alike is what packets of one Drop have in common.
type Alike struct {
	Reason      string     `json:"reason"` // the verdict, as in docs/maps.md
	Hook        string     `json:"hook"`
	Protocol    string     `json:"protocol,omitempty"` // "": it could not be parsed
	Source      netip.Addr `json:"source,omitzero"`
	Destination netip.Addr `json:"destination,omitzero"`
	Port        uint16     `json:"port,omitempty"` // destination's; ICMP: 0
	ICMPType    uint8      `json:"icmpType,omitempty"`
	ICMPCode    uint8      `json:"icmpCode,omitempty"`
	RuleEgress  uint32     `json:"ruleEgress,omitempty"`  // that decided at the opener; 0: none
	RuleIngress uint32     `json:"ruleIngress,omitempty"` // that decided at the responder; 0: none
}

// IsICMP tells whether type and code stand in the place of ports.
func (a Alike) IsICMP() bool { return isICMP(a.Protocol) }

func isICMP(protocol string) bool { return protocol == "icmp" || protocol == "icmpv6" }

// Drops is what an agent remembers of drops, on its socket at /v1/drops.
type Drops struct {
	Since     time.Time `json:"since"`     // since when it has listened
	Lost      uint64    `json:"lost"`      // events that the programs never told, ever
	Forgotten uint64    `json:"forgotten"` // packets of Drops that gave way to later ones
	Drops     []Drop    `json:"drops"`     // the latest first
}

// journal remembers drops, and forgets those that have not happened for the longest.
type journal struct {
	max   int
	since time.Time

	mu        sync.Mutex
	drops     map[Alike]*list.Element
	latest    *list.List // of *remembered, the latest first
	events    map[string]uint64
	forgotten uint64
}

type remembered struct {
	Drop
	logged time.Time
}

func newJournal(max int) *journal {
	return &journal{max: max, since: time.Now(), drops: make(map[Alike]*list.Element), latest: list.New(), events: make(map[string]uint64)}
}

// add notes an event. It tells whether it is worth a line in the log.
func (j *journal) add(e maps.Event) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.events[e.Kind]++
	if e.Kind != maps.EventDrop {
		return true
	}
	key := Alike{
		Reason: e.Verdict, Hook: e.Hook, Protocol: e.Protocol, Source: e.Source.Addr(), Destination: e.Destination.Addr(),
		Port: e.Destination.Port(), RuleEgress: e.RuleEgress, RuleIngress: e.RuleIngress,
	}
	if isICMP(e.Protocol) {
		key.Port, key.ICMPType, key.ICMPCode = 0, e.ICMPType, e.ICMPCode
	}
	at, known := j.drops[key]
	if !known {
		if j.latest.Len() == j.max {
			oldest := j.latest.Remove(j.latest.Back()).(*remembered)
			delete(j.drops, oldest.Alike)
			j.forgotten += oldest.Count
		}
		at = j.latest.PushFront(&remembered{Drop: Drop{Alike: key, First: e.Time, Last: e.Time}})
		j.drops[key] = at
	}
	j.latest.MoveToFront(at)
	d := at.Value.(*remembered)
	d.Count++
	if e.Time.After(d.Last) { // CPUs' events come in any order
		d.Last = e.Time
	}
	if e.Time.Before(d.First) {
		d.First = e.Time
	}
	d.SourcePort, d.IfIndex, d.Epoch = e.Source.Port(), e.IfIndex, e.Epoch
	if !strings.HasPrefix(e.Verdict, "drop_policy_") || time.Since(d.logged) < logAgain {
		return false
	}
	d.logged = time.Now()
	return true
}

// counts are the events by their kind, and the packets that were forgotten.
func (j *journal) counts() (events map[string]uint64, forgotten uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	events = map[string]uint64{maps.EventDrop: 0, maps.EventLog: 0}
	for kind, n := range j.events {
		events[kind] = n
	}
	return events, j.forgotten
}

// find lists the drops that a filter wants, the latest first.
func (j *journal) find(f DropFilter) Drops {
	j.mu.Lock()
	defer j.mu.Unlock()
	found := Drops{Since: j.since, Forgotten: j.forgotten, Drops: []Drop{}}
	for at := j.latest.Front(); at != nil && (f.Limit == 0 || len(found.Drops) < f.Limit); at = at.Next() {
		if d := at.Value.(*remembered).Drop; f.wants(d) {
			found.Drops = append(found.Drops, d)
		}
	}
	return found
}

// DropFilter says which drops are asked for; the zero value all.
type DropFilter struct {
	Ends     []netip.Prefix // one end is in the first and, if there is a second, the other in that
	Protocol string         // "tcp"; "": any
	Port     uint16         // of either end; 0: any
	Reason   string         // "": any
	Rule     uint32         // that decided at either end; 0: any
	Limit    int            // at most so many; 0: all
}

func (f DropFilter) wants(d Drop) bool {
	switch {
	case len(f.Ends) == 1 && !f.Ends[0].Contains(d.Source) && !f.Ends[0].Contains(d.Destination):
	case len(f.Ends) == 2 && !(f.Ends[0].Contains(d.Source) && f.Ends[1].Contains(d.Destination)) &&
		!(f.Ends[1].Contains(d.Source) && f.Ends[0].Contains(d.Destination)):
	case f.Protocol != "" && f.Protocol != d.Protocol:
	case f.Port != 0 && f.Port != d.Port && f.Port != d.SourcePort:
	case f.Reason != "" && f.Reason != d.Reason:
	case f.Rule != 0 && f.Rule != d.RuleEgress && f.Rule != d.RuleIngress:
	default:
		return true
	}
	return false
}

// Query is the filter as the socket takes it.
func (f DropFilter) Query() url.Values {
	q := make(url.Values)
	for _, p := range f.Ends {
		q.Add("end", p.String())
	}
	for name, value := range map[string]string{"protocol": f.Protocol, "reason": f.Reason} {
		if value != "" {
			q.Set(name, value)
		}
	}
	for name, value := range map[string]uint64{"port": uint64(f.Port), "rule": uint64(f.Rule), "limit": uint64(f.Limit)} {
		if value != 0 {
			q.Set(name, strconv.FormatUint(value, 10))
		}
	}
	return q
}

// parseDropFilter is the inverse of Query. An end may be an address too.
func parseDropFilter(q url.Values) (DropFilter, error) {
	f := DropFilter{Protocol: q.Get("protocol"), Reason: q.Get("reason")}
	for _, text := range q["end"] {
		p, err := netip.ParsePrefix(text)
		if a, errAddr := netip.ParseAddr(text); errAddr == nil && a.Zone() == "" {
			p, err = a.Unmap().Prefix(a.Unmap().BitLen())
		}
		if err != nil {
			return f, fmt.Errorf("end=%.80q: neither an address nor a prefix", text)
		}
		f.Ends = append(f.Ends, p.Masked())
	}
	if len(f.Ends) > 2 {
		return f, fmt.Errorf("end: %d of them; a packet has two", len(f.Ends))
	}
	for _, n := range []struct {
		name string
		bits int
		set  func(uint64)
	}{
		{"port", 16, func(v uint64) { f.Port = uint16(v) }},
		{"rule", 32, func(v uint64) { f.Rule = uint32(v) }},
		{"limit", 31, func(v uint64) { f.Limit = int(v) }},
	} {
		text := q.Get(n.name)
		if text == "" {
			continue
		}
		v, err := strconv.ParseUint(text, 10, n.bits)
		if err != nil {
			return f, fmt.Errorf("%s=%.80q: not a number below 2^%d", n.name, text, n.bits)
		}
		n.set(v)
	}
	known := []string{"end", "protocol", "reason", "port", "rule", "limit"}
	for name := range q {
		if !slices.Contains(known, name) {
			return f, fmt.Errorf("%.80q: no such filter; there are %q", name, known)
		}
	}
	return f, nil
}

// serveDrops answers GET /v1/drops.
func (a *Agent) serveDrops(w http.ResponseWriter, r *http.Request) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	var f DropFilter
	if err == nil {
		f, err = parseDropFilter(q)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	found := a.journal.find(f)
	if found.Lost, err = a.maps.EventsLost(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(found) // who asks may be gone
}

// watchEvents takes what the programs tell of until ctx ends.
func (a *Agent) watchEvents(ctx context.Context) {
	lines := map[string]*limiter{maps.EventDrop: {rate: logRate}, maps.EventLog: {rate: logRate}}
	for ctx.Err() == nil {
		err := a.readEvents(ctx, lines)
		if ctx.Err() != nil {
			return
		}
		a.problem("events", err)
		select {
		case <-time.After(retryTo):
		case <-ctx.Done():
		}
	}
}

// readEvents takes events until ctx ends. lines are for each kind, so that denials do not keep what a rule logs out of the log.
func (a *Agent) readEvents(ctx context.Context, lines map[string]*limiter) error {
	events, err := a.maps.Events()
	if err != nil {
		return err
	}
	defer events.Close()
	defer context.AfterFunc(ctx, func() { _ = events.Close() })() // ends a Read that waits
	a.problem("events", nil)
	for {
		e, err := events.Read()
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		line := lines[e.Kind]
		if !a.journal.add(e) || line == nil {
			continue
		}
		allowed, left := line.allow(time.Now())
		if left > 0 {
			a.Log.Info("events left out of this log", "kind", e.Kind, "number", left)
		}
		if allowed {
			a.Log.LogAttrs(ctx, slog.LevelInfo, words[e.Kind], a.attributes(e)...)
		}
	}
}

var words = map[string]string{maps.EventDrop: "denied", maps.EventLog: "opened, by a rule that logs"}

// attributes are what the log says of an event.
func (a *Agent) attributes(e maps.Event) []slog.Attr {
	out := []slog.Attr{slog.String("protocol", e.Protocol)}
	if isICMP(e.Protocol) {
		out = append(out, slog.Any("source", e.Source.Addr()), slog.Any("destination", e.Destination.Addr()),
			slog.Int("type", int(e.ICMPType)), slog.Int("code", int(e.ICMPCode)))
	} else {
		out = append(out, slog.Any("source", e.Source), slog.Any("destination", e.Destination))
	}
	if e.Verdict != "" {
		out = append(out, slog.String("reason", e.Verdict))
	}
	for _, rule := range []struct {
		end string
		id  uint32
	}{{"egress", e.RuleEgress}, {"ingress", e.RuleIngress}} {
		if rule.id == 0 {
			continue
		}
		text := fmt.Sprint(rule.id)
		if p := a.policies.policy(); p != nil {
			if r, known := p.Rule(rule.id); known {
				text += fmt.Sprintf(" (%s)", r)
			}
		}
		out = append(out, slog.String(rule.end, text))
	}
	return append(out, slog.Any("epoch", e.Epoch))
}

// limiter allows so many in a second.
type limiter struct {
	rate   int
	second int64
	used   int
	left   int // not allowed since the last that was
}

// allow tells whether one more is allowed, and how many were not before it.
func (l *limiter) allow(now time.Time) (allowed bool, left int) {
	if s := now.Unix(); s != l.second {
		l.second, l.used = s, 0
	}
	if l.used == l.rate {
		l.left++
		return false, 0
	}
	l.used++
	left, l.left = l.left, 0
	return true, left
}
