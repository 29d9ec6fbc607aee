package dataplane

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// BenchmarkFirstPacketRoutes runs from_pod on first packets of flows, with 100 routes to other hosts and with 100,000: to one
// block, or to any, when each lookup meets a part of the trie that no cache holds.
func BenchmarkFirstPacketRoutes(b *testing.B) {
	for name, choose := range map[string]func(n int) int{"one": func(n int) int { return n / 2 }, "any": rand.IntN} {
		b.Run(name, func(b *testing.B) {
			firstPackets(b, []int{100, 100_000}, func(node *bench, n int) {
				var routes []maps.Route
				for i := range n {
					routes = append(routes, maps.Route{
						Prefix: netip.PrefixFrom(remoteBlock(i), 26), Kind: maps.RouteRemote, IfIndex: uint32(node.up), NextHop: netip.MustParseAddr("198.51.100.2"),
					})
				}
				if err := commit.SetRemote(node.maps, routes); err != nil {
					b.Fatal(err)
				}
			}, func(n int) netip.AddrPort {
				to := remoteBlock(choose(n)).As4()
				to[3] |= 1 + byte(rand.IntN(62))
				return netip.AddrPortFrom(netip.AddrFrom4(to), uint16(1024+rand.IntN(60000)))
			})
		})
	}
}

// BenchmarkFirstPacketPolicy does so with no policy at either end, with a policy about one identity, and with one about 100,000,
// each with a port of its own.
func BenchmarkFirstPacketPolicy(b *testing.B) {
	to := netip.MustParseAddr("10.65.2.1")
	port := func(identity int) uint16 { return uint16(1024 + identity%60000) }
	firstPackets(b, []int{0, 1, 100_000}, func(node *bench, n int) {
		remote := maps.Route{Prefix: netip.MustParsePrefix("10.65.2.0/26"), Kind: maps.RouteRemote, IfIndex: uint32(node.up), NextHop: netip.MustParseAddr("198.51.100.2")}
		if err := commit.SetRemote(node.maps, []maps.Route{remote}); err != nil {
			b.Fatal(err)
		}
		if n == 0 {
			return
		}
		var rows []maps.PolicyRow
		var peers []maps.Peer
		for i := 1; i <= n; i++ {
			who, of := uint32(i), netip.AddrFrom4([4]byte{10, 128 | byte(i>>16), byte(i >> 8), byte(i)})
			rows = append(rows, row(100, who, 0, 0, 0, deny, 2*who), row(100, who, 32, 17, port(i), allow, 2*who+1))
			peers = append(peers, maps.Peer{Prefix: netip.PrefixFrom(of, 32), Next: who})
		}
		node.rows(rows...)
		if err := node.maps.StagePeers(peers); err != nil {
			b.Fatal(err)
		}
		node.identify(uint32(n), to)
		node.policy(node.a, 100, 0)
	}, func(n int) netip.AddrPort {
		return netip.AddrPortFrom(to, port(n))
	})
}

// firstPackets runs from_pod on first packets of flows to an address, on a node for each number, in turns. It reports the
// program's own time, by the kernel's statistics: the median for each number, and its ratio to that of the first.
func firstPackets(b *testing.B, numbers []int, fill func(node *bench, n int), to func(n int) netip.AddrPort) {
	stats, err := ebpf.EnableStats(0 /* BPF_STATS_RUN_TIME */)
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	var nodes []*bench
	for _, n := range numbers {
		node := newBench(b, loader.Config{MaxFlows: loader.DefaultMaxFlows})
		fill(node, n)
		nodes = append(nodes, node)
	}
	const chunk = 500
	took := make([][]float64, len(nodes))
	for b.Loop() {
		for i, n := range nodes {
			p := n.programs["from_pod"]
			var frames [][]byte
			for range chunk {
				from := netip.AddrPortFrom(n.a.v4, uint16(1024+rand.IntN(60000)))
				frames = append(frames, udp(n.a, from, to(numbers[i]), 64))
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
	base := median(took[0])
	for i, n := range numbers {
		m := median(took[i])
		b.ReportMetric(m, fmt.Sprintf("ns/%d", n))
		if i > 0 {
			b.ReportMetric(m/base, fmt.Sprintf("ratio/%d", n))
		}
	}
}

// remoteBlock is the i-th /26 of 10.128.0.0/9.
func remoteBlock(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 128 | byte(i>>10), byte(i >> 2), byte(i << 6)})
}
