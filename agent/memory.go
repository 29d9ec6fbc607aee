package agent

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	burstLook = 2 * time.Second
	burst     = 8 << 20 // bytes allocated in that time: much has changed, or the agent has just begun
)

// giveBack gives memory back to the kernel once a burst of changes is over. The runtime would do so in the course of minutes, and
// would not look for garbage before the heap has doubled. It does not happen while there is work to do.
func giveBack(ctx context.Context) {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	tick := time.NewTicker(burstLook)
	defer tick.Stop()
	busy := true
	for last := uint64(0); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(sample)
		now := sample[0].Value.Uint64()
		if now-last > burst {
			busy = true
		} else if busy {
			busy = false
			debug.FreeOSMemory()
		}
		last = now
	}
}
