package cluster

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// smallBlocks has IPv4 blocks of four addresses: another is claimed when one is left.
func smallBlocks(cidr string) string {
	return fmt.Sprintf(`apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v4}
spec: {cidr: %s, blockSize: 30}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v6}
spec: {cidr: "2001:db8:244::/64"}
`, cidr)
}

// claims are a host's IPv4 blocks in the store, as the first host sees it.
func claims(t *testing.T, h *lab.Host) []netip.Prefix {
	t.Helper()
	var all []agent.Block
	must(t, json.Unmarshal([]byte(ctl(t, h.Lab().Host(1), "", "ipam", "blocks", "-o", "json")), &all))
	var own []netip.Prefix
	for _, b := range all {
		if b.Node == h.Name && b.CIDR.Addr().Is4() {
			own = append(own, b.CIDR)
		}
	}
	return own
}

// recorded are a host's IPv4 blocks in its node.db.
func recorded(t *testing.T, h *lab.Host) []netip.Prefix {
	t.Helper()
	db, err := node.OpenReadOnly(t.Context(), h.StateDir(), node.Options{BootIDFile: h.BootIDFile()})
	must(t, err)
	defer db.Close()
	var all []netip.Prefix
	must(t, db.View(func(tx *node.Tx) error {
		blocks, err := tx.Blocks()
		for _, b := range blocks {
			if b.CIDR.Addr().Is4() {
				all = append(all, b.CIDR)
			}
		}
		return err
	}))
	return all
}

// count waits until list has so many blocks, and returns them.
func count(t *testing.T, h *lab.Host, list func(*testing.T, *lab.Host) []netip.Prefix, n int) (blocks []netip.Prefix) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s has %d blocks", h.Name, n), func() error {
		if blocks = list(t, h); len(blocks) != n {
			return fmt.Errorf("%v", blocks)
		}
		return nil
	})
	return blocks
}

// addPods adds pods one after the other, each when there is an address for it.
func addPods(t *testing.T, h *lab.Host, name string, n int) (pods []*lab.Pod) {
	t.Helper()
	for i := range n {
		eventually(t, "there is an address for another pod", func() error {
			p, err := h.AddPod(t.Context(), fmt.Sprint(name, i), lab.PodOptions{})
			if err == nil {
				pods = append(pods, p)
			}
			return err
		})
	}
	return pods
}

func deletePods(t *testing.T, pods []*lab.Pod) {
	t.Helper()
	for _, p := range pods {
		must(t, p.Delete(t.Context()))
	}
}

// TestSurplusReleased: a host whose pods are gone gives up the block that it can do without, and of two that want it one
// gets it.
func TestSurplusReleased(t *testing.T) {
	l := newClusterOf(t, 3, smallBlocks("10.244.0.0/28"), testenv.Bin)
	ctx := t.Context()
	one := l.Host(1)
	pods := addPods(t, one, "a", 5)
	had := count(t, one, claims, 2)
	var short []*lab.Pod
	for _, h := range l.Hosts()[1:] {
		short = append(short, addPods(t, h, "b", 3)...)
		eventually(t, h.Name+" wants another", func() error { return hasProblem(t, h, "blocks", "every block has a node") })
	}
	deletePods(t, pods)
	kept := count(t, one, claims, 1)
	released := had[slices.IndexFunc(had, func(b netip.Prefix) bool { return b != kept[0] })]
	var winner *lab.Host
	eventually(t, "another host has it", func() error {
		for _, h := range l.Hosts()[1:] {
			if slices.Contains(claims(t, h), released) {
				winner = h
			}
		}
		if winner == nil {
			return fmt.Errorf("%s is nobody's", released)
		}
		return nil
	})
	loser := l.Host(5 - winner.Number)
	must(t, hasProblem(t, loser, "blocks", "every block has a node"))
	if got := recorded(t, one); !slices.Equal(got, kept) {
		t.Errorf("%s has %v in its node.db, claimed %v", one.Name, got, kept)
	}
	for _, h := range []*lab.Host{one, loser} {
		eventually(t, h.Name+" has a route to it", func() error {
			kernel, err := h.Exec(ctx, "ip", "route")
			if err != nil {
				return err
			}
			if table := ctl(t, h, "", "routes"); !strings.Contains(kernel, released.String()+" via "+winner.Addr().String()) || !strings.Contains(table, winner.Addr().String()) {
				return fmt.Errorf("%s\n%s", kernel, table)
			}
			return nil
		})
	}
	more := addPods(t, winner, "c", 2)
	if !released.Contains(more[1].Addr()) {
		t.Errorf("%s is not in %s", more[1].Addr(), released)
	}
	again := addPods(t, one, "d", 2)
	reaches(t, again[0], more[1])
	reaches(t, more[1], short[3*(loser.Number-2)])
	seen := make(map[netip.Addr]bool)
	for _, p := range slices.Concat(short, more, again) {
		if seen[p.Addr()] {
			t.Errorf("%s is two pods' address", p.Addr())
		}
		seen[p.Addr()] = true
	}
	ready(t, one, 2)
}

// TestPoolDisabled: the blocks of a pool that is disabled or deleted go when their pods have gone.
func TestPoolDisabled(t *testing.T) {
	l := newClusterOf(t, 2, smallBlocks("10.244.0.0/28"), testenv.Bin)
	one, two := l.Host(1), l.Host(2)
	ctl(t, one, strings.Replace(smallBlocks("10.245.0.0/28"), "name: v4", "name: other", 1), "apply", "-f", "-")
	for _, h := range l.Hosts() {
		count(t, h, claims, 2)
	}
	pods := addPods(t, two, "a", 3)
	ctl(t, one, strings.Replace(smallBlocks("10.244.0.0/28"), "blockSize: 30", "blockSize: 30, disabled: true", 1), "apply", "-f", "-")
	count(t, one, claims, 1)
	ctl(t, one, "", "delete", "ippool", "v4")
	if got := len(claims(t, two)); got < 2 {
		t.Errorf("%d blocks: that of running pods was given up", got)
	}
	deletePods(t, pods)
	count(t, two, claims, 1)
}

// TestReleaseKilled kills an agent at each step of giving a block up. At no time can another host have the block while this
// one can give out its addresses; the next agent finishes it, and claims another block when it wants one.
func TestReleaseKilled(t *testing.T) {
	l := newClusterOf(t, 5, smallBlocks("10.244.0.0/26"), testenv.Faulty)
	ctx := t.Context()
	steps := []struct {
		step             string
		claims, recorded int // when the agent has died there
	}{{"forget", 2, 2}, {"withdraw", 2, 1}, {"release", 2, 1}, {"released", 1, 1}}
	var pods []*lab.Pod
	for i, s := range steps {
		h := l.Host(i + 1)
		pods = append(pods, addPods(t, h, "a", 5)...)
		count(t, h, claims, 2)
		count(t, h, recorded, 2)
		must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
		t.Setenv("CARACAL_FAULT", s.step+":kill")
		must(t, h.StartAgent(ctx))
	}
	t.Setenv("CARACAL_FAULT", "")
	deletePods(t, pods)
	for i, s := range steps {
		h := l.Host(i + 1)
		eventually(t, h.Name+"'s agent is killed before "+s.step, func() error {
			if _, err := status(t, h); err == nil {
				return fmt.Errorf("it answers")
			}
			return nil
		})
		if c, r := claims(t, h), recorded(t, h); len(c) != s.claims || len(r) != s.recorded {
			t.Errorf("%s, killed before %s: claims %v, node.db has %v", h.Name, s.step, c, r)
		}
	}
	// Another one is wanted than what is claimed but not recorded.
	three := l.Host(3)
	addPods(t, three, "b", 4)
	if _, err := three.AddPod(ctx, "early", lab.PodOptions{}); err == nil || !strings.Contains(err.Error(), "has not claimed another block yet") {
		t.Errorf("a pod without an address: %v", err)
	}
	for i := range steps {
		must(t, l.Host(i+1).StartAgent(ctx))
	}
	late := addPods(t, three, "late", 1)[0]
	if back := count(t, three, recorded, 2); !slices.ContainsFunc(back, func(b netip.Prefix) bool { return b.Contains(late.Addr()) }) {
		t.Errorf("%s has %v; the pod has %s", three.Name, back, late.Addr())
	}
	for _, n := range []int{1, 2, 4} {
		h := l.Host(n)
		left := count(t, h, claims, 1)
		eventually(t, h.Name+" has recorded it", func() error {
			if got := recorded(t, h); !slices.Equal(got, left) {
				return fmt.Errorf("%v, claimed %v", got, left)
			}
			return nil
		})
	}
	for _, h := range l.Hosts() {
		ready(t, h, 4)
	}
	reaches(t, late, l.Host(5).TestPod(t, "c", lab.PodOptions{}))
}
