package bgp

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/bgp"
)

// in is what is inside a prefix.
func in(prefix string) bgp.Filter {
	p := netip.MustParsePrefix(prefix)
	return bgp.Filter{Prefix: p, Min: p.Bits(), Max: p.Addr().BitLen()}
}

func with(f bgp.Filter, change func(*bgp.Filter)) bgp.Filter {
	change(&f)
	return f
}

func accept(f *bgp.Filter) { f.Action = bgp.Accept }

// TestBIRDFilters changes the filters of a running session, step by step. Each takes effect both ways, on what was told
// before too, and the session never breaks.
func TestBIRDFilters(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	b := r[1].bird(fmt.Sprintf(`
protocol static more { ipv4;
	route 10.20.1.0/24 blackhole { bgp_community.add((65001, 5)); };
	route 10.20.2.0/24 blackhole { bgp_path.prepend(65100); };
	route 10.20.3.0/24 blackhole { bgp_large_community.add((65001, 1, 5)); };
}
protocol bgp v4 from ours { local 192.0.2.2 as %[1]d; neighbor 192.0.2.1 as %[2]d; direct;
	ipv4 { %[3]s }; ipv6 { %[3]s next hop address 2001:db8::2; }; }
`, theirAS, ourAS, exportMine))
	s := r[0].speak(ourAS)
	p := to(2, theirAS)
	s.setPeers(p)
	ours := append(prefixes("10.30.1.0/24", "10.30.2.0/25"), block4(1), block6(1))
	theirs := append(prefixes("10.20.1.0/24", "10.20.2.0/24", "10.20.3.0/24"), block4(2), block6(2))
	s.announce(ours...)

	// without waits until each side has all of the other's, but for some.
	without := func(what string, missing ...string) {
		t.Helper()
		gone := prefixes(missing...)
		eventually(t, what, func() bool {
			for _, x := range ours {
				if b.has(x) == slices.Contains(gone, x) {
					return false
				}
			}
			for _, x := range theirs {
				if s.has(x) == slices.Contains(gone, x) {
					return false
				}
			}
			return true
		})
	}
	without("all routes")
	since, line := s.peer(v4(2)).Since, b.must("show protocols v4")

	all4 := in("0.0.0.0/0")
	for _, step := range []struct {
		name           string
		imports        []bgp.Filter
		exports        []bgp.Filter
		missing        []string
		checkOf, words string // what BIRD says of a prefix
	}{
		{name: "a prefix", imports: []bgp.Filter{in("10.20.1.0/24")}, exports: []bgp.Filter{in("10.30.0.0/16")},
			missing: []string{"10.20.1.0/24", "10.30.1.0/24", "10.30.2.0/25"}},
		{name: "lengths", exports: []bgp.Filter{{Prefix: netip.MustParsePrefix("10.30.0.0/16"), Min: 25, Max: 25}}, missing: []string{"10.30.2.0/25"}},
		{name: "the first decides", exports: []bgp.Filter{with(in("10.30.1.0/24"), accept), all4}, missing: []string{block4(1).String(), "10.30.2.0/25"}},
		{name: "outside", imports: []bgp.Filter{with(in("10.20.0.0/16"), func(f *bgp.Filter) { f.Outside = true })}, missing: []string{block4(2).String()}},
		{name: "IPv6", imports: []bgp.Filter{in("::/0")}, exports: []bgp.Filter{in("2001:db8::/32")}, missing: []string{block6(1).String(), block6(2).String()}},
		{name: "a community", imports: []bgp.Filter{with(all4, func(f *bgp.Filter) { f.Communities = []string{"65001:5"} })}, missing: []string{"10.20.1.0/24"}},
		{name: "a large community", imports: []bgp.Filter{with(all4, func(f *bgp.Filter) { f.Communities = []string{"65001:1:5"} })}, missing: []string{"10.20.3.0/24"}},
		{name: "an AS path", imports: []bgp.Filter{with(all4, func(f *bgp.Filter) { f.ASPath = []uint32{theirAS, 65100}; f.Action = bgp.Accept }), all4},
			missing: []string{"10.20.1.0/24", "10.20.3.0/24", block4(2).String()}},
		{name: "the AS path of another AS", imports: []bgp.Filter{with(all4, func(f *bgp.Filter) { f.ASPath = []uint32{6451} })}},
		{name: "our own AS path", exports: []bgp.Filter{with(all4, func(f *bgp.Filter) { f.ASPath = []uint32{ourAS} })}},
		{name: "what peers told", exports: []bgp.Filter{with(all4, func(f *bgp.Filter) { f.FromPeers = true })}},
		{name: "to change what is announced",
			exports: []bgp.Filter{with(in("10.30.1.0/24"), func(f *bgp.Filter) {
				f.Action, f.AddCommunities, f.Prepend = bgp.Accept, []string{"65001:7", "65001:1:7"}, []uint32{ourAS, ourAS}
			})}, checkOf: "10.30.1.0/24", words: "BGP.as_path: 64512 64512 64512\n|(65001,7)|(65001, 1, 7)"},
		{name: "to change and go on",
			exports: []bgp.Filter{
				with(in("10.30.0.0/16"), func(f *bgp.Filter) { f.Action, f.AddCommunities = bgp.Continue, []string{"65001:8"} }),
				with(all4, func(f *bgp.Filter) {
					f.Communities, f.Prefix, f.Min = []string{"65001:8"}, netip.MustParsePrefix("10.30.2.0/25"), 25
				}),
			}, missing: []string{"10.30.2.0/25"}, checkOf: "10.30.1.0/24", words: "(65001,8)"},
		{name: "none", checkOf: "10.30.1.0/24", words: "BGP.as_path: 64512\n"},
	} {
		p.Import, p.Export = step.imports, step.exports
		s.setPeers(p)
		without(step.name, step.missing...)
		if step.words != "" {
			eventually(t, step.name, func() bool {
				return b.has(netip.MustParsePrefix(step.checkOf), strings.Split(step.words, "|")...)
			})
		}
	}

	p.Import = []bgp.Filter{with(in("10.20.1.0/24"), func(f *bgp.Filter) {
		f.Action, f.AddCommunities, f.Prepend = bgp.Accept, []string{"65001:9", "1:2:3"}, []uint32{65002, 65003}
	})}
	s.setPeers(p)
	changed := prefixes("10.20.1.0/24")[0]
	eventually(t, "what is learned to be changed", func() bool {
		got := s.route(changed)
		return fmt.Sprint(got.ASPath) == "[65002 65003 64513]" && slices.Equal(got.Communities, []string{"65001:5", "65001:9", "1:2:3"})
	})
	without("all routes")
	if got := s.peer(v4(2)).Since; got != since {
		t.Errorf("the session changed at %s and at %s", since, got)
	}
	if got := b.must("show protocols v4"); got != line {
		t.Errorf("BIRD says %s\n and then %s", line, got)
	}
	if s.alarmed(bgp.Refused) {
		t.Error("an alarm about what filters rejected")
	}
}
