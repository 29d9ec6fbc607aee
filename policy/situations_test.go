package policy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	. "github.com/caracal-net/caracal/policy"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
)

// situation is a cluster, and what must come of packets in it. It is read from lines of words:
//
//	namespace NAME [LABEL=VALUE...]
//	serviceaccount NAMESPACE/NAME [LABEL=VALUE...]
//	pod NAMESPACE/NAME [LABEL=VALUE...] [sa=NAME] [profile=NAME] [ports=NAME:PROTOCOL/PORT,...] [address=ADDRESS]
//	FROM... -> TO... PACKET... allow|deny
//
// A pod without an address has one of each IP version. FROM and TO are pods, * for all of them, or addresses; each is tried
// with each, in every IP version that both have. A PACKET is TCP/80, UDP/53<1024 (from port 1024), ICMP/8, ICMP/8/0,
// ICMPv6/128 or PROTO/47; ICMP/8 over IPv6 is the echo request there, and other types are of the version that names them.
type situation struct {
	resources []api.Resource
	pods      []string
	addresses map[string][]netip.Addr // of pods
	probes    []probe
}

type probe struct {
	line     int
	from, to string
	packet   Packet
	want     Action
}

func readSituation(text string) (*situation, error) {
	s := &situation{addresses: make(map[string][]netip.Addr)}
	for i, line := range strings.Split(text, "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		var err error
		switch words[0] {
		case "namespace", "serviceaccount", "pod":
			err = s.declare(words)
		default:
			err = s.probe(i+1, words)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	return s, nil
}

func (s *situation) declare(words []string) error {
	if len(words) < 2 {
		return errors.New("no name")
	}
	labels := make(map[string]string)
	attributes := make(map[string]string)
	for _, word := range words[2:] {
		key, value, ok := strings.Cut(word, "=")
		if !ok {
			return fmt.Errorf("%q is no label", word)
		}
		if slices.Contains([]string{"sa", "profile", "ports", "address"}, key) {
			attributes[key] = value
		} else {
			labels[key] = value
		}
	}
	namespace, name, namespaced := strings.Cut(words[1], "/")
	if !namespaced {
		namespace, name = "", words[1]
	}
	metadata := map[string]any{"name": name, "namespace": namespace, "labels": labels}
	switch words[0] {
	case "namespace":
		return s.add("v1", "Namespace", metadata, map[string]any{})
	case "serviceaccount":
		return s.add("v1", "ServiceAccount", metadata, map[string]any{})
	}

	n := len(s.pods) + 1
	s.pods = append(s.pods, words[1])
	all := []netip.Addr{netip.AddrFrom4([4]byte{10, 65, 0, byte(n)}), netip.MustParseAddr(fmt.Sprintf("fd00:65::%x", n))}
	if text := attributes["address"]; text != "" {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return err
		}
		all = []netip.Addr{a}
	}
	s.addresses[words[1]] = all
	spec := map[string]any{"node": "node", "orchestrator": "k8s", "pod": name, "ipNetworks": all, "serviceAccountName": attributes["sa"]}
	if profile := attributes["profile"]; profile != "" {
		spec["profiles"] = []string{profile}
	}
	var ports []map[string]any
	for _, text := range strings.FieldsFunc(attributes["ports"], func(r rune) bool { return r == ',' }) {
		name, port, _ := strings.Cut(text, ":")
		protocol, number, _ := strings.Cut(port, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil {
			return err
		}
		ports = append(ports, map[string]any{"name": name, "protocol": protocol, "port": n})
	}
	spec["ports"] = ports
	return s.add(api.Group, "WorkloadEndpoint", metadata, spec)
}

func (s *situation) add(version, kind string, metadata, spec map[string]any) error {
	data, err := json.Marshal(map[string]any{"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec})
	if err != nil {
		return err
	}
	var r api.Resource
	if err := json.Unmarshal(data, &r); err != nil {
		return err
	}
	s.resources = append(s.resources, r)
	return nil
}

func (s *situation) probe(line int, words []string) error {
	var from, to []string
	var packets []string
	arrow := slices.Index(words, "->")
	if arrow < 1 {
		return errors.New("no ->")
	}
	want, ok := map[string]Action{"allow": Allow, "deny": Deny}[words[len(words)-1]]
	if !ok {
		return errors.New("neither allow nor deny")
	}
	protocols := map[string]uint8{"ICMP": icmp, "TCP": tcp, "UDP": udp, "ICMPv6": icmpv6, "SCTP": sctp, "PROTO": 0}
	for i, word := range words[:len(words)-1] {
		first, _, _ := strings.Cut(word, "/")
		if _, isPacket := protocols[first]; isPacket {
			packets = append(packets, word)
			continue
		}
		all := []string{word}
		switch _, known := s.addresses[word]; {
		case word == "->":
			continue
		case word == "*":
			all = s.pods
		case !known:
			if _, err := netip.ParseAddr(word); err != nil {
				return fmt.Errorf("%q is neither a pod nor an address", word)
			}
		}
		if i < arrow {
			from = append(from, all...)
		} else {
			to = append(to, all...)
		}
	}
	tried := 0
	for _, a := range from {
		for _, b := range to {
			for _, text := range packets {
				if a == b {
					continue
				}
				n, err := s.between(line, a, b, text, protocols, want)
				if err != nil {
					return err
				}
				if n == 0 {
					return fmt.Errorf("%s and %s have no IP version for %s", a, b, text)
				}
				tried += n
			}
		}
	}
	if tried == 0 {
		return errors.New("nothing is tried")
	}
	return nil
}

func (s *situation) at(name string) []netip.Addr {
	if all, ok := s.addresses[name]; ok {
		return all
	}
	return []netip.Addr{netip.MustParseAddr(name)}
}

// between adds probes with one packet, in every IP version, and tells how many.
func (s *situation) between(line int, from, to, text string, protocols map[string]uint8, want Action) (int, error) {
	text, sourcePort, _ := strings.Cut(text, "<")
	words := strings.Split(text, "/")
	var numbers [3]uint64
	for i, word := range append([]string{sourcePort}, words[1:]...) {
		if word == "" && i == 0 {
			word = "40000"
		}
		var err error
		if numbers[i], err = strconv.ParseUint(word, 10, 16); err != nil {
			return 0, err
		}
	}
	n := 0
	for _, a := range s.at(from) {
		for _, b := range s.at(to) {
			p := Packet{Protocol: protocols[words[0]], Source: a, Destination: b}
			switch p.Protocol {
			case tcp, udp, sctp:
				p.SourcePort, p.TargetPort = uint16(numbers[0]), uint16(numbers[1])
			case icmp, icmpv6:
				p.ICMPType, p.ICMPCode = uint8(numbers[1]), uint8(numbers[2])
				if p.Protocol == icmp && p.ICMPType == 8 && a.Is6() {
					p.Protocol, p.ICMPType = icmpv6, 128
				}
			default:
				p.Protocol = uint8(numbers[1])
			}
			if a.Is6() != b.Is6() || p.Protocol == icmp && a.Is6() || p.Protocol == icmpv6 && a.Is4() {
				continue
			}
			s.probes = append(s.probes, probe{line, from, to, p, want})
			n++
		}
	}
	return n, nil
}

// eachSituation runs a test with the model of every situation in testdata.
func eachSituation(t *testing.T, test func(*testing.T, *Model, *situation)) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) < 80 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			policies, err := manifest.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			text, err = os.ReadFile("testdata/" + name + ".probes")
			if err != nil {
				t.Fatal(err)
			}
			s, err := readSituation(string(text))
			if err != nil {
				t.Fatalf("%s.probes: %v", name, err)
			}
			m, err := FromResources(append(policies, s.resources...))
			if err != nil {
				t.Fatal(err)
			}
			test(t, m, s)
		})
	}
}

// TestSituations holds the conversion of what people write, and the evaluator, against situations from the documentation and
// the tests of Kubernetes, Calico and the network policy API.
func TestSituations(t *testing.T) {
	eachSituation(t, func(t *testing.T, m *Model, s *situation) {
		for _, p := range s.probes {
			f := m.Flow(p.packet)
			for name, v := range map[string]*Verdict{p.from: f.Egress, p.to: f.Ingress} {
				if _, pod := s.addresses[name]; pod != (v != nil) {
					t.Fatalf("line %d: %s is no endpoint", p.line, name)
				}
			}
			if f.Action() != p.want {
				t.Errorf("line %d: %s -> %s, %s: %s, want %s", p.line, p.from, p.to, p.packet, f.Action(), p.want)
				explain(t, m, p.packet, f)
			}
		}
	})
}

func explain(t *testing.T, m *Model, p Packet, f FlowVerdict) {
	for end, v := range map[string]*Verdict{"egress": f.Egress, "ingress": f.Ingress} {
		if v == nil {
			continue
		}
		t.Logf("    %s: %s by %s", end, v.Action, v.Rule)
		for _, l := range v.Trace {
			why := "matches"
			if len(l.Missed) > 0 {
				why = m.Miss(l.Rule, l.Missed[0], p)
			}
			t.Logf("        %s: %s: %s", l.Ref, l.Rule, why)
		}
	}
}
