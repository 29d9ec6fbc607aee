//go:build cluster

package nodes

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/tools/lab"
)

// TestFaults is what people and machines do wrong to nodes that are there.
func TestFaults(t *testing.T) {
	t.Setenv("CALICO_IPV4POOL_CIDR", "10.244.0.0/16")
	t.Setenv("CALICO_IPV6POOL_CIDR", "none")
	t.Setenv("CALICO_IPV4POOL_BLOCK_SIZE", "28")
	c := newCluster(t, "--quota-backend-bytes", "16777216")
	for _, h := range c.Hosts() {
		c.addNode(h.Name, h)
		c.startAgent(h)
	}
	for _, h := range c.Hosts() {
		c.ready(h)
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, *cluster)
	}{{"blocks", testBlocksEdited}, {"pool", testPoolDeleted}, {"etcd", testEtcd}, {"twins", testTwins}} {
		if !t.Run(test.name, func(t *testing.T) { test.run(t, &cluster{c.Server, c.Lab, t}) }) {
			return
		}
	}
}

// one is a pod of h1 that stays.
func (c *cluster) one() *lab.Pod {
	c.t.Helper()
	if p, err := c.Host(1).Pod("one"); err == nil {
		return p
	}
	return c.add(c.Host(1), "one")
}

// reaches waits until one pod has an answer of another.
func (c *cluster) reaches(from, to *lab.Pod) {
	c.t.Helper()
	eventually(c.t, from.Name+" reaches "+to.Name, func() error {
		_, err := from.Exec(c.t.Context(), "ping", "-c", "1", "-W", "1", to.Addr().String())
		return err
	})
}

// blockOf is the claimed block that an address is of.
func (c *cluster) blockOf(h *lab.Host, a netip.Addr) netip.Prefix {
	c.t.Helper()
	for _, b := range c.blocks(h.Name) {
		if in(b, a) {
			return netip.MustParsePrefix(b)
		}
	}
	c.t.Fatalf("%s has no block of %s", h.Name, a)
	return netip.Prefix{}
}

// logs waits until an agent has logged a line that says all of that.
func (c *cluster) logs(h *lab.Host, says ...string) {
	c.t.Helper()
	eventually(c.t, fmt.Sprintf("%s logs %q", h.Name, says), func() error {
		text, err := os.ReadFile(h.AgentLog())
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if !slices.ContainsFunc(says, func(s string) bool { return !strings.Contains(line, s) }) {
				return nil
			}
		}
		return fmt.Errorf("it does not: %s", text[max(0, len(text)-1000):])
	})
}

// Claims that people have edited: no address is given twice, no pod loses its own, and what can't be put right by the agents is said until somebody has.
func testBlocksEdited(t *testing.T, c *cluster) {
	h1, h2 := c.Host(1), c.Host(2)
	one, two := c.one(), c.add(h2, "two")
	c.reaches(one, two)
	block := c.blockOf(h1, one.Addr())
	object := "addressblock/" + api.BlockObject(block)
	edit := func(spec string) { c.kubectl("patch", object, "--type=merge", "-p", `{"spec": `+spec+`}`) }
	whole := func() { // the block is h1's alone, and one has its address
		t.Helper()
		eventually(t, "the claim is right again", func() error {
			if got := c.kubectl("get", object, "-o", "jsonpath={.spec.cidr} {.spec.pool} {.spec.node}"); got != block.String()+" 10.244.0.0/16 h1" {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
		c.ready(h1)
		c.ready(h2)
		if s := c.status(h2); slices.ContainsFunc(s.Blocks, block.Overlaps) {
			t.Errorf("h2 has %v", s.Blocks)
		}
		next := c.add(h1, "next")
		if next.Addr() == one.Addr() || !block.Contains(next.Addr()) {
			t.Errorf("the next pod has %s, the one before %s of %s", next.Addr(), one.Addr(), block)
		}
		must(t, h1.DelPod(t.Context(), "next"))
		c.deletePod("default", "next")
		c.reaches(two, one)
	}
	claim := func(cidr, pool, node string) string {
		return fmt.Sprintf(`{apiVersion: caracal.dev/v1, kind: AddressBlock, metadata: {name: %s}, spec: {cidr: %s, pool: %s, node: %s}}`,
			api.BlockObject(netip.MustParsePrefix(cidr)), cidr, pool, node)
	}
	gone := func(cidr string) {
		t.Helper()
		eventually(t, "the claim of "+cidr+" is released", func() error {
			if out := c.kubectl("get", "addressblocks", "-o", "name"); strings.Contains(out, api.BlockObject(netip.MustParsePrefix(cidr))) {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	}
	// What another node is said to have that does not want it.
	edit(`{"node": "h2"}`)
	c.logs(h2, "released", block.String())
	whole()
	wider := netip.PrefixFrom(block.Addr(), 27).Masked().String()
	c.Kubectl(claim(wider, "10.244.0.0/16", "h2"), "create", "-f", "-")
	gone(wider)
	c.Kubectl(claim("192.0.2.64/26", "192.0.2.0/24", "h2"), "create", "-f", "-")
	gone("192.0.2.64/26")
	whole()
	// What nobody can be asked about.
	edit(`{"node": "nobody"}`)
	c.problem(h1, "blocks", block.String(), "belongs to node nobody", "kubectl edit addressblock")
	other := c.add(h1, "other")
	if block.Contains(other.Addr()) {
		t.Errorf("a pod got %s of %s, which is nobody's", other.Addr(), block)
	}
	edit(`{"node": "h1"}`)
	whole()
	c.Kubectl(claim(wider, "10.244.0.0/16", "nobody"), "create", "-f", "-")
	c.problem(h1, "blocks", block.String(), "node nobody has claimed "+wider, "kubectl delete addressblock "+api.BlockObject(netip.MustParsePrefix(wider)))
	c.kubectl("delete", "addressblock", api.BlockObject(netip.MustParsePrefix(wider)))
	whole()
	// What can't be so.
	for _, spec := range []string{`{"cidr": "10.244.77.0/28"}`, `{"cidr": "x"}`, `{"pool": "192.0.2.0/24"}`, `{"node": ""}`} {
		edit(spec)
		whole()
	}
	c.kubectl("delete", object)
	whole()
	// One without pods says what is wrong, and nobody has it until that is mended.
	c.Kubectl(strings.Replace(claim("10.244.77.0/28", "10.244.0.0/16", "h1"), "cidr: 10", "cidr: 11", 1), "create", "-f", "-")
	c.problem(h1, "resources", "/blocks/10.244.77.0-28", "11.244.77.0/28")
	c.kubectl("delete", "addressblock", "10.244.77.0-28")
	whole()
	for h, name := range map[*lab.Host]string{h1: "other", h2: "two"} {
		must(t, h.DelPod(t.Context(), name))
		c.deletePod("default", name)
	}
}

// A pool that is deleted while pods have addresses of it: they keep them, and nobody gets more until it is there again.
func testPoolDeleted(t *testing.T, c *cluster) {
	h := c.Host(2)
	pool := `{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: other}, spec: {cidr: 10.99.0.0/16, blockSize: 28}}`
	c.Kubectl(pool, "create", "-f", "-")
	add := func(name string) (*lab.Pod, error) {
		return h.AddPod(t.Context(), name, lab.PodOptions{UID: c.pod(h, "default", name, ""),
			Capabilities: map[string]any{annotations: map[string]string{"cni.projectcalico.org/ipv4pools": `["other"]`}}})
	}
	eventually(t, "a block of the other pool", func() error {
		if s := c.status(h); len(s.Blocks) != 2 {
			return fmt.Errorf("%v", s.Blocks)
		}
		return nil
	})
	kept, err := add("kept")
	must(t, err)
	one := c.one()
	c.reaches(one, kept)
	block := c.blockOf(h, kept.Addr())
	c.kubectl("delete", "ippool", "other")
	eventually(t, "no pod gets an address of it", func() error {
		_, err := add("late")
		c.deletePod("default", "late")
		if err == nil {
			must(t, h.DelPod(t.Context(), "late"))
			return fmt.Errorf("one did")
		}
		if !strings.Contains(err.Error(), `"other"`) {
			t.Errorf("%v", err)
		}
		return nil
	})
	c.problem(h, "blocks", block.String(), "pool 10.99.0.0/16 is none of the cluster's")
	c.reaches(one, kept)
	c.Kubectl(pool, "create", "-f", "-")
	c.ready(h)
	late, err := add("late")
	must(t, err)
	if late.Addr() == kept.Addr() || !in("10.99.0.0/16", late.Addr()) {
		t.Errorf("%s, and before %s", late.Addr(), kept.Addr())
	}
	c.reaches(one, kept)
	for _, name := range []string{"kept", "late"} {
		must(t, h.DelPod(t.Context(), name))
		c.deletePod("default", name)
	}
	c.kubectl("delete", "ippool", "other")
}

// etcd that is killed, and that is full: pods come and go with the blocks that are there, and what can't be written is said.
func testEtcd(t *testing.T, c *cluster) {
	h := c.Host(2)
	one, holds := c.one(), c.add(h, "holds")
	comes := func(name string) { // and goes
		t.Helper()
		p, err := h.AddPod(t.Context(), name, lab.PodOptions{Capabilities: sent})
		must(t, err)
		c.reaches(one, p)
		must(t, h.DelPod(t.Context(), name))
	}
	c.StopEtcd()
	comes("etcd-away")
	c.Server.StartEtcd()
	eventually(t, "the API works again", func() error {
		_, err := c.TryKubectl("", "annotate", "node", "h2", "projectcalico.org/ASNumber=64512", "--overwrite")
		return err
	})
	eventually(t, "the agent hears of it, and writes", func() error {
		if got := c.kubectl("get", "caracalnode", "h2", "-o", "jsonpath={.spec.bgp.asNumber}"); got != "64512" {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	c.ready(h)
	comes("etcd-back")

	value := base64.StdEncoding.EncodeToString(make([]byte, 1<<20))
	key := func(i int) string { return base64.StdEncoding.EncodeToString(fmt.Append(nil, "/fill/", i)) }
	for i := 0; ; i++ {
		if out, err := c.TryEtcd("kv/put", fmt.Sprintf(`{"key": %q, "value": %q}`, key(i), value)); err != nil {
			if !strings.Contains(out, "database space exceeded") || i > 20 {
				t.Fatalf("etcd that is to be full: %v: %.300s", err, out)
			}
			break
		}
	}
	c.kubectl("delete", "addressblock", api.BlockObject(c.blockOf(h, holds.Addr())))
	c.problem(h, "blocks", "database space exceeded")
	comes("etcd-full")
	c.AskEtcd("kv/deleterange", fmt.Sprintf(`{"key": %q, "range_end": %q}`, base64.StdEncoding.EncodeToString([]byte("/fill/")), base64.StdEncoding.EncodeToString([]byte("/fill0"))))
	c.Compact()
	c.AskEtcd("maintenance/defragment", "{}")
	var alarms struct{ Alarms []struct{ MemberID string } }
	must(t, json.Unmarshal([]byte(c.AskEtcd("maintenance/alarm", `{"action": "GET"}`)), &alarms))
	for _, a := range alarms.Alarms {
		c.AskEtcd("maintenance/alarm", fmt.Sprintf(`{"action": "DEACTIVATE", "memberID": %q, "alarm": "NOSPACE"}`, a.MemberID))
	}
	c.ready(h)
	comes("etcd-space")
	must(t, h.DelPod(t.Context(), "holds"))
	c.deletePod("default", "holds")
}

// Two agents of one host, and two hosts of one name or address.
func testTwins(t *testing.T, c *cluster) {
	ctx, h1, h2 := t.Context(), c.Host(1), c.Host(2)
	one := c.one()
	p := c.add(h2, "stays")
	c.reaches(one, p)
	// One that has another state directory and socket than the one that runs.
	out, err := h2.Exec(ctx, "timeout", "10", "caracald", "--state-dir", filepath.Join(h2.Dir(), "twin"), "--socket", filepath.Join(h2.Dir(), "twin.sock"), "--health", "", "--metrics", "")
	if err == nil || !strings.Contains(fmt.Sprint(out, err), "another agent of this node runs") {
		t.Errorf("a second agent: %s%v", out, err)
	}
	c.reaches(one, p)
	c.ready(h2)
	// A resource that somebody has edited.
	instance := c.kubectl("get", "caracalnode", "h2", "-o", `jsonpath={.metadata.annotations.caracal\.dev/instance}`)
	c.kubectl("patch", "caracalnode", "h2", "--type=merge", "-p", `{"spec": {"bgp": {"ipv4Address": "192.0.2.250/24"}}}`)
	eventually(t, "the agent puts its address right", func() error {
		if got := c.kubectl("get", "caracalnode", "h2", "-o", "jsonpath={.spec.bgp.ipv4Address}"); got != h2.Addr().String()+"/24" {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	c.kubectl("delete", "caracalnode", "h2")
	eventually(t, "the agent registers again", func() error {
		if got := c.kubectl("get", "caracalnodes", "-o", `jsonpath={.items[*].metadata.annotations.caracal\.dev/instance}`); !strings.Contains(got, instance) {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	c.reaches(one, p) // whose sessions begin anew
	c.kubectl("annotate", "caracalnode", "h2", "caracal.dev/instance=other", "--overwrite")
	c.problem(h2, "node", "name h2", "another host has it", "instance other", "kubectl delete node h2")
	eventually(t, "no pod gets an address", func() error {
		p, err := h2.AddPod(ctx, "late", lab.PodOptions{Capabilities: sent})
		if err == nil {
			must(t, h2.DelPod(ctx, "late"))
			return fmt.Errorf("%s", p.Addr())
		}
		return nil
	})
	c.reaches(one, p)
	c.kubectl("annotate", "caracalnode", "h2", "caracal.dev/instance="+instance, "--overwrite")
	c.ready(h2)
	late := c.add(h2, "late")
	must(t, h2.DelPod(ctx, late.Name))
	c.deletePod("default", late.Name)

	// The host of a node is taken away, another one gets the name, and the first comes back.
	must(t, h2.Signal(ctx, "caracald", unix.SIGTERM))
	c.addNode("h3", h2)
	c.restartAgent(h1, "--node-name", "h3", "--ip", h2.Addr().String()+"/24", "--ip6", h2.Addr6().String()+"/64")
	c.problem(h1, "node", "address "+h2.Addr().String(), "another host has it", "node h2", "kubectl delete node h2")
	must(t, h1.Signal(ctx, "caracald", unix.SIGTERM))
	c.kubectl("delete", "node", "h1", "h2", "h3")
	c.kubectl("delete", "caracalnodes,addressblocks", "--all") // the collector's
	must(t, h1.DelPod(ctx, "one"))
	c.addNode("h2", h1)
	c.startAgent(h1, "--node-name", "h2")
	c.ready(h1)
	blocks := c.blocks("h2")
	c.startAgent(h2)
	c.problem(h2, "node", "name h2", "another host has it")
	if _, err := h2.AddPod(ctx, "twice", lab.PodOptions{Capabilities: sent}); err == nil || !strings.Contains(err.Error(), "no pool that this node may use now") {
		t.Errorf("on a host whose name is another's: %v", err)
	}
	if got := c.endpoints(h2); !slices.Equal(got, []string{"stays"}) {
		t.Errorf("the pods of the first host: %v", got)
	}
	if got := c.blocks("h2"); !slices.Equal(got, blocks) {
		t.Errorf("blocks %v became %v", blocks, got)
	}
	// Without its Node it is no node either.
	must(t, h1.Signal(ctx, "caracald", unix.SIGTERM))
	c.kubectl("delete", "node", "h2")
	c.kubectl("delete", "caracalnodes,addressblocks", "--all")
	c.restartAgent(h2)
	c.problem(h2, "node", "Kubernetes has no node of this name")
	if _, err := h2.AddPod(ctx, "twice", lab.PodOptions{Capabilities: sent}); err == nil {
		t.Error("a host that is no node gives out addresses")
	}
	// It gets the name back, and its pods have their addresses still.
	c.addNode("h2", h2)
	c.ready(h2)
	c.blockOf(h2, p.Addr()) // is its own again
	again := c.add(h2, "again")
	if again.Addr() == p.Addr() {
		t.Errorf("%s and %s have %s", again.Name, p.Name, p.Addr())
	}
	c.reaches(again, p)
}
