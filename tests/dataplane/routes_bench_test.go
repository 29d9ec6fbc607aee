package dataplane

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// BenchmarkFirstPacketRoutes runs from_pod on first packets of flows, with 100 routes to other hosts and with 100,000, in turns:
// to one block, or to any, when each lookup meets a part of the trie that no cache holds. It reports the program's own time by
// the kernel's statistics, and the ratio of their medians.
func BenchmarkFirstPacketRoutes(b *testing.B) {
	for name, choose := range map[string]func(n int) int{"one": func(n int) int { return n / 2 }, "any": rand.IntN} {
		b.Run(name, func(b *testing.B) { firstPackets(b, choose) })
	}
}

func firstPackets(b *testing.B, choose func(n int) int) {
	stats, err := ebpf.EnableStats(0 /* BPF_STATS_RUN_TIME */)
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	numbers := []int{100, 100_000}
	var nodes []*bench
	for _, n := range numbers {
		node := newBench(b, loader.Config{MaxFlows: loader.DefaultMaxFlows})
		var routes []maps.Route
		for i := range n {
			routes = append(routes, maps.Route{
				Prefix: netip.PrefixFrom(remoteBlock(i), 26), Kind: maps.RouteRemote, IfIndex: uint32(node.up), NextHop: netip.MustParseAddr("198.51.100.2"),
			})
		}
		if err := commit.SetRemote(node.maps, routes); err != nil {
			b.Fatal(err)
		}
		nodes = append(nodes, node)
	}
	const chunk = 500
	took := make([][]float64, len(nodes))
	for b.Loop() {
		for i, n := range nodes {
			p := n.programs["from_pod"]
			var frames [][]byte
			for range chunk {
				to := remoteBlock(choose(numbers[i])).As4()
				to[3] |= 1 + byte(rand.IntN(62))
				from := netip.AddrPortFrom(n.a.v4, uint16(1024+rand.IntN(60000)))
				frames = append(frames, udp(n.a, from, netip.AddrPortFrom(netip.AddrFrom4(to), uint16(1024+rand.IntN(60000))), 64))
			}
			before, err := p.Stats()
			if err != nil {
				b.Fatal(err)
			}
			n.do(func() error {
				for _, f := range frames {
					if _, err := n.exec("from_pod", f, skb{ifindex: uint32(n.a.commit.IfIndex)}); err != nil {
						return err
					}
				}
				return nil
			})
			after, err := p.Stats()
			if err != nil {
				b.Fatal(err)
			}
			took[i] = append(took[i], float64(after.Runtime-before.Runtime)/float64(after.RunCount-before.RunCount))
		}
	}
	median := func(x []float64) float64 { slices.Sort(x); return x[len(x)/2] }
	few, many := median(took[0]), median(took[1])
	b.ReportMetric(few, "ns/100")
	b.ReportMetric(many, "ns/100k")
	b.ReportMetric(many/few, "ratio")
}

// remoteBlock is the i-th /26 of 10.128.0.0/9.
func remoteBlock(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 128 | byte(i>>10), byte(i >> 2), byte(i << 6)})
}
