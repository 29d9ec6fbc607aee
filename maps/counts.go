package maps

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// Count is how many packets left the pipeline at one hook with one verdict.
type Count struct {
	Hook    string `json:"hook"`    // from_pod, to_pod, from_net, to_net
	Verdict string `json:"verdict"` // as in docs/maps.md, lower case
	Meaning string `json:"meaning"`
	Packets uint64 `json:"packets"` // wire segments
	Bytes   uint64 `json:"bytes"`   // of frames
}

// Dropped tells whether the verdict ends a packet that was not the pod's own control traffic.
func (c Count) Dropped() bool { return strings.HasPrefix(c.Verdict, "drop_") }

// Counts reads caracal_counts, summed over CPUs: every verdict of every hook, in the order of their numbers. What the loaded programs
// have no place for, being of an earlier build, is 0.
func (m *Maps) Counts() ([]Count, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalCounts)
	if err != nil {
		return nil, err
	}
	defer pinned.Close()
	var counts []Count
	for h, hook := range bpf.Hooks {
		for v, verdict := range bpf.Verdicts {
			var perCPU []bpf.DataplaneCount
			if err := pinned.Lookup(uint32(h*bpf.VerdictSpace+v), &perCPU); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return nil, fmt.Errorf("read count of %s at %s: %w", verdict.Word, hook.Word, err)
			}
			c := Count{Hook: hook.Word, Verdict: verdict.Word, Meaning: verdict.Meaning}
			for _, n := range perCPU {
				c.Packets += n.Packets
				c.Bytes += n.Bytes
			}
			counts = append(counts, c)
		}
	}
	return counts, nil
}
