package loader

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/tc"
	"github.com/caracal-net/caracal/tests/bpffs"
)

// ensureIn makes the test binary call Ensure in the directory it names and exit.
const ensureIn = "CARACAL_TEST_ENSURE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(ensureIn); dir != "" {
		if err := Ensure(Config{Dir: dir, MaxFlows: 1024}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func ensured(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(bpffs.Mount(t), "node")
	if err := Ensure(Config{Dir: dir, MaxFlows: 1024, NodeID: "n1"}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func stateID(t testing.TB, dir string) ebpf.MapID {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(bpf.MapPath(dir, bpf.DataplaneMapCaracalState), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// entries lists what stands beside and in a node's directory. A kernel with BPF preload puts iterators there.
func entries(t testing.TB, dir string) []string {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		if !strings.HasSuffix(e.Name(), ".debug") {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestEnsureTwice(t *testing.T) {
	dir := ensured(t)
	id := stateID(t, dir)
	if err := Ensure(Config{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	if got := stateID(t, dir); got != id {
		t.Errorf("state is map %d, was %d", got, id)
	}
	if got := entries(t, filepath.Dir(dir)); !slices.Equal(got, []string{"node"}) {
		t.Errorf("in bpffs: %v", got)
	}
}

func TestEnsureRefuses(t *testing.T) {
	if err := Ensure(Config{Dir: filepath.Join(t.TempDir(), "node")}); !errors.Is(err, ErrNotBPFFS) {
		t.Errorf("outside a bpffs: %v", err)
	}
	root := bpffs.Mount(t)
	if err := Ensure(Config{Dir: filepath.Join(root, "node"), NodeID: strings.Repeat("x", 32)}); err == nil {
		t.Error("a node id of 32 bytes was taken")
	}
	if err := Ensure(Config{Dir: filepath.Join(root, "node"), Timeouts: Timeouts{UDP: -1}}); err == nil {
		t.Error("a negative timeout was taken")
	}
	if got := entries(t, root); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
	if err := Upgrade(Config{Dir: filepath.Join(root, "node")}); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("upgrade of nothing: %v", err)
	}
	if err := Attach(tc.Here(), filepath.Join(root, "node"), "lo", 1, Quick); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("attach of nothing: %v", err)
	}
	if err := Unload(filepath.Join(root, "node")); err != nil {
		t.Errorf("unload of nothing: %v", err)
	}
}

// Maps of another version: an error that says so, and nothing is changed.
func TestVersion(t *testing.T) {
	dir := ensured(t)
	m, err := ebpf.LoadPinnedMap(bpf.MapPath(dir, bpf.DataplaneMapCaracalState), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var state bpf.DataplaneState
	if err := m.Lookup(uint32(0), &state); err != nil {
		t.Fatal(err)
	}
	state.Version = 99
	if err := m.Put(uint32(0), &state); err != nil {
		t.Fatal(err)
	}
	before, err := programID(dir, bpf.DataplaneProgFromPod)
	if err != nil {
		t.Fatal(err)
	}
	for name, fn := range map[string]func(Config) error{"ensure": Ensure, "upgrade": Upgrade} {
		if err := fn(Config{Dir: dir}); !errors.Is(err, ErrVersion) {
			t.Errorf("%s: %v", name, err)
		}
	}
	after, err := programID(dir, bpf.DataplaneProgFromPod)
	if err != nil || after != before {
		t.Errorf("program %d (%v), was %d", after, err, before)
	}
	var got bpf.DataplaneState
	if err := m.Lookup(uint32(0), &got); err != nil || got != state {
		t.Errorf("state %+v (%v), want %+v", got, err, state)
	}
}

func ensureElsewhere(dir string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), ensureIn+"="+dir)
	return cmd
}

func TestEnsureAtOnce(t *testing.T) {
	root := bpffs.Mount(t)
	dir := filepath.Join(root, "node")
	errs := make(chan error)
	for range 8 {
		go func() {
			out, err := ensureElsewhere(dir).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			errs <- err
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if got := entries(t, root); !slices.Equal(got, []string{"node"}) {
		t.Errorf("in bpffs: %v", got)
	}
	for name := range bpf.Programs(&bpf.DataplaneObjects{}) {
		if _, err := programID(dir, name); err != nil {
			t.Error(err)
		}
	}
}

// Ensure killed at any moment leaves all or nothing, and the next one cleans up. A neighbour of a like name stays.
func TestEnsureKilled(t *testing.T) {
	root := bpffs.Mount(t)
	dir := filepath.Join(root, "node")
	neighbour := filepath.Join(root, "node-17")
	if err := os.Mkdir(neighbour, 0o700); err != nil {
		t.Fatal(err)
	}
	left, partial := 0, 0
	for i := range 16 {
		cmd := ensureElsewhere(dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Half of them as soon as something stands aside, the others wherever they are by then.
		deadline := time.Now().Add(time.Duration(i) * 15 * time.Millisecond)
		if i%2 == 0 {
			deadline = time.Now().Add(5 * time.Second)
		}
		for time.Now().Before(deadline) {
			if len(entries(t, root)) > 1 {
				break
			}
		}
		cmd.Process.Kill()
		cmd.Wait()
		for _, name := range entries(t, root) {
			if strings.Contains(name, "~") {
				left++
			}
		}
		switch err := checkPinned(dir); {
		case err == nil:
			if err := Unload(dir); err != nil {
				t.Fatal(err)
			}
		case errors.Is(err, ErrNotLoaded):
			if _, err := os.Stat(dir); err == nil {
				partial++
			}
		default:
			t.Fatal(err)
		}
	}
	if partial > 0 {
		t.Errorf("%d half sets", partial)
	}
	t.Logf("%d were killed with something aside", left)
	// One more for sure.
	if err := os.MkdirAll(filepath.Join(bpf.AsidePath(dir, 1), "programs"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Ensure(Config{Dir: dir, MaxFlows: 1024}); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, root); !slices.Equal(got, []string{"node", "node-17"}) {
		t.Errorf("in bpffs: %v", got)
	}
}

// bpftool shows every map's keys and values by the names of their fields.
func TestReadableMaps(t *testing.T) {
	dir := ensured(t)
	bpftool, err := exec.LookPath("bpftool")
	if err != nil {
		t.Skip("no bpftool")
	}
	fill := map[string]struct{ key, value any }{
		bpf.DataplaneMapCaracalPods:    {uint32(1), &bpf.DataplanePod{}},
		bpf.DataplaneMapCaracalRoutes:  {&bpf.DataplanePrefix{Prefixlen: 128}, &bpf.DataplaneRoute{}},
		bpf.DataplaneMapCaracalPeers:   {&bpf.DataplanePrefix{Prefixlen: 128}, &bpf.DataplanePeer{}},
		bpf.DataplaneMapCaracalPolicy:  {&bpf.DataplanePolicyKey{Prefixlen: 96}, &bpf.DataplanePolicyRow{}},
		bpf.DataplaneMapCaracalRules:   {uint32(1), make([]bpf.DataplaneCount, ebpf.MustPossibleCPU())},
		bpf.DataplaneMapCaracalFlows:   {&bpf.DataplaneFlowKey{}, &bpf.DataplaneFlow{}},
		bpf.DataplaneMapCaracalOpens:   {&bpf.DataplaneFlowKey{}, &bpf.DataplaneFlow{}},
		bpf.DataplaneMapCaracalFrags:   {&bpf.DataplaneFragmentKey{}, &bpf.DataplaneFragment{}},
		bpf.DataplaneMapCaracalQuota:   {uint32(1), &bpf.DataplaneQuota{}},
		bpf.DataplaneMapCaracalNat:     {&bpf.DataplaneFlowKey{}, &bpf.DataplaneNat{}},
		bpf.DataplaneMapCaracalNatopen: {&bpf.DataplaneFlowKey{}, &bpf.DataplaneNat{}},
		bpf.DataplaneMapCaracalUplinks: {uint32(1), &bpf.DataplaneUplink{}},
		bpf.DataplaneMapCaracalService: {&bpf.DataplaneServiceKey{}, &bpf.DataplaneService{}},
	}
	want := map[string][]string{
		bpf.DataplaneMapCaracalPods:    {"slot", "addresses", "policy_egress", "mac"},
		bpf.DataplaneMapCaracalRoutes:  {"prefixlen", "address", "kind", "ROUTE_NONE", "next_hop"},
		bpf.DataplaneMapCaracalFlows:   {"address_a", "protocol", "opener", "FLOW_NEW", "leg", "epoch", "ifindex_in", "bound"},
		bpf.DataplaneMapCaracalPeers:   {"prefixlen", "address", "identity"},
		bpf.DataplaneMapCaracalPolicy:  {"policy", "identity", "protocol", "port", "action", "POLICY_NONE", "rule"},
		bpf.DataplaneMapCaracalRules:   {"packets", "bytes"},
		bpf.DataplaneMapCaracalTold:    {"since", "events", "lost"},
		bpf.DataplaneMapCaracalChurn:   {"opened", "left", "confirmed", "reclaimed", "swept"},
		bpf.DataplaneMapCaracalOpens:   {"address_a", "state", "leg"},
		bpf.DataplaneMapCaracalFrags:   {"source", "id", "ifindex", "source_port"},
		bpf.DataplaneMapCaracalQuota:   {"flows", "limit"},
		bpf.DataplaneMapCaracalSlots:   {"address_a", "port_b"},
		bpf.DataplaneMapCaracalNat:     {"address_a", "port_b", "address", "port", "side"},
		bpf.DataplaneMapCaracalNatopen: {"address_a", "port_b", "address", "port", "side"},
		bpf.DataplaneMapCaracalUplinks: {"address_v4", "address_v6"},
		bpf.DataplaneMapCaracalService: {"address", "port", "protocol", "name"},
		bpf.DataplaneMapCaracalWork:    {"host", "pod", "inner", "answer", "held", "gone", "taken", "flow"},
		bpf.DataplaneMapCaracalCounts:  {"packets", "bytes"},
		bpf.DataplaneMapCaracalState:   {"epoch", "version", "max_flows", "node"},
	}
	for name := range bpf.Maps(&bpf.DataplaneObjects{}) {
		if name == bpf.DataplaneMapCaracalEvents {
			continue // a ring buffer has no keys and values
		}
		path := bpf.MapPath(dir, name)
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if f, ok := fill[name]; ok {
			if err := m.Put(f.key, f.value); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		if id, ok := info.BTFID(); !ok || id == 0 {
			t.Errorf("%s has no BTF", name)
		}
		if len(info.Name) > 15 || info.Name != name {
			t.Errorf("kernel name of %s is %s", name, info.Name)
		}
		m.Close()
		out, err := exec.Command(bpftool, "-j", "map", "dump", "pinned", path).Output()
		if err != nil {
			t.Fatalf("dump %s: %v", name, err)
		}
		var dump []struct {
			Formatted map[string]any `json:"formatted"`
		}
		if err := json.Unmarshal(out, &dump); err != nil || len(dump) == 0 || dump[0].Formatted == nil {
			t.Errorf("dump of %s is not formatted (%v): %.200s", name, err, out)
			continue
		}
		text, err := json.Marshal(dump[0].Formatted)
		if err != nil {
			t.Fatal(err)
		}
		if want[name] == nil {
			t.Errorf("%s is not in this test", name)
		}
		for _, w := range want[name] {
			if !strings.Contains(string(text), w) {
				t.Errorf("dump of %s lacks %s: %.300s", name, w, text)
			}
		}
	}
}

func TestProbe(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := Probe(); err != nil {
		t.Error(err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	if want := major > 6 || major == 6 && minor >= 6; HasTCX() != want {
		t.Errorf("Linux %d.%d has TCX: %t, want %t", major, minor, HasTCX(), want)
	}
	old := needs
	t.Cleanup(func() { needs = old })
	needs = slices.Clone(old)
	needs[0].probe = func() error { return ebpf.ErrNotSupported }
	if err := Probe(); !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), needs[0].since) {
		t.Errorf("without %s: %v", needs[0].what, err)
	}
}

// host is a namespace with veths in it.
type host struct {
	t  testing.TB
	ns *netns.NS
}

func newHost(t testing.TB, name string) *host {
	t.Helper()
	name = fmt.Sprintf("cld-%d-%s", os.Getpid(), name)
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Delete(name); err != nil {
			t.Error(err)
		}
	})
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return &host{t: t, ns: ns}
}

func (h *host) do(fn func() error) {
	h.t.Helper()
	if err := h.ns.Do(fn); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) veth(name string) int {
	h.t.Helper()
	index := 0
	h.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "p" + name}); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		index = l.Attrs().Index
		return nil
	})
	return index
}

func (h *host) remove(index int) {
	h.t.Helper()
	h.do(func() error {
		l, err := netlink.LinkByIndex(index)
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
}

// wantAttached fails unless both programs are on the interface in this way; "" for not at all.
func (h *host) wantAttached(dir, name string, index int, want string) {
	h.t.Helper()
	h.do(func() error {
		how, err := Attached(dir, name, index)
		if (want == "") != (err != nil) || how != want {
			h.t.Errorf("%s is attached by %q (%v), want %q", name, how, err, want)
		}
		return nil
	})
}

// needTCX skips the test on a kernel that has no TCX.
func needTCX(t *testing.T) {
	t.Helper()
	if !HasTCX() {
		t.Skip("no TCX here, which Linux 6.6 brought")
	}
}

func TestAttach(t *testing.T) {
	needTCX(t)
	dir := ensured(t)
	h := newHost(t, "a")
	quick, direct := h.veth("q.1"), h.veth("d")
	h.wantAttached(dir, "q.1", quick, "")
	for range 2 {
		h.do(func() error { return Attach(tc.Here(), dir, "q.1", quick, Quick) })
		h.wantAttached(dir, "q.1", quick, ByClsact)
	}
	h.do(func() error { return Attach(tc.Here(), dir, "d", direct, TCX) })
	h.wantAttached(dir, "d", direct, ByTCX)
	for range 2 {
		h.do(func() error { return Settle(dir, "q.1", quick) })
		h.wantAttached(dir, "q.1", quick, ByTCX)
	}
	h.do(func() error {
		if id, err := tc.Here().Attached(quick, tc.Ingress); id != 0 || err != nil {
			t.Errorf("filter of program %d stayed (%v)", id, err)
		}
		return Attach(tc.Here(), dir, "q.1", quick, Quick) // is on TCX and stays there
	})
	h.wantAttached(dir, "q.1", quick, ByTCX)
	if got, err := Links(dir); err != nil || !slices.Equal(got, []string{"d", "q.1"}) {
		t.Errorf("links %v (%v)", got, err)
	}

	// Attached quickly, then by TCX without Settle.
	moved := h.veth("m")
	h.do(func() error {
		if err := Attach(tc.Here(), dir, "m", moved, Quick); err != nil {
			return err
		}
		return Attach(tc.Here(), dir, "m", moved, TCX)
	})
	h.wantAttached(dir, "m", moved, ByTCX)
	h.do(func() error {
		id, err := tc.Here().Attached(moved, tc.Egress)
		if id != 0 {
			t.Errorf("filter of program %d stayed", id)
		}
		return err
	})

	// The interface goes, its pins stay behind defunct; another of the same name comes.
	h.remove(direct)
	h.wantAttached(dir, "d", direct, "")
	again := h.veth("d")
	h.do(func() error { return Attach(tc.Here(), dir, "d", again, TCX) })
	h.wantAttached(dir, "d", again, ByTCX)
	h.remove(again)
	third := h.veth("d")
	h.do(func() error { return Attach(tc.Here(), dir, "d", third, Quick) })
	h.wantAttached(dir, "d", third, ByClsact)
	h.do(func() error { return Settle(dir, "d", third) })
	h.wantAttached(dir, "d", third, ByTCX)
	for range 2 {
		if err := Detach(dir, "d"); err != nil {
			t.Fatal(err)
		}
	}
	h.wantAttached(dir, "d", third, "")
	h.do(func() error {
		if err := Settle(dir, "gone", 4242); err == nil {
			t.Error("an interface that does not exist was settled")
		}
		return nil
	})
	if err := Detach(dir, "gone"); err != nil {
		t.Error(err)
	}
}

// A kernel without TCX is served by clsact throughout.
func TestWithoutTCX(t *testing.T) {
	without(t)
	dir := ensured(t)
	h := newHost(t, "c")
	index := h.veth("v")
	h.do(func() error { return Attach(tc.Here(), dir, "v", index, TCX) })
	h.wantAttached(dir, "v", index, ByClsact)
	h.do(func() error { return Settle(dir, "v", index) })
	h.wantAttached(dir, "v", index, ByClsact)
	if got, err := Links(dir); err != nil || len(got) != 0 {
		t.Errorf("links %v (%v)", got, err)
	}
	// Upgrade and unload find it by caracal_pods.
	pods, err := ebpf.LoadPinnedMap(bpf.MapPath(dir, bpf.DataplaneMapCaracalPods), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pods.Close()
	if err := pods.Put(uint32(index), &bpf.DataplanePod{}); err != nil {
		t.Fatal(err)
	}
	h.do(func() error { return Upgrade(Config{Dir: dir, Timeouts: Timeouts{UDP: time.Minute}}) })
	h.wantAttached(dir, "v", index, ByClsact)
	h.do(func() error { return Unload(dir) })
	h.do(func() error {
		id, err := tc.Here().Attached(index, tc.Ingress)
		if id != 0 {
			t.Errorf("filter of program %d stayed", id)
		}
		return err
	})
}

// A namespace that goes takes its interfaces along; the pins that stay are no hindrance to anything.
func TestNamespaceGone(t *testing.T) {
	needTCX(t)
	dir := ensured(t)
	t.Run("first life", func(t *testing.T) {
		h := newHost(t, "gone")
		index := h.veth("v")
		h.do(func() error { return Attach(tc.Here(), dir, "v", index, TCX) })
	})
	if err := Upgrade(Config{Dir: dir}); err != nil {
		t.Error(err)
	}
	h := newHost(t, "new")
	index := h.veth("v")
	h.do(func() error { return Attach(tc.Here(), dir, "v", index, TCX) })
	h.wantAttached(dir, "v", index, ByTCX)
}

// After Unload the kernel has no map, program or link of this node.
func TestUnload(t *testing.T) {
	dir := ensured(t)
	h := newHost(t, "u")
	tcx, quick := h.veth("t"), h.veth("q")
	var programs []ebpf.ProgramID
	for _, hook := range hooks {
		id, err := programID(dir, hook.program)
		if err != nil {
			t.Fatal(err)
		}
		programs = append(programs, id)
	}
	state := stateID(t, dir)
	func() {
		pods, err := ebpf.LoadPinnedMap(bpf.MapPath(dir, bpf.DataplaneMapCaracalPods), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer pods.Close()
		for _, i := range []int{tcx, quick} {
			if err := pods.Put(uint32(i), &bpf.DataplanePod{}); err != nil {
				t.Fatal(err)
			}
		}
	}()
	h.do(func() error {
		if err := Attach(tc.Here(), dir, "t", tcx, TCX); err != nil {
			return err
		}
		if err := Attach(tc.Here(), dir, "q", quick, Quick); err != nil {
			return err
		}
		return Unload(dir)
	})
	if got := entries(t, filepath.Dir(dir)); len(got) != 0 {
		t.Errorf("left in bpffs: %v", got)
	}
	gone := func() error { // the kernel frees them a moment later
		for _, id := range programs {
			if p, err := ebpf.NewProgramFromID(id); !errors.Is(err, os.ErrNotExist) {
				p.Close()
				return fmt.Errorf("program %d lives on (%v)", id, err)
			}
		}
		if m, err := ebpf.NewMapFromID(state); !errors.Is(err, os.ErrNotExist) {
			m.Close()
			return fmt.Errorf("map %d lives on (%v)", state, err)
		}
		return nil
	}
	var err error
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = gone(); err == nil {
			return
		}
	}
	t.Error(err)
}
