package policytest

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

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/policy"
)

// Situation is a cluster, and what must come of packets in it. Its policies are YAML; the rest is read from lines of words:
//
//	namespace NAME [LABEL=VALUE...]
//	serviceaccount NAMESPACE/NAME [LABEL=VALUE...]
//	pod NAMESPACE/NAME [LABEL=VALUE...] [sa=NAME] [profile=NAME] [ports=NAME:PROTOCOL/PORT,...] [address=ADDRESS]
//	FROM... -> TO... PACKET... allow|deny
//
// A pod without an address has one of each IP version. FROM and TO are pods, * for all of them, or addresses; each is tried
// with each, in every IP version that both have. A PACKET is TCP/80, UDP/53<1024 (from port 1024), ICMP/8, ICMP/8/0,
// ICMPv6/128 or PROTO/47; ICMP/8 over IPv6 is the echo request there, and other types are of the version that names them.
type Situation struct {
	Name      string
	Model     *policy.Model
	Addresses map[string][]netip.Addr // of pods
	Probes    []Probe

	resources []api.Resource
	pods      []string
}

// Probe is a packet, and what befalls it.
type Probe struct {
	Line     int
	From, To string // pods, or addresses
	Packet   policy.Packet
	Want     policy.Action // Allow or Deny
}

// Situations reads all of a directory: NAME.yaml and NAME.probes each.
func Situations(t testing.TB, dir string) []*Situation {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no situations in %s: %v", dir, err)
	}
	var all []*Situation
	for _, file := range files {
		s, err := loadSituation(strings.TrimSuffix(file, ".yaml"))
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		all = append(all, s)
	}
	return all
}

func loadSituation(path string) (*Situation, error) {
	text, err := os.ReadFile(path + ".yaml")
	if err != nil {
		return nil, err
	}
	policies, err := manifest.Parse(text)
	if err != nil {
		return nil, err
	}
	if text, err = os.ReadFile(path + ".probes"); err != nil {
		return nil, err
	}
	s, err := readSituation(string(text))
	if err != nil {
		return nil, fmt.Errorf("%s.probes: %w", path, err)
	}
	s.Name = filepath.Base(path)
	s.Model, err = policy.FromResources(append(policies, s.resources...))
	return s, err
}

func readSituation(text string) (*Situation, error) {
	s := &Situation{Addresses: make(map[string][]netip.Addr)}
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

func (s *Situation) declare(words []string) error {
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
	s.Addresses[words[1]] = all
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

func (s *Situation) add(version, kind string, metadata, spec map[string]any) error {
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

func (s *Situation) probe(line int, words []string) error {
	var from, to []string
	var packets []string
	arrow := slices.Index(words, "->")
	if arrow < 1 {
		return errors.New("no ->")
	}
	want, ok := map[string]policy.Action{"allow": policy.Allow, "deny": policy.Deny}[words[len(words)-1]]
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
		switch _, known := s.Addresses[word]; {
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

func (s *Situation) at(name string) []netip.Addr {
	if all, ok := s.Addresses[name]; ok {
		return all
	}
	return []netip.Addr{netip.MustParseAddr(name)}
}

// between adds probes with one packet, in every IP version, and tells how many.
func (s *Situation) between(line int, from, to, text string, protocols map[string]uint8, want policy.Action) (int, error) {
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
			p := policy.Packet{Protocol: protocols[words[0]], Source: a, Destination: b}
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
			s.Probes = append(s.Probes, Probe{line, from, to, p, want})
			n++
		}
	}
	return n, nil
}
