package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	stdmaps "maps"
	"slices"
	"strings"
	"time"

	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/maps"
)

const (
	sweepEvery  = time.Second
	sweepWithin = 30 * time.Second // all places of the flow table are looked at once
	sweepLeast  = 1000             // places at a time

	nearlyFull = 90 // percent: from there on it is a problem
	roomAgain  = 80 // percent: until there
)

// sweeper keeps the flow table such that it tells who is there.
type sweeper struct {
	next   uint32          // place
	full   map[string]bool // what is nearly full: "table", or a pod's interface
	warned bool            // that the programs can't sweep
}

// tendFlows removes expired flows, a piece of the table at a time, and says when it, or a pod's share of it, is nearly full. New
// flows need none of it: they take the places of expired ones themselves.
func (a *Agent) tendFlows(ctx context.Context) {
	s := sweeper{full: make(map[string]bool)}
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.problem("flows", a.sweep(&s))
		}
	}
}

// sweep looks at the next piece. The error is about the flows that are there.
func (a *Agent) sweep(s *sweeper) error {
	state, err := a.maps.State()
	if err != nil {
		return err
	}
	if state.Flows > 0 {
		places := max(sweepLeast, uint32(uint64(state.MaxFlows)*uint64(sweepEvery)/uint64(sweepWithin)))
		_, err := a.maps.SweepFlows(s.next, places)
		switch {
		case errors.Is(err, maps.ErrNotLoaded): // until the programs are upgraded too
			if !s.warned {
				a.Log.Info("expired flows stay until new ones need their places", "reason", err)
			}
			s.warned = true
		case err != nil:
			return err
		}
		if s.next += places; s.next >= state.MaxFlows {
			s.next = 0
		}
	}
	return a.fullness(s, state)
}

// fullness says what is nearly full. Its text stays the same while it is about the same.
func (a *Agent) fullness(s *sweeper, state maps.State) error {
	quotas, err := a.maps.Quotas()
	if err != nil {
		return err
	}
	full := make(map[string]bool)
	look := func(what string, used, limit uint32) {
		percent := uint64(nearlyFull)
		if s.full[what] {
			percent = roomAgain
		}
		if uint64(used)*100 >= uint64(limit)*percent && limit > 0 {
			full[what] = true
		}
	}
	look("table", state.Flows, state.MaxFlows)
	for ifindex, q := range quotas {
		if q.Flows > 0 {
			look(interfaceName(ifindex), q.Flows, q.Limit)
		}
	}
	s.full = full
	var texts []string
	if full["table"] {
		texts = append(texts, fmt.Sprintf("the flow table is nearly full, of %d places; then new flows are refused (caracalctl flows shows whose they are)", state.MaxFlows))
	}
	for _, what := range slices.Sorted(stdmaps.Keys(full)) {
		if what != "table" {
			texts = append(texts, fmt.Sprintf("the pod behind %s holds nearly as many flows as it may; then its new ones are refused", what))
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}

// interfaceName is a pod's, or its number when it is gone.
func interfaceName(ifindex uint32) string {
	if name, err := nl.Name(int(ifindex)); err == nil {
		return name
	}
	return fmt.Sprintf("interface %d", ifindex)
}

// flowMetrics writes what there is to know of flows, for Prometheus.
func (a *Agent) flowMetrics(w io.Writer) {
	metric := func(name, kind, help string) { fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	one := func(name, kind, help string, value uint64) {
		metric(name, kind, help)
		fmt.Fprintf(w, "%s %d\n", name, value)
	}
	if state, err := a.maps.State(); err == nil {
		one("caracal_flows", "gauge", "Confirmed flows.", uint64(state.Flows))
		one("caracal_flows_max", "gauge", "Places for flows.", uint64(state.MaxFlows))
	}
	if c, err := a.maps.Churn(); err == nil {
		one("caracal_flows_opening", "gauge", "Flows of which one side was heard.", uint64(c.Opening))
		one("caracal_flows_opening_max", "gauge", "Places for such flows; the oldest give way to newer ones.", uint64(c.MaxOpens))
		one("caracal_flows_opened_total", "counter", "Flows that a first packet opened.", c.Opened)
		one("caracal_flows_confirmed_total", "counter", "Flows of which both sides were heard.", c.Confirmed)
		one("caracal_flows_displaced_total", "counter", "Flows displaced by newer ones before both sides were heard.", a.displacedUntilNow(c.Displaced))
		metric("caracal_flows_reclaimed_total", "counter", "Expired flows removed, by a new flow that needed the room or by the agent's sweep.")
		fmt.Fprintf(w, "caracal_flows_reclaimed_total{by=\"insert\"} %d\ncaracal_flows_reclaimed_total{by=\"sweep\"} %d\n", c.Reclaimed, c.Swept)
	}
	if counts, err := a.maps.Counts(); err == nil {
		metric("caracal_flows_refused_total", "counter", "Packets dropped because their new flow found no room: in the table, or in its pod's share of it.")
		for _, r := range []struct{ reason, verdict string }{{"table", "drop_flows_full"}, {"quota", "drop_quota"}} {
			n := uint64(0)
			for _, c := range counts {
				if c.Verdict == r.verdict {
					n += c.Packets
				}
			}
			fmt.Fprintf(w, "caracal_flows_refused_total{reason=%q} %d\n", r.reason, n)
		}
	}
	quotas, err := a.maps.Quotas()
	if err != nil {
		return
	}
	type pod struct {
		name string
		maps.Quota
	}
	var pods []pod
	for ifindex, q := range quotas {
		pods = append(pods, pod{interfaceName(ifindex), q})
	}
	slices.SortFunc(pods, func(a, b pod) int { return cmp.Compare(a.name, b.name) })
	metric("caracal_pod_flows", "gauge", "Confirmed flows of a pod, by its host interface.")
	for _, p := range pods {
		fmt.Fprintf(w, "caracal_pod_flows{interface=%q} %d\n", p.name, p.Flows)
	}
	metric("caracal_pod_flows_max", "gauge", "How many flows the pod may hold.")
	for _, p := range pods {
		fmt.Fprintf(w, "caracal_pod_flows_max{interface=%q} %d\n", p.name, p.Limit)
	}
}

// displacedUntilNow never goes down, though flows open while they are counted.
func (a *Agent) displacedUntilNow(n uint64) uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.displaced = max(a.displaced, n)
	return a.displaced
}
