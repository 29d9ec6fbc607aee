package policy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/caracal-net/caracal/api/selector"
)

var protocolWords = map[uint8]string{
	protocolICMP: "ICMP", protocolTCP: "TCP", protocolUDP: "UDP", protocolICMPv6: "ICMPv6", protocolSCTP: "SCTP", 136: "UDPLite",
}

func protocolWord(p uint8) string {
	if word, ok := protocolWords[p]; ok {
		return word
	}
	return "protocol " + strconv.Itoa(int(p))
}

// String is the action as rules name it.
func (a Action) String() string {
	switch a {
	case Allow:
		return "allow"
	case Deny:
		return "deny"
	case Pass:
		return "pass"
	case Log:
		return "log"
	}
	return fmt.Sprintf("action %d", uint8(a))
}

// String is the direction's name.
func (d Direction) String() string {
	if d == Ingress {
		return "ingress"
	}
	return "egress"
}

// String says where the rule stands, or what ended there.
func (r RuleRef) String() string {
	switch {
	case r.Policy == "":
		return "no policy"
	case r.Index == NoRule && r.Tier == "":
		return "end of the profiles, after " + r.Policy
	case r.Index == NoRule:
		return fmt.Sprintf("end of tier %s, after %s", r.Tier, r.Policy)
	case r.Tier == "":
		return fmt.Sprintf("%s, rule %d", r.Policy, r.Index)
	}
	return fmt.Sprintf("%s, rule %d (tier %s)", r.Policy, r.Index, r.Tier)
}

// String is the port or range as rules write it, or its name.
func (p Ports) String() string {
	switch {
	case p.Name != "":
		return p.Name
	case p.First == p.Last:
		return strconv.Itoa(int(p.First))
	}
	return fmt.Sprintf("%d-%d", p.First, p.Last)
}

// String is the condition on ICMP.
func (i ICMP) String() string {
	if i.Code == nil {
		return fmt.Sprintf("type %d", i.Type)
	}
	return fmt.Sprintf("type %d code %d", i.Type, *i.Code)
}

// String says the rule in words: `allow TCP to port 80,8080-8090 from pods with role == "frontend" in namespace web`. What is
// said of pods holds for network sets with such labels too.
func (r Rule) String() string {
	var b strings.Builder
	b.WriteString(r.Action.String() + " ")
	switch {
	case r.Protocol != nil:
		b.WriteString(protocolWord(*r.Protocol))
	case r.IPVersion == 0:
		b.WriteString("everything")
	}
	if r.ICMP != nil {
		b.WriteString(" " + r.ICMP.String())
	}
	if r.IPVersion != 0 {
		if r.Protocol != nil {
			b.WriteString(" over ")
		}
		fmt.Fprintf(&b, "IPv%d", r.IPVersion)
	}
	var but []string
	if r.NotProtocol != nil {
		but = append(but, protocolWord(*r.NotProtocol))
	}
	if r.NotICMP != nil {
		but = append(but, r.NotICMP.String())
	}
	if len(but) > 0 {
		b.WriteString(" except " + strings.Join(but, " and "))
	}
	b.WriteString(r.Destination.words(" to "))
	b.WriteString(r.Source.words(" from "))
	return b.String()
}

// words are what the peer asks of its end, after a preposition; "" if nothing.
func (p Peer) words(preposition string) string {
	text := ""
	if p.Ports != nil {
		text = "port " + list(p.Ports)
	}
	if p.NotPorts != nil {
		if text == "" {
			text = "ports"
		}
		text += " except " + list(p.NotPorts)
	}
	who := ""
	if p.Selector != nil {
		who = pods(*p.Selector)
	}
	if p.Nets != nil {
		if who != "" {
			who += " in "
		}
		who += list(p.Nets)
	}
	var but []string
	if p.NotSelector != nil {
		but = append(but, pods(*p.NotSelector))
	}
	if p.NotNets != nil {
		but = append(but, list(p.NotNets))
	}
	if len(but) > 0 {
		if who == "" {
			who = "anything"
		}
		who += " except " + strings.Join(but, " and ")
	}
	switch {
	case text == "" && who == "":
		return ""
	case text == "":
		return preposition + who
	case who == "":
		return preposition + text
	}
	return preposition + text + " of " + who
}

func list[T fmt.Stringer](all []T) string {
	words := make([]string, len(all))
	for i, one := range all {
		words[i] = one.String()
	}
	return strings.Join(words, ",")
}

// pods says whom a selector selects, with the labels that come from namespaces and service accounts said as such.
func pods(s selector.Selector) string {
	var own, account, namespace []string
	in, of := "", ""
	for _, term := range conjuncts(s.String()) {
		key, value, equal := strings.Cut(term, " == ")
		named, err := strconv.Unquote(value)
		equal = equal && err == nil
		switch {
		case term == "all()" || term == "has("+labelOrchestrator+")" || equal && key == labelOrchestrator: // every pod has one
		case equal && in == "" && (key == labelNamespace || key == "pcns.kubernetes.io/metadata.name" || key == "pcns.projectcalico.org/name"):
			in = " in namespace " + named
		case equal && of == "" && key == labelServiceAccount:
			of = " of service account " + named
		case strings.HasPrefix(term, namespacePrefix):
			namespace = append(namespace, strings.TrimPrefix(term, namespacePrefix))
		case strings.HasPrefix(term, "has("+namespacePrefix):
			namespace = append(namespace, "has("+strings.TrimPrefix(term, "has("+namespacePrefix))
		case strings.HasPrefix(term, serviceAccountPrefix):
			account = append(account, strings.TrimPrefix(term, serviceAccountPrefix))
		case strings.HasPrefix(term, "has("+serviceAccountPrefix):
			account = append(account, "has("+strings.TrimPrefix(term, "has("+serviceAccountPrefix))
		default:
			own = append(own, term)
		}
	}
	text := "pods"
	if len(own) > 0 {
		text += " with " + strings.Join(own, " && ")
	}
	text += of
	if len(account) > 0 {
		text += " of service accounts with " + strings.Join(account, " && ")
	}
	text += in
	if len(namespace) > 0 {
		text += " in namespaces with " + strings.Join(namespace, " && ")
	}
	if text == "pods" {
		return "any pod"
	}
	return text
}

// conjuncts are the terms that a selector, in its canonical form, joins with && outermost. One of several with || is itself, in parentheses.
func conjuncts(text string) []string {
	var terms []string
	depth, from, quote := 0, 0, byte(0)
	for i := range len(text) {
		switch c := text[i]; {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '(' || c == '{':
			depth++
		case c == ')' || c == '}':
			depth--
		case depth == 0 && strings.HasPrefix(text[i:], " || "):
			return []string{"(" + text + ")"}
		case depth == 0 && strings.HasPrefix(text[i:], " && "):
			terms = append(terms, text[from:i])
			from = i + len(" && ")
		}
	}
	return append(terms, text[from:])
}

// String says what the packet is: "TCP 10.0.0.2:40000 -> 10.0.0.1:80".
func (p Packet) String() string {
	switch {
	case hasPorts(p.Protocol):
		return fmt.Sprintf("%s %s -> %s", protocolWord(p.Protocol), netip.AddrPortFrom(p.Source, p.SourcePort), netip.AddrPortFrom(p.Destination, p.TargetPort))
	case p.Protocol == protocolICMP || p.Protocol == protocolICMPv6:
		return fmt.Sprintf("%s %s %s -> %s", protocolWord(p.Protocol), ICMP{p.ICMPType, &p.ICMPCode}, p.Source, p.Destination)
	}
	return fmt.Sprintf("%s %s -> %s", protocolWord(p.Protocol), p.Source, p.Destination)
}

// Miss says why a condition of a rule, that Evaluate found not to hold for a packet, does not: "port is 81, not 80".
func (m *Model) Miss(r *Rule, t Term, p Packet) string {
	switch t.Field {
	case "IPVersion":
		return fmt.Sprintf("it is IPv%d, not IPv%d", version(p.Source), r.IPVersion)
	case "Protocol":
		return fmt.Sprintf("it is %s, not %s", protocolWord(p.Protocol), protocolWord(*r.Protocol))
	case "NotProtocol":
		return "it is " + protocolWord(p.Protocol)
	case "ICMP":
		if p.Protocol != protocolICMP && p.Protocol != protocolICMPv6 {
			return fmt.Sprintf("it is %s, not ICMP %s", protocolWord(p.Protocol), r.ICMP)
		}
		return fmt.Sprintf("it is %s, not %s", ICMP{p.ICMPType, &p.ICMPCode}, r.ICMP)
	case "NotICMP":
		return fmt.Sprintf("it is %s", ICMP{p.ICMPType, &p.ICMPCode})
	}

	peer, e, port := r.Destination, m.end(p.Destination, p.TargetPort), "port"
	if t.End == source {
		peer, e, port = r.Source, m.end(p.Source, p.SourcePort), "source port"
	}
	who := fmt.Sprintf("%s %s", t.End, e.addr)
	if e.endpoint != nil {
		who = fmt.Sprintf("%s %s (%s)", t.End, e.endpoint.ID, e.addr)
	}
	switch t.Field {
	case "Selector":
		if len(e.labels) == 0 {
			return who + " is no pod's and in no network set"
		}
		return fmt.Sprintf("%s is none of %s", who, pods(*peer.Selector))
	case "NotSelector":
		return fmt.Sprintf("%s is one of %s", who, pods(*peer.NotSelector))
	case "Nets":
		return fmt.Sprintf("%s is not in %s", who, list(peer.Nets))
	case "NotNets":
		return fmt.Sprintf("%s is in %s", who, list(peer.NotNets))
	case "Ports":
		if !hasPorts(p.Protocol) {
			return protocolWord(p.Protocol) + " has no ports"
		}
		return fmt.Sprintf("%s is %d, not %s", port, e.port, e.resolved(peer.Ports, p.Protocol))
	default: // NotPorts
		return fmt.Sprintf("%s is %d, one of %s", port, e.port, e.resolved(peer.NotPorts, p.Protocol))
	}
}

// resolved are ports, each name with what it stands for at this end.
func (e end) resolved(ports []Ports, protocol uint8) string {
	words := make([]string, len(ports))
	for i, p := range ports {
		words[i] = p.String()
		if p.Name == "" {
			continue
		}
		var numbers []string
		if e.endpoint != nil {
			for _, named := range e.endpoint.Ports {
				if named.Name == p.Name && named.Protocol == protocol {
					numbers = append(numbers, strconv.Itoa(int(named.Port)))
				}
			}
		}
		if numbers == nil {
			numbers = []string{"no port there"}
		}
		words[i] += " (" + strings.Join(numbers, ",") + ")"
	}
	return strings.Join(words, ",")
}
