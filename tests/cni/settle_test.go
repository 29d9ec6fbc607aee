package cni

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/loader"
	caracal "github.com/caracal-net/caracal/maps"
)

// by tells how the pod's programs are attached.
func (p *pod) by() (by string, err error) {
	err = netns.Do(netns.Path(p.h.name), func() error {
		l, err := netlink.LinkByName(p.hostIf())
		if err != nil {
			return err
		}
		by, err = loader.Attached(p.h.pins(), p.hostIf(), l.Attrs().Index)
		return err
	})
	return by, err
}

// settled waits until the pod is on TCX.
func (p *pod) settled() {
	p.h.t.Helper()
	want := loader.ByTCX
	if !loader.HasTCX() {
		want = loader.ByClsact
	}
	eventually(p.h.t, "the pod is on "+want, func() error {
		by, err := p.by()
		if err == nil && by != want {
			err = errors.New("it is on " + by)
		}
		return err
	})
}

// settlers lists the process ids of this host's settlers.
func (h *host) settlers() []int {
	var pids []int
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		b, _ := os.ReadFile(f)
		if strings.Contains(string(b), "\x00settle\x00") && strings.Contains(string(b), h.state()+"\x00") {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestSettle: a pod moves to TCX by itself while it talks, and nothing is lost.
func TestSettle(t *testing.T) {
	if !loader.HasTCX() {
		t.Skip("no TCX here")
	}
	h := newHost(t)
	a, b := h.pod().add(), h.pod().add()
	if by, err := a.by(); err != nil || by != loader.ByClsact {
		t.Errorf("right after ADD: %s, %v", by, err)
	}
	out := run(t, a.ns, "ping", "-n", "-i", "0.002", "-c", "1500", "-W", "3", b.addr(false).String())
	if !strings.Contains(out, " 0% packet loss") {
		t.Error(out[strings.LastIndex(out, "---"):])
	}
	a.settled()
	b.settled()
	a.ping(b.addr(true))
	eventually(t, "the settler ends by itself", h.busy)

	// Whoever looks while they move sees them attached.
	var moving []*pod
	for range 8 {
		moving = append(moving, h.pod().add())
	}
	all := slices.Clone(moving)
	for end := time.Now().Add(time.Minute); len(moving) > 0; {
		moving = slices.DeleteFunc(moving, func(p *pod) bool {
			by, err := p.by()
			if err != nil {
				t.Errorf("while it settles: %v", err)
			}
			return by != loader.ByClsact
		})
		if time.Now().After(end) {
			t.Fatalf("%d do not settle", len(moving))
		}
	}
	for _, p := range all {
		p.del()
	}
	a.del()
	b.del()
	h.clean()
}

// TestSettleKilled: a settler that is killed leaves things working, and the next ADD's finishes.
func TestSettleKilled(t *testing.T) {
	h := newHost(t)
	a, b := h.pod().add(), h.pod().add()
	killed := 0
	eventually(t, "a settler can be killed", func() error {
		for _, pid := range h.settlers() {
			if unix.Kill(pid, unix.SIGKILL) == nil {
				killed++
			}
		}
		if killed == 0 {
			return errors.New("none seen")
		}
		return nil
	})
	eventually(t, "it is dead", func() error { // an ADD starts none beside one that holds the lock still
		if n := len(h.settlers()); n > 0 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
	a.ping(b.addr(false))
	c := h.pod().add()
	for _, p := range []*pod{a, b, c} {
		p.settled()
	}
	a.ping(c.addr(false))
	for _, p := range []*pod{a, b, c} {
		p.del()
	}
	h.clean()
}

// TestSettleOne: many ADDs start at most one settler that stays.
func TestSettleOne(t *testing.T) {
	h := newHost(t)
	var pods []*pod
	for range 10 {
		pods = append(pods, h.pod().add())
	}
	eventually(t, "one settler is left", func() error {
		if n := len(h.settlers()); n > 1 {
			return fmt.Errorf("%d run", n)
		}
		return nil
	})
	for _, p := range pods {
		p.del()
	}
	h.clean()
}

// TestSettleRemoved: a pod that a DEL has taken out of the maps, and not removed yet, is not put back into them, where no policy
// would judge it, because its MAC address is another now.
func TestSettleRemoved(t *testing.T) {
	h := newHost(t)
	p := h.pod().add()
	p.settled()
	eventually(t, "the settler ends", h.busy)
	m, err := caracal.Open(h.pins())
	must(t, err)
	defer m.Close()
	pods := func() (found []caracal.Pod) {
		all, err := m.Pods()
		must(t, err)
		for _, pod := range all {
			if slices.Contains(pod.Addresses, p.addr(false)) {
				found = append(found, pod)
			}
		}
		return found
	}
	if len(pods()) != 1 {
		t.Fatal("the pod is not in the maps")
	}
	must(t, commit.RemovePod(m, commit.Pod{IfIndex: int(pods()[0].IfIndex), Addrs: pods()[0].Addresses})) // as DEL begins
	run(t, p.ns, "ip", "link", "set", "eth0", "address", "02:00:00:00:00:99")
	other := h.pod().add() // starts a settler
	other.settled()
	eventually(t, "the settler ends", h.busy)
	if found := pods(); len(found) > 0 {
		t.Errorf("in the maps: %+v", found)
	}
	p.del()
	other.del()
	h.clean()
}

// TestVanished: a pod whose namespace goes without a DEL is collected when the next pod settles.
func TestVanished(t *testing.T) {
	h := newHost(t)
	gone := h.pod().add()
	must(t, netns.Delete(gone.ns))
	p := h.pod().add()
	eventually(t, "the vanished pod is collected", func() error { return h.othersOnly(p) })
	p.del()
	h.clean()
}

// TestBinaryReplaced: what runs beside the runtime works although the program was removed or replaced meanwhile.
func TestBinaryReplaced(t *testing.T) {
	h := newHost(t)
	content, err := os.ReadFile(h.bin)
	must(t, err)
	h.bin = filepath.Join(t.TempDir(), "calico")
	must(t, os.WriteFile(h.bin, content, 0o755))
	p := h.pod().add()
	must(t, os.Remove(h.bin))
	p.settled()
	must(t, os.WriteFile(h.bin, content, 0o755))
	p.del()
	h.clean()
}
