// Package netpol is the table of situations of NetworkPolicy that the project holds itself against: those of Kubernetes' end-to-end
// suite (k8s.io/kubernetes, test/e2e/network/netpol, v1.34) and some more. Its own test asks the model; tests/kubernetes asks a cluster.
package netpol

import (
	_ "embed"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

//go:embed situations.yaml
var situations string

// Namespaces, Pods and Nodes are what each situation begins with: each namespace has all pods, which NodeOf puts on nodes.
var (
	Namespaces = []string{"x", "y", "z"}
	Pods       = []string{"a", "b", "c"}
	Nodes      = []string{"n1", "n2"}
	Ports      = []string{"TCP/80", "TCP/81", "UDP/80", "UDP/81"}
	SCTPPorts  = []string{"SCTP/80", "SCTP/81"}
)

// Situation is a row of the table.
type Situation struct {
	Upstream string `json:"upstream"` // its name in Kubernetes' suite; "": it is not there
	Name     string `json:"name"`     // else
	API      string `json:"api"`      // that its objects need, if Kubernetes has not got it itself
	SCTP     bool   `json:"sctp"`     // it is about SCTP alone
	Steps    []Step `json:"steps"`
}

// Title is what the row is called.
func (s Situation) Title() string {
	if s.Upstream != "" {
		return s.Upstream
	}
	return s.Name
}

// Step changes something, and says what then reaches what.
type Step struct {
	Policies map[string]any            `json:"policies"` // specs of NetworkPolicies by namespace/name, to be applied
	Objects  []any                     `json:"objects"`  // others, to be applied
	Delete   []string                  `json:"delete"`   // NetworkPolicies, namespace/name
	Label    map[string]map[string]any `json:"label"`    // labels that a namespace or pod (namespace/name) gets; null: loses
	Want     []string                  `json:"want"`     // "allow|deny FROM[, ...] -> TO[, ...] [PROTOCOL/PORT ...]"; the last one decides
}

// Situations are the table, in its order, with the addresses of pods and nodes put in.
func Situations(addresses map[string]netip.Addr) ([]Situation, error) {
	var missing error
	text := regexp.MustCompile(`\$\{[^}]+\}`).ReplaceAllStringFunc(situations, func(word string) string {
		if !slices.Contains(Ends(), word[2:len(word)-1]) {
			missing = fmt.Errorf("%s is nobody", word)
		}
		return addresses[word[2:len(word)-1]].String()
	})
	if missing != nil {
		return nil, missing
	}
	var all []Situation
	err := yaml.UnmarshalStrict([]byte(text), &all)
	return all, err
}

// Manifest is what a step applies, as kubectl reads it; "": nothing.
func (s Step) Manifest() (string, error) {
	var docs []string
	add := func(object any) error {
		text, err := yaml.Marshal(object)
		docs = append(docs, string(text))
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(s.Policies)) {
		namespace, name, _ := strings.Cut(name, "/")
		err := add(map[string]any{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
			"metadata": map[string]any{"name": name, "namespace": namespace}, "spec": s.Policies[namespace+"/"+name]})
		if err != nil {
			return "", err
		}
	}
	for _, object := range s.Objects {
		if err := add(object); err != nil {
			return "", err
		}
	}
	return strings.Join(docs, "---\n"), nil
}

// AllPods are namespace/name of each.
func AllPods() []string {
	var all []string
	for _, ns := range Namespaces {
		for _, pod := range Pods {
			all = append(all, ns+"/"+pod)
		}
	}
	return all
}

// Ends are who sends: pods and nodes.
func Ends() []string { return append(AllPods(), Nodes...) }

// NodeOf is the node that a pod is on: by turns, so that each namespace is on both.
func NodeOf(pod string) string {
	return Nodes[slices.Index(AllPods(), pod)%len(Nodes)]
}

// PortName is what pods call a port: serve-80-tcp for TCP/80.
func PortName(port string) string {
	protocol, number, _ := strings.Cut(port, "/")
	return "serve-" + number + "-" + strings.ToLower(protocol)
}

// Probe is a connection that is tried.
type Probe struct{ From, To, Port string }

// String is FROM -> TO PROTOCOL/PORT.
func (p Probe) String() string { return p.From + " -> " + p.To + " " + p.Port }

// Matrix is what reaches what, of all probes with some ports.
type Matrix map[Probe]bool

// Wanted is what a step wants of probes with some ports. Whatever it says a pod reaches itself, and a node its own pods.
func (s Step) Wanted(ports []string) (Matrix, error) {
	m := make(Matrix)
	for _, from := range Ends() {
		for _, to := range AllPods() {
			for _, port := range ports {
				m[Probe{from, to, port}] = true
			}
		}
	}
	for _, line := range s.Want {
		if err := m.read(line); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
	}
	return m, nil
}

func (m Matrix) read(line string) error {
	action, rest, _ := strings.Cut(line, " ")
	from, to, ok := strings.Cut(rest, " -> ")
	if action != "allow" && action != "deny" || !ok {
		return fmt.Errorf("not allow|deny FROM -> TO")
	}
	var ports []string
	words := strings.Fields(to)
	for len(words) > 0 && strings.ContainsAny(words[len(words)-1], "0123456789") {
		ports = append(ports, words[len(words)-1])
		words = words[:len(words)-1]
	}
	to = strings.Join(words, " ")
	for _, port := range ports {
		if !slices.Contains(Ports, port) && !slices.Contains(SCTPPorts, port) {
			return fmt.Errorf("port %s is not tried", port)
		}
	}
	matched := 0
	for p := range m {
		if !matches(from, p.From) || !matches(to, p.To) {
			continue
		}
		matched++
		if p.From != p.To && p.From != NodeOf(p.To) && (ports == nil || slices.Contains(ports, p.Port)) {
			m[p] = action == "allow"
		}
	}
	if matched == 0 {
		return fmt.Errorf("nothing is between them")
	}
	return nil
}

// matches tells whether one of several patterns with commas between is an end; * alone is all.
func matches(patterns, end string) bool {
	return slices.ContainsFunc(strings.Split(patterns, ", "), func(p string) bool {
		ok, err := path.Match(p, end)
		return p == "*" || err == nil && ok
	})
}

// Compare lists what is otherwise than wanted.
func (m Matrix) Compare(want Matrix) []string {
	var wrong []string
	for p, is := range want {
		if got, tried := m[p]; !tried {
			wrong = append(wrong, p.String()+": not tried")
		} else if got != is {
			wrong = append(wrong, fmt.Sprintf("%s: reaches %t, want %t", p, got, is))
		}
	}
	slices.Sort(wrong)
	return wrong
}
