package agent

import (
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/caracal-net/caracal/maps"
)

func dropped(from, to, reason string, at time.Time) maps.Event {
	return maps.Event{
		Kind: maps.EventDrop, Hook: "from_pod", Verdict: reason, Protocol: "tcp", Time: at,
		Source: netip.MustParseAddrPort(from), Destination: netip.MustParseAddrPort(to), RuleIngress: 7, Epoch: 3,
	}
}

// Packets dropped alike are one entry with a count and both times; the one not seen for longest gives way.
func TestJournal(t *testing.T) {
	j := newJournal(2)
	at := time.Now()
	const reason = "drop_policy_ingress"
	if !j.add(dropped("10.0.0.1:4000", "10.0.0.2:80", reason, at)) {
		t.Error("a denial that is new is not logged")
	}
	if j.add(dropped("10.0.0.1:4001", "10.0.0.2:80", reason, at.Add(2*time.Second))) {
		t.Error("a denial that goes on is logged again at once")
	}
	j.add(dropped("10.0.0.1:4002", "10.0.0.2:80", reason, at.Add(time.Second))) // another CPU's
	if j.add(dropped("10.0.0.1:4000", "10.0.0.2:80", "drop_spoof", at)) {
		t.Error("a drop for another reason than policy is logged")
	}
	first := func(f DropFilter) Drop {
		t.Helper()
		found := j.find(f)
		if len(found.Drops) != 1 {
			t.Fatalf("%d drops: %+v", len(found.Drops), found.Drops)
		}
		return found.Drops[0]
	}
	d := first(DropFilter{Reason: reason})
	if d.Count != 3 || !d.First.Equal(at) || !d.Last.Equal(at.Add(2*time.Second)) || d.SourcePort != 4002 || d.Epoch != 3 || d.Port != 80 {
		t.Errorf("%+v", d)
	}
	j.add(dropped("10.0.0.3:1", "10.0.0.4:2", reason, at))
	if all := j.find(DropFilter{}); all.Forgotten != 3 || len(all.Drops) != 2 || all.Drops[0].Destination != netip.MustParseAddr("10.0.0.4") {
		t.Errorf("%+v", all)
	}
	icmp := maps.Event{Kind: maps.EventDrop, Protocol: "icmp", Source: netip.MustParseAddrPort("10.0.0.5:77"), Destination: netip.MustParseAddrPort("10.0.0.6:77"), ICMPType: 8}
	j.add(icmp)
	icmp.Source, icmp.Destination = netip.MustParseAddrPort("10.0.0.5:78"), netip.MustParseAddrPort("10.0.0.6:78")
	j.add(icmp)
	if d := first(DropFilter{Protocol: "icmp"}); d.Count != 2 || d.ICMPType != 8 {
		t.Errorf("two echo requests are %+v", d)
	}
	j.add(maps.Event{Kind: maps.EventLog})
	if events, _ := j.counts(); events[maps.EventDrop] != 7 || events[maps.EventLog] != 1 {
		t.Errorf("%v", events)
	}
}

func TestDropFilter(t *testing.T) {
	d := Drop{Alike: Alike{
		Reason: "drop_policy_egress", Protocol: "udp", Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddr("10.0.1.2"),
		Port: 53, RuleEgress: 9,
	}, SourcePort: 4000}
	for query, want := range map[string]bool{
		"":                                 true,
		"end=10.0.0.0/24":                  true,
		"end=10.0.1.2":                     true,
		"end=10.0.2.0/24":                  false,
		"end=10.0.1.2&end=10.0.0.1":        true,
		"end=10.0.1.2&end=10.0.1.0/24":     false,
		"protocol=udp&port=53":             true,
		"protocol=tcp":                     false,
		"port=4000":                        true,
		"port=54":                          false,
		"rule=9&reason=drop_policy_egress": true,
		"rule=10":                          false,
		"reason=drop_spoof":                false,
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		f, err := parseDropFilter(q)
		if err != nil {
			t.Errorf("%s: %v", query, err)
		}
		if got := f.wants(d); got != want {
			t.Errorf("%s: %v, want %v", query, got, want)
		}
	}
	for _, query := range []string{"end=x", "end=10.0.0.0/33", "end=1.1.1.1&end=1.1.1.2&end=1.1.1.3", "port=65536", "rule=-1", "limit=a", "pord=1", "end=fe80::1%25eth0"} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := parseDropFilter(q); err == nil {
			t.Errorf("%s is taken as %+v", query, f)
		}
	}
}

// What is taken is written as it was, and nothing panics.
func FuzzDropFilter(f *testing.F) {
	f.Add("end=10.0.0.1&end=2001:db8::/64&protocol=tcp&port=80&reason=drop_spoof&rule=3&limit=10")
	f.Add("end=::ffff:10.0.0.1/97")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		first, err := parseDropFilter(q)
		if err != nil {
			return
		}
		second, err := parseDropFilter(first.Query())
		if err != nil || !reflect.DeepEqual(first, second) {
			t.Errorf("%q: %+v became %+v: %v", query, first, second, err)
		}
	})
}

func TestLimiter(t *testing.T) {
	l, now := limiter{rate: 2}, time.Unix(100, 0)
	var got []bool
	for range 4 {
		ok, _ := l.allow(now)
		got = append(got, ok)
	}
	if !slices.Equal(got, []bool{true, true, false, false}) {
		t.Error(got)
	}
	if ok, left := l.allow(now.Add(time.Second)); !ok || left != 2 {
		t.Error(ok, left)
	}
	if ok, left := l.allow(now.Add(time.Second)); !ok || left != 0 {
		t.Error(ok, left)
	}
}
