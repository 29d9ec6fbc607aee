// Package lifecycle measures what a runtime waits for: ADD, DEL, and a new pod's first answered packet.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/caracal-net/caracal/tools/podbench/datapath"
	"github.com/caracal-net/caracal/tools/podbench/measure"
	"github.com/caracal-net/caracal/tools/podbench/report"
	"github.com/caracal-net/caracal/tools/podbench/stats"
)

// Options of Measure.
type Options struct {
	Count    int // pods added and removed on each datapath
	Burst    int // of them, one after the other in one turn
	Pods     int // pods that exist beside, made before
	Parallel int // above 1: a storm of ADDs and DELs, datapath by datapath
	// Pause lies between turns, so that what the kernel still cleans up behind one plugin is not waited for by another.
	Pause    time.Duration
	Progress func(done, total int, what string)
}

const (
	every  = 200 * time.Microsecond
	within = 10 * time.Second
)

// bench is one datapath at work.
type bench struct {
	node *datapath.Node
	echo *measure.Echo
	out  report.Lifecycle

	fill, add, del, first, asked []float64 // ms
	mu                           sync.Mutex
	held                         map[netip.Addr]string
}

// Measure takes the datapaths in turns, in an order that changes from round to round.
func Measure(ctx context.Context, session *datapath.Session, specs []datapath.Spec, opts Options) ([]report.Lifecycle, error) {
	var all []*bench
	for _, s := range specs {
		if s.Kind != datapath.KindCNI {
			return nil, fmt.Errorf("datapath %s has no plugin to measure", s.Name)
		}
		if s.Hosts > 1 {
			return nil, fmt.Errorf("datapath %s: ADD is measured on one host", s.Name)
		}
		if s.Rules > 0 {
			return nil, fmt.Errorf("datapath %s: ADD is measured without rules", s.Name)
		}
		b, err := start(ctx, session, s, opts)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.Name, err)
		}
		defer b.echo.Close()
		all = append(all, b)
	}
	if opts.Parallel > 1 {
		for i, b := range all {
			opts.progress(i, len(all), "storm over "+b.node.Spec.Name)
			if err := b.storm(ctx, opts); err != nil {
				return nil, err
			}
		}
	} else {
		for done, round := 0, 0; done < opts.Count; round++ {
			burst := min(opts.Burst, opts.Count-done)
			for k := range all {
				b := all[(k+round)%len(all)]
				opts.progress(done*len(all)+k*burst, opts.Count*len(all), "ADD and DEL of "+b.node.Spec.Name)
				for _, turn := range []func() error{
					func() error { return b.after(ctx, burst) },
					func() error { return b.during(ctx) },
				} {
					select {
					case <-time.After(opts.Pause):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if err := turn(); err != nil {
						return nil, fmt.Errorf("%s: %w", b.node.Spec.Name, err)
					}
				}
			}
			done += burst
		}
	}
	var out []report.Lifecycle
	for _, b := range all {
		if err := b.leftovers(); err != nil {
			return nil, err
		}
		out = append(out, b.summary(all[0]))
	}
	return out, nil
}

func (o Options) progress(done, total int, what string) {
	if o.Progress != nil {
		o.Progress(done, total, what)
	}
}

// start makes the node with its first pod, whose ADD is the cold one, and the pods beside.
func start(ctx context.Context, session *datapath.Session, s datapath.Spec, opts Options) (*bench, error) {
	n, err := s.Start(session)
	if err != nil {
		return nil, err
	}
	b := &bench{node: n, held: make(map[netip.Addr]string), out: report.Lifecycle{
		Datapath: s.Name, Pods: 1 + opts.Pods, Parallel: max(1, opts.Parallel), Errors: []string{}, Leftovers: []string{},
	}}
	server, err := n.NewPod()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	if err := n.Add(ctx, server); err != nil {
		return nil, err
	}
	b.out.Cold = ms(time.Since(begin))
	if b.echo, err = measure.NewEcho(measure.End{NS: server.NS, Addr: server.Addr}); err != nil {
		return nil, err
	}
	for i := range opts.Pods {
		opts.progress(i, opts.Pods, "pods of "+s.Name)
		p, err := n.NewPod()
		if err != nil {
			return nil, err
		}
		begin := time.Now()
		if err := n.Add(ctx, p); err != nil {
			return nil, err
		}
		b.fill = append(b.fill, ms(time.Since(begin)))
	}
	return b, nil
}

// after adds pods one after the other, asks for the first answer of each as soon as its ADD has returned, as its container
// could, and removes them.
func (b *bench) after(ctx context.Context, pods int) error {
	var all []*datapath.Pod
	for range pods {
		p, err := b.node.NewPod()
		if err != nil {
			return err
		}
		all = append(all, p)
		begin := time.Now()
		if err := b.node.Add(ctx, p); err != nil {
			return err
		}
		b.add = append(b.add, ms(time.Since(begin)))
		at, err := measure.FirstAnswer(ctx, p.NS, b.echo.At(), every, within)
		if err != nil {
			return err
		}
		b.first = append(b.first, ms(at.Sub(begin)))
	}
	for _, p := range all {
		begin := time.Now()
		if err := b.node.Del(ctx, p); err != nil {
			return err
		}
		b.del = append(b.del, ms(time.Since(begin)))
	}
	for _, p := range all {
		if err := b.node.Remove(p); err != nil {
			return err
		}
	}
	return nil
}

// during is after with one pod that asks from the call of ADD on. It disturbs the ADD that it looks at, which therefore counts
// for nothing else.
func (b *bench) during(ctx context.Context) error {
	p, err := b.node.NewPod()
	if err != nil {
		return err
	}
	type answer struct {
		at  time.Time
		err error
	}
	answered := make(chan answer, 1)
	begin := time.Now()
	go func() {
		at, err := measure.FirstAnswer(ctx, p.NS, b.echo.At(), every, within)
		answered <- answer{at, err}
	}()
	err = b.node.Add(ctx, p)
	a := <-answered
	if err := errors.Join(err, a.err); err != nil {
		return err
	}
	b.asked = append(b.asked, ms(a.at.Sub(begin)))
	if err := b.node.Del(ctx, p); err != nil {
		return err
	}
	return b.node.Remove(p)
}

// storm adds and removes pods from many threads at once.
func (b *bench) storm(ctx context.Context, opts Options) error {
	work := make(chan struct{}, opts.Count)
	for range opts.Count {
		work <- struct{}{}
	}
	close(work)
	begin := time.Now()
	var wg sync.WaitGroup
	for range opts.Parallel {
		wg.Go(func() {
			for range work {
				if ctx.Err() != nil {
					return
				}
				if err := b.gust(ctx); err != nil {
					b.mu.Lock()
					b.out.Errors = append(b.out.Errors, err.Error())
					b.mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	b.out.Seconds = time.Since(begin).Seconds()
	return ctx.Err()
}

// gust is one pod of a storm.
func (b *bench) gust(ctx context.Context) error {
	p, err := b.node.NewPod()
	if err != nil {
		return err
	}
	begin := time.Now()
	err = b.node.Add(ctx, p)
	took := ms(time.Since(begin))
	b.mu.Lock()
	if err == nil {
		b.add = append(b.add, took)
		if _, taken := b.held[p.Addr]; taken {
			b.out.Duplicates++
		}
		b.held[p.Addr] = p.Name
	}
	b.mu.Unlock()
	// The address stops being ours when DEL is called: another ADD may have it before DEL returns.
	b.mu.Lock()
	if b.held[p.Addr] == p.Name {
		delete(b.held, p.Addr)
	}
	b.mu.Unlock()
	begin = time.Now()
	if derr := b.node.Del(ctx, p); derr != nil {
		err = errors.Join(err, derr)
	} else {
		took = ms(time.Since(begin))
		b.mu.Lock()
		b.del = append(b.del, took)
		b.mu.Unlock()
	}
	return errors.Join(err, b.node.Remove(p))
}

// leftovers lists the pods' host interfaces that stay although their pods are gone: all but lo, a bridge, and one for
// each pod that is still there.
func (b *bench) leftovers() error {
	deadline := time.Now().Add(within)
	for {
		links, err := b.node.HostLinks()
		if err != nil {
			return err
		}
		links = slices.DeleteFunc(links, func(l string) bool { return l == "lo" || l == "pb0" })
		if len(links) <= b.out.Pods || time.Now().After(deadline) {
			if len(links) > b.out.Pods {
				b.out.Leftovers = links
			}
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (b *bench) summary(first *bench) report.Lifecycle {
	o := b.out
	o.Add, o.Del, o.First = stats.Summarize(b.add), stats.Summarize(b.del), stats.Summarize(b.first)
	o.AddRatio = stats.Summarize(stats.Ratios(b.add, first.add))
	o.DelRatio = stats.Summarize(stats.Ratios(b.del, first.del))
	o.Asked, o.AskedRatio = stats.Summarize(b.asked), stats.Summarize(stats.Ratios(b.asked, first.asked))
	if n := len(b.fill); n >= 30 {
		o.Tenth, o.Last = stats.Summarize(b.fill[4:14]).Median, stats.Summarize(b.fill[n-10:]).Median
	}
	o.FirstRatio = stats.Summarize(stats.Ratios(b.first, first.first))
	return o
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }
