package cni

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/node"
)

func splitLines(s string) []string { return strings.Split(strings.TrimSpace(s), "\n") }

// othersOnly: of all that this host holds, only the one pod's is left.
func (h *host) othersOnly(other *pod) error {
	err := h.leftovers()
	if err == nil {
		return fmt.Errorf("the other pod is gone")
	}
	for _, what := range strings.Split(strings.TrimPrefix(err.Error(), "left: "), "; ") {
		mine := strings.Contains(what, other.id) || what == "2 addresses held" || strings.Contains(what, other.hostIf()) ||
			strings.HasPrefix(what, "quota of ") || strings.HasPrefix(what, "pod ")
		for _, v6 := range []bool{false, true} {
			mine = mine || strings.Contains(what+" ", other.addr(v6).String()+" ") || strings.Contains(what, other.addr(v6).String()+"/")
		}
		if !mine {
			return fmt.Errorf("left: %s, of %w", what, err)
		}
	}
	if n := strings.Count(err.Error(), "quota of "); n != 1 {
		return fmt.Errorf("%d quotas: %w", n, err)
	}
	if n := strings.Count(err.Error(), "in the maps"); n != 3 {
		return fmt.Errorf("%d in the maps: %w", n, err)
	}
	return nil
}

// TestStorm: 64 runtimes add and remove at once. CARACAL_STORM sets the number of operations.
func TestStorm(t *testing.T) {
	h := newHost(t)
	operations := 384
	if s := os.Getenv("CARACAL_STORM"); s != "" {
		operations, _ = strconv.Atoi(s)
	}
	const workers = 64
	pods := make([]*pod, workers)
	for i := range pods {
		pods[i] = h.pod()
	}
	var (
		mu    sync.Mutex
		held  = map[netip.Addr]string{}
		took  = map[string][]time.Duration{}
		group sync.WaitGroup
		begin = time.Now()
	)
	for _, p := range pods {
		group.Go(func() {
			for range operations / workers / 2 {
				at := time.Now()
				if err := p.do("ADD"); err != nil {
					t.Error(err)
					return
				}
				added := time.Since(at)
				mu.Lock()
				took["ADD"] = append(took["ADD"], added)
				addrs := []netip.Addr{p.addr(false), p.addr(true)}
				for _, a := range addrs {
					if held[a] != "" {
						t.Errorf("%s is held by %s and %s", a, held[a], p.id)
					}
					held[a] = p.id
				}
				mu.Unlock()
				// Others get on with theirs meanwhile: what was given out twice shows.
				mu.Lock()
				for _, a := range addrs {
					held[a] = ""
				}
				mu.Unlock()
				at = time.Now()
				if err := p.do("DEL"); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				took["DEL"] = append(took["DEL"], time.Since(at))
				mu.Unlock()
			}
		})
	}
	group.Wait()
	for command, d := range took {
		slices.Sort(d)
		t.Logf("%d %s: median %s, last %s", len(d), command, d[len(d)/2], d[len(d)-1])
	}
	t.Logf("all in %s", time.Since(begin).Round(time.Millisecond))
	h.clean()
}

// TestManyPods fills a node: two blocks' worth of pods, or as many as CARACAL_PODS says, and tells what ADD cost.
func TestManyPods(t *testing.T) {
	n := 80
	if s := os.Getenv("CARACAL_PODS"); s != "" {
		n, _ = strconv.Atoi(s)
	}
	h := newHost(t)
	var took []time.Duration
	var pods []*pod
	for range n {
		p := h.pod()
		at := time.Now()
		p.add()
		took = append(took, time.Since(at))
		pods = append(pods, p)
	}
	median := func(d []time.Duration) time.Duration {
		d = slices.Clone(d)
		slices.Sort(d)
		return d[len(d)/2]
	}
	t.Logf("ADD: around the 10th %s, the last 20 %s", median(took[3:min(23, n)]), median(took[max(0, n-20):]))
	blocks := 0
	must(t, h.db(func(tx *node.Tx) error {
		all, err := tx.Blocks()
		blocks = len(all)
		return err
	}))
	t.Logf("%d blocks", blocks)
	pods[0].ping(pods[n-1].addr(false))
	at := time.Now()
	for _, p := range pods {
		p.del()
	}
	t.Logf("DEL: mean %s", time.Since(at)/time.Duration(n))
	h.clean()
}
