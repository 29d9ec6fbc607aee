package measure

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"
)

// Disturbance says what went on beside a measurement, and how it went.
type Disturbance struct {
	What     string  `json:"what"`
	Rate     float64 `json:"rate_per_second"`     // asked for
	Achieved float64 `json:"achieved_per_second"` // successful runs per second
	Runs     int     `json:"runs"`
	Failures int     `json:"failures"`
	// FirstError is the first failure's text, empty when there was none.
	FirstError string `json:"first_error,omitempty"`
}

// During calls fn rate times per second on every CPU but avoid, until stop is called, which waits for the last call and
// returns the account. A call that takes longer than 1/rate delays the next ones; none is made up for.
func During(ctx context.Context, what string, rate float64, avoid int, fn func(context.Context) error) (stop func() Disturbance, err error) {
	if rate <= 0 || rate > 100000 {
		return nil, fmt.Errorf("rate %v per second: must be above 0 and at most 100000", rate)
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	others := slices.DeleteFunc(cpus, func(c int) bool { return c == avoid })
	d := Disturbance{What: what, Rate: rate}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	begin := time.Now()
	go func() {
		defer close(done)
		runtime.LockOSThread() // commands inherit the affinity from the thread that starts them
		if len(others) > 0 {
			if err := pin(others...); err != nil {
				d.Failures, d.FirstError = 1, err.Error()
				return
			}
		}
		tick := time.NewTicker(time.Duration(float64(time.Second) / rate))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			err := fn(ctx)
			if ctx.Err() != nil {
				return
			}
			d.Runs++
			if err != nil {
				if d.Failures++; d.FirstError == "" {
					d.FirstError = err.Error()
				}
			}
		}
	}()
	return sync.OnceValue(func() Disturbance {
		cancel()
		<-done
		if s := time.Since(begin).Seconds(); s > 0 {
			d.Achieved = float64(max(d.Runs-d.Failures, 0)) / s
		}
		return d
	}), nil
}
