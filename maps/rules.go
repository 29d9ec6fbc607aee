package maps

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// RuleCount is what a rule decided about, in both directions of the flows that it allowed.
type RuleCount struct {
	Rule    uint32 `json:"rule"`
	Packets uint64 `json:"packets"` // wire segments
	Bytes   uint64 `json:"bytes"`   // of frames
}

// Rules lists the rules that allowed or denied a packet, by id: what is counted in caracal_rules and by the flows that there
// are. Denied packets are exact, allowed ones as approximate as flows count. A flow that opens, ends or gets another rule
// while it is listed may count twice or not at all.
func (m *Maps) Rules() ([]RuleCount, error) {
	sums := make(map[uint32]*RuleCount)
	add := func(rule uint32, packets, bytes uint64) {
		if rule == 0 {
			return
		}
		s := sums[rule]
		if s == nil {
			s = &RuleCount{Rule: rule}
			sums[rule] = s
		}
		s.Packets += packets
		s.Bytes += bytes
	}
	err := m.counted(func(rule uint32, counts []bpf.DataplaneCount) {
		for _, c := range counts {
			add(rule, c.Packets, c.Bytes)
		}
	})
	if err != nil {
		return nil, err
	}
	flows, err := m.pinned(bpf.DataplaneMapCaracalFlows)
	if err != nil {
		return nil, err
	}
	defer flows.Close()
	err = each(flows, func(_ *bpf.DataplaneFlowKey, f *bpf.DataplaneFlow) {
		packets, bytes := f.Leg[0].Packets+f.Leg[1].Packets, f.Leg[0].Bytes+f.Leg[1].Bytes
		add(f.RuleEgress, packets, bytes)
		add(f.RuleIngress, packets, bytes)
	})
	if err != nil {
		return nil, fmt.Errorf("list flows of rules: %w", err)
	}
	var rules []RuleCount
	for _, s := range sums {
		// What was taken back from a rule for a flow that was then missed.
		s.Packets, s.Bytes = uint64(max(0, int64(s.Packets))), uint64(max(0, int64(s.Bytes)))
		rules = append(rules, *s)
	}
	slices.SortFunc(rules, func(a, b RuleCount) int { return cmp.Compare(a.Rule, b.Rule) })
	return rules, nil
}

// RuleIDs lists the rules that are in caracal_rules, in no order.
func (m *Maps) RuleIDs() (ids []uint32, err error) {
	err = m.counted(func(rule uint32, _ []bpf.DataplaneCount) { ids = append(ids, rule) })
	return ids, err
}

// counted calls fn for every entry of caracal_rules, with what each CPU counted.
func (m *Maps) counted(fn func(rule uint32, counts []bpf.DataplaneCount)) error {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalRules)
	if err != nil {
		return err
	}
	defer pinned.Close()
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count CPUs: %w", err)
	}
	keys, values := make([]uint32, batch), make([]bpf.DataplaneCount, batch*cpus)
	var cursor ebpf.MapBatchCursor
	for done := false; !done; {
		n, err := pinned.BatchLookup(&cursor, keys, values, nil)
		if done = errors.Is(err, ebpf.ErrKeyNotExist); err != nil && !done {
			return fmt.Errorf("list rules: %w", err)
		}
		for i := range n {
			fn(keys[i], values[i*cpus:(i+1)*cpus])
		}
	}
	return nil
}

// RemoveRules forgets what rules that are gone have counted. Missing ones are not an error. A flow that such a rule allowed
// counts there once more when it ends, unless it was judged since.
func (m *Maps) RemoveRules(rules []uint32) error {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalRules)
	if err != nil {
		return err
	}
	defer pinned.Close()
	if err := removeAll(pinned, rules); err != nil {
		return fmt.Errorf("remove rules: %w", err)
	}
	return nil
}
