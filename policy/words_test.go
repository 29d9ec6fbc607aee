package policy_test

import (
	"fmt"
	"net/netip"
	"testing"

	. "github.com/caracal-net/caracal/policy"

	"github.com/caracal-net/caracal/api/selector"
)

func TestRuleInWords(t *testing.T) {
	all := &selector.Selector{}
	of := func(text string) Peer { return Peer{Selector: to(sel(t, text))} }
	for _, c := range []struct {
		rule Rule
		want string
	}{
		{Rule{Action: Allow}, "allow everything"},
		{Rule{Action: Deny, IPVersion: 6}, "deny IPv6"},
		{Rule{Action: Pass, Protocol: to[uint8](sctp), IPVersion: 4}, "pass SCTP over IPv4"},
		{Rule{Action: Log, NotProtocol: to[uint8](udp)}, "log everything except UDP"},
		{Rule{Action: Deny, Protocol: to[uint8](gre)}, "deny protocol 47"},
		{Rule{Action: Allow, Protocol: to[uint8](icmp), ICMP: &ICMP{Type: 8}}, "allow ICMP type 8"},
		{Rule{Action: Allow, Protocol: to[uint8](icmpv6), ICMP: &ICMP{Type: 128, Code: to[uint8](0)}}, "allow ICMPv6 type 128 code 0"},
		{Rule{Action: Allow, Protocol: to[uint8](icmp), NotICMP: &ICMP{Type: 8}}, "allow ICMP except type 8"},
		{Rule{Action: Allow, Protocol: to[uint8](tcp), Destination: Peer{Ports: []Ports{{First: 80, Last: 80}, {First: 8080, Last: 8090}}},
			Source: of(`role == "frontend" && projectcalico.org/namespace == 'web'`)},
			`allow TCP to port 80,8080-8090 from pods with role == "frontend" in namespace web`},
		{Rule{Action: Allow, Destination: Peer{Ports: []Ports{{Name: "web"}}, Selector: all}}, "allow everything to port web of any pod"},
		{Rule{Action: Deny, Source: Peer{Nets: nets("10.0.0.0/8", "fd00::/8"), NotNets: nets("10.1.0.0/16")}}, "deny everything from 10.0.0.0/8,fd00::/8 except 10.1.0.0/16"},
		{Rule{Action: Deny, Source: Peer{NotSelector: to(sel(t, "has(x)")), NotNets: nets("10.1.0.0/16"), NotPorts: []Ports{{First: 1, Last: 2}}}}, "deny everything from ports except 1-2 of anything except pods with has(x) and 10.1.0.0/16"},
		{Rule{Action: Deny, Source: Peer{Ports: []Ports{{First: 1, Last: 9}}, NotPorts: []Ports{{Name: "x"}}, Nets: nets("10.0.0.0/8"), Selector: all}}, "deny everything from port 1-9 except x of any pod in 10.0.0.0/8"},
		{Rule{Action: Allow, Source: of(`pcns.kubernetes.io/metadata.name == "a" && projectcalico.org/serviceaccount == "b" && projectcalico.org/orchestrator == "k8s"`)}, "allow everything from pods of service account b in namespace a"},
		{Rule{Action: Allow, Source: of(`has(projectcalico.org/orchestrator) && role == "web"`)}, `allow everything from pods with role == "web"`},
		{Rule{Action: Allow, Source: of(`has(projectcalico.org/orchestrator)`)}, "allow everything from any pod"},
		{Rule{Action: Allow, Source: of(`pcns.team == "red" && has(pcns.x) && pcsa.y in {"1", "2"} && has(pcsa.z) && app != "q"`)}, `allow everything from pods with app != "q" of service accounts with y in {"1", "2"} && has(z) in namespaces with team == "red" && has(x)`},
		{Rule{Action: Allow, Source: of(`pcns.team == "red" || role == "x"`)}, `allow everything from pods with (pcns.team == "red" || role == "x")`},
		{Rule{Action: Allow, Source: of(`(pcns.team == "red" || role == "x") && projectcalico.org/namespace == "n"`)}, `allow everything from pods with (pcns.team == "red" || role == "x") in namespace n`},
		{Rule{Action: Allow, Source: of(`a == " && " && b in {'(', ' || '}`)}, `allow everything from pods with a == " && " && b in {" || ", "("}`},
		{Rule{Action: Allow, Source: of(`projectcalico.org/namespace == "a" && pcns.projectcalico.org/name == "b"`)}, `allow everything from pods in namespace a in namespaces with projectcalico.org/name == "b"`},
	} {
		if got := c.rule.String(); got != c.want {
			t.Errorf("%s\nwant %s", got, c.want)
		}
	}
}

func TestRefInWords(t *testing.T) {
	for want, r := range map[string]RuleRef{
		"NetworkPolicy a/b, rule 2 (tier default)":     {Tier: "default", Policy: "NetworkPolicy a/b", Index: 2},
		"end of tier default, after NetworkPolicy a/b": {Tier: "default", Policy: "NetworkPolicy a/b", Index: NoRule},
		"Profile kns.a, rule 0":                        {Policy: "Profile kns.a"},
		"end of the profiles, after Profile kns.a":     {Policy: "Profile kns.a", Index: NoRule},
		"no policy": {Index: NoRule},
	} {
		if r.String() != want {
			t.Errorf("%s; want %s", r, want)
		}
	}
	if got := fmt.Sprint(Allow, Deny, Pass, Log, Action(9), " ", Ingress, Egress); got != "allow deny pass log action 9 ingress egress" {
		t.Error(got)
	}
}

func TestPacketInWords(t *testing.T) {
	echo := packet(icmpv6, func(p *Packet) {
		p.Source, p.Destination, p.ICMPType = netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::1"), 128
	})
	v6 := echo
	v6.Protocol, v6.SourcePort, v6.TargetPort = udp, 1, 2
	for want, p := range map[string]Packet{
		"TCP 10.0.0.2:40000 -> 10.0.0.1:8080":       packet(tcp, nil),
		"UDP [fd00::2]:1 -> [fd00::1]:2":            v6,
		"ICMPv6 type 128 code 0 fd00::2 -> fd00::1": echo,
		"protocol 47 10.0.0.2 -> 10.0.0.1":          packet(gre, nil),
	} {
		if p.String() != want {
			t.Errorf("%s; want %s", p, want)
		}
	}
}

// TestMiss asks Evaluate for the first condition that fails, and for its words.
func TestMiss(t *testing.T) {
	echo := packet(icmp, func(p *Packet) { p.ICMPType = 8 })
	stranger := packet(tcp, from("198.51.100.1"))
	for _, c := range []struct {
		rule   Rule
		packet Packet
		want   string
	}{
		{Rule{IPVersion: 6}, packet(tcp, nil), "it is IPv4, not IPv6"},
		{Rule{Protocol: to[uint8](tcp)}, packet(udp, nil), "it is UDP, not TCP"},
		{Rule{NotProtocol: to[uint8](tcp)}, packet(tcp, nil), "it is TCP"},
		{Rule{ICMP: &ICMP{Type: 0}}, echo, "it is type 8 code 0, not type 0"},
		{Rule{ICMP: &ICMP{Type: 0}}, packet(tcp, nil), "it is TCP, not ICMP type 0"},
		{Rule{NotICMP: &ICMP{Type: 8}}, echo, "it is type 8 code 0"},
		{Rule{Source: Peer{Selector: to(sel(t, `role == "frontend"`))}}, packet(tcp, nil), `source client (10.0.0.2) is none of pods with role == "frontend"`},
		{Rule{Source: Peer{Selector: &selector.Selector{}}}, stranger, "source 198.51.100.1 is no pod's and in no network set"},
		{Rule{Source: Peer{NotSelector: to(sel(t, `role == "client"`))}}, packet(tcp, nil), `source client (10.0.0.2) is one of pods with role == "client"`},
		{Rule{Destination: Peer{Nets: nets("10.1.0.0/16", "10.2.0.0/16")}}, packet(tcp, nil), "destination server (10.0.0.1) is not in 10.1.0.0/16,10.2.0.0/16"},
		{Rule{Source: Peer{NotNets: nets("198.51.100.0/24")}}, stranger, "source 198.51.100.1 is in 198.51.100.0/24"},
		{Rule{Destination: Peer{Ports: []Ports{{First: 80, Last: 80}}}}, packet(tcp, port(81)), "port is 81, not 80"},
		{Rule{Destination: Peer{Ports: []Ports{{Name: "web"}, {First: 1, Last: 9}}}}, packet(tcp, port(81)), "port is 81, not web (8080),1-9"},
		{Rule{Destination: Peer{Ports: []Ports{{Name: "dns"}}}}, packet(sctp, port(81)), "port is 81, not dns (no port there)"},
		{Rule{Destination: Peer{Ports: []Ports{{First: 80, Last: 80}}}}, echo, "ICMP has no ports"},
		{Rule{Source: Peer{Ports: []Ports{{First: 80, Last: 80}}}}, stranger, "source port is 40000, not 80"},
		{Rule{Destination: Peer{NotPorts: []Ports{{First: 80, Last: 90}}}}, packet(tcp, port(81)), "port is 81, one of 80-90"},
	} {
		m := neighbours()
		c.rule.Action = Allow
		m.Tiers = []Tier{{"default", []*Policy{{"p", selector.Selector{}, &Rules{[]Rule{c.rule}}, nil}}, Deny}}
		l, ok := m.Evaluate("server", Ingress, c.packet).Nearest()
		if !ok {
			t.Errorf("%s is not missed by %s", c.rule, c.packet)
			continue
		}
		if got := m.Miss(l.Rule, l.Missed[0], c.packet); got != c.want {
			t.Errorf("%s\nwant %s", got, c.want)
		}
	}
}
