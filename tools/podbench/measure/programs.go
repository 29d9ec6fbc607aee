package measure

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
)

// runStats makes the kernel count what programs take (BPF_ENABLE_STATS), while fn runs, and returns what these took and
// how often they ran. It costs every program of the machine a few dozen ns a run, which is why no trip is timed meanwhile.
func runStats(programs []*ebpf.Program, fn func() error) (took time.Duration, runs uint64, err error) {
	stats, err := ebpf.EnableStats(0 /* BPF_STATS_RUN_TIME */)
	if err != nil {
		return 0, 0, fmt.Errorf("enable statistics of programs: %w", err)
	}
	defer func() { err = errors.Join(err, stats.Close()) }()
	sum := func(sign int) error {
		for _, p := range programs {
			s, err := p.Stats()
			if err != nil {
				return fmt.Errorf("read statistics of a program: %w", err)
			}
			took += time.Duration(sign) * s.Runtime
			runs += uint64(sign) * s.RunCount
		}
		return nil
	}
	if err := sum(-1); err != nil {
		return 0, 0, err
	}
	if err := fn(); err != nil {
		return 0, 0, err
	}
	return took, runs, sum(1)
}
