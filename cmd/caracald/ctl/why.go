package ctl

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/store/config"
)

// Verdicts of why.
const (
	verdictAllowed = "allowed"
	verdictDenied  = "denied"  // by policy
	verdictDropped = "dropped" // for another reason
	verdictService = "service" // judged behind the translation of a Service's address
)

// explanation answers why.
type explanation struct {
	Verdict string `json:"verdict"`          // allowed, denied, dropped, service
	Reason  string `json:"reason,omitempty"` // of a denial or a drop, as counters calls it
	Why     string `json:"why"`              // in one sentence
	Counted uint64 `json:"counted"`          // packets that this node has dropped for that reason, whoever's

	Protocol    string    `json:"protocol"`
	Source      whyEnd    `json:"source"`
	Destination whyEnd    `json:"destination"`
	ICMPType    *uint8    `json:"icmpType,omitempty"`
	ICMPCode    *uint8    `json:"icmpCode,omitempty"`
	Epoch       uint32    `json:"epoch"`             // in which this holds; 0: nothing is loaded
	Egress      *oneEnd   `json:"egress"`            // of the source; null: it is no pod
	Ingress     *oneEnd   `json:"ingress"`           // of the destination; likewise
	Ports       []ports   `json:"ports,omitempty"`   // that fare otherwise, where no port was asked for
	Route       string    `json:"route,omitempty"`   // that the packet takes here
	Service     string    `json:"service,omitempty"` // whose address the destination is, namespace/name
	Flows       []whyFlow `json:"flows"`             // that there are
	Past        *past     `json:"past,omitempty"`    // null: no agent answers
	Disagree    []string  `json:"disagree"`          // where the maps say something else than policy
	Notes       []string  `json:"notes"`
	Cluster     bool      `json:"cluster,omitempty"` // it is by what the store says alone
}

// whyEnd is one end of the packet.
type whyEnd struct {
	party
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port,omitempty"`
	Here    bool       `json:"here"` // it is a pod of this node, which judges it
}

// String is how the end is called in a sentence.
func (e whyEnd) String() string { return cmp.Or(e.Name, e.Address.String()) }

// oneEnd is what the policies of one end say.
type oneEnd struct {
	Action  string   `json:"action"` // allow, deny
	By      ruleName `json:"by"`
	Logged  bool     `json:"logged,omitempty"`
	Nearest *miss    `json:"nearest,omitempty"` // the rule that would have turned it, but for the fewest conditions
	Maps    *inMaps  `json:"maps,omitempty"`    // null: it is judged on another node
}

// miss is a rule that does not match, and why.
type miss struct {
	ruleName
	Missed []string `json:"missed"` // the conditions that do not hold
}

// inMaps is what the kernel maps say of one end.
type inMaps struct {
	PolicyID uint32   `json:"policyID"` // 0: no policy applies
	Identity uint32   `json:"identity"` // of the other end's address
	Action   string   `json:"action"`   // allow, deny, unknown: the policy id has no rows
	By       ruleName `json:"by"`
}

const actionUnknown = "unknown"

// ports are ranges of them that fare alike.
type ports struct {
	Ports   string `json:"ports"` // 80 or 8000-8100
	Verdict string `json:"verdict"`
	By      string `json:"by"`
}

// whyFlow is a flow between the two, and what let it in.
type whyFlow struct {
	maps.Flow
	EgressBy  *ruleName `json:"egressBy,omitempty"`
	IngressBy *ruleName `json:"ingressBy,omitempty"`
}

// past is what the agent has seen dropped between the two.
type past struct {
	Since     time.Time `json:"since"`
	Lost      uint64    `json:"lost"` // events that nobody told the agent, of anybody's packets
	Drops     []whyDrop `json:"drops"`
	Forgotten uint64    `json:"forgotten"`
}

type whyDrop struct {
	agent.Drop
	By   *ruleName `json:"by,omitempty"`
	Same bool      `json:"same"` // it is of the protocol and ports that were asked about
}

type whyOptions struct {
	*globals
	cluster bool // by what the store says, whatever this node was told
}

func newWhyCommand(g *globals) *cobra.Command {
	o := &whyOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "why SRC[:PORT] DST[:PORT[/PROTOCOL]]",
		Short: "Say whether a connection is allowed, and by what",
		Long: `why says whether a packet that opens a flow from SRC to DST is allowed or denied now, by which rule of which policy, at which
end, and which rule it missed by the least; which way it takes and whether something else than policy would drop it; which flows
there are between the two and what let them in; and, where the agent runs, what was dropped between them, when and how often.

SRC and DST are a pod's name, namespace/name, pod/namespace/name, the beginning of a container id, or any address. DST may also be a
Service of Kubernetes, svc/namespace/name: policy is about what kube-proxy translates it to, so each ready backend is judged. PROTOCOL is tcp (the default),
udp, sctp, icmp, icmpv6 or a number. For ICMP the port is the type, or type.code; without one it is an echo request. Without a
port the answer is for ports that no rule names, with a list of those that fare otherwise. The source's port matters only
where a rule asks for it, and to find one flow.

It goes by the policy that this node was told last, and looks the same up in the kernel maps: these decide, and where they say
something else it says so. Pods of other nodes are judged there too; ask there for what their maps say. Where no pod was ever added,
as on a machine with a kubeconfig alone, it goes by what the store says of pods of all nodes, and names the nodes to ask.

Exit code 1: the maps and policy disagree, or it could not be found out.`,
		Example: `  caracalctl why web db:5432
  caracalctl why default/web 10.244.1.7:53/udp
  caracalctl why web db/icmp
  caracalctl why --kubeconfig ~/.kube/config pod/default/web pod/default/db:5432
  caracalctl why pod/default/web svc/default/db:5432
  caracalctl why 10.244.0.5:40112 '[2001:db8:244::9]:443'
  caracalctl why web db:5432 -o json | jq .ingress.nearest`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("%s takes a source and a destination, not %d arguments; see --help", cmd.CommandPath(), len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args[0], args[1]) },
	}
	cmd.Flags().BoolVar(&o.cluster, "cluster", false, "by what the store says now, whatever this node was told; where no node is at hand it is that anyway")
	return cmd
}

// settling is how long the maps and policy may disagree before why says so: a change may be under way, and what the ids of new rules
// stand for is not saved at once.
const settling = 1500 * time.Millisecond

func (o *whyOptions) run(cmd *cobra.Command, source, destination string) error {
	if rest, is := serviceName(destination); is {
		return o.runService(cmd, source, rest)
	}
	x, err := o.settled(cmd, source, destination)
	if err != nil {
		return err
	}
	if o.output != formatTable {
		if err := o.print(cmd, x, nil); err != nil {
			return err
		}
	} else if err := x.write(cmd.OutOrStdout()); err != nil {
		return err
	}
	if len(x.Disagree) > 0 {
		return errFound
	}
	return nil
}

// settled explains, once the maps and policy agree or have had time to.
func (o *whyOptions) settled(cmd *cobra.Command, source, destination string) (*explanation, error) {
	x, err := o.explain(cmd, source, destination)
	for until := time.Now().Add(settling); err == nil && len(x.Disagree) > 0 && time.Now().Before(until); {
		select {
		case <-time.After(settling / 6):
		case <-cmd.Context().Done():
			return nil, cmd.Context().Err()
		}
		x, err = o.explain(cmd, source, destination)
	}
	return x, err
}

// whyCase is what an explanation is made from.
type whyCase struct {
	*enforced
	*explanation
	question
	maps   *maps.Maps // nil: nothing is loaded
	packet policy.Packet
	inMaps []maps.Pod
	flows  []maps.Flow

	deniedHere bool // by what this node judges
}

func (o *whyOptions) explain(cmd *cobra.Command, source, destination string) (*explanation, error) {
	e, err := o.sources(cmd)
	if err != nil {
		return nil, err
	}
	q, err := parseQuestion(source, destination, func(s string) bool { return len(e.parties(s)) > 0 })
	if err != nil {
		return nil, usageError{err}
	}
	c := &whyCase{enforced: e, question: q, explanation: &explanation{Flows: []whyFlow{}, Disagree: []string{}, Notes: []string{}}}
	if err := c.ends(); err != nil {
		return nil, err
	}
	if e.hosts != nil {
		return c.explanation, c.bySource()
	}
	c.maps, err = o.maps()
	switch {
	case err == nil:
		defer c.maps.Close()
	case !errors.Is(err, errNotLoaded):
		return nil, err
	default:
		c.note("nothing is loaded on this node, so no packet is judged here: this is what policy says")
	}
	if e.node == "" {
		c.note("this node was never told of any policy")
	}
	if err := c.orient(); err != nil {
		return nil, err
	}
	for n := 1; ; n++ {
		again, err := c.judge()
		if err != nil {
			return nil, err
		}
		if !again {
			break
		}
		if n == 100 {
			return nil, errors.New("the node's policy changes faster than it can be read; ask again")
		}
	}
	if err := c.conclude(); err != nil {
		return nil, err
	}
	c.explainDocker()
	c.findFlows()
	c.remember(cmd, o.socket)
	return c.explanation, nil
}

// sources are what is known here: what this node was told; or what the store says, where there is no node.
func (o *whyOptions) sources(cmd *cobra.Command) (*enforced, error) {
	if !o.cluster {
		e, err := o.enforced(cmd)
		if !errors.Is(err, node.ErrNoDatabase) {
			return e, err
		}
		if c, errStore := o.storeConfig(); errStore != nil || c.Type == config.Bolt {
			return nil, err // it would say no more
		}
	}
	return o.ofStore(cmd)
}

// bySource explains what can be told without a node's maps.
func (c *whyCase) bySource() error {
	c.Cluster = true
	if _, err := c.judge(); err != nil {
		return err
	}
	c.note("this is what policy says by the store; no node was asked for what its maps say")
	return c.conclude()
}

func (c *whyCase) note(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(c.Notes, text) {
		c.Notes = append(c.Notes, text)
	}
}

// ends finds out who is meant, and of which family.
func (c *whyCase) ends() error {
	from, err := c.party(c.question.source)
	if err != nil {
		return err
	}
	to, err := c.party(c.question.destination)
	if err != nil {
		return err
	}
	for _, p := range []party{from, to} {
		if len(p.Addresses) == 0 {
			return fmt.Errorf("%s has no address yet", p.Name)
		}
	}
	find := func(v4 bool) bool {
		of := func(a netip.Addr) bool { return a.Is4() == v4 }
		i, j := slices.IndexFunc(from.Addresses, of), slices.IndexFunc(to.Addresses, of)
		if i < 0 || j < 0 {
			return false
		}
		c.Source, c.Destination = whyEnd{party: from, Address: from.Addresses[i]}, whyEnd{party: to, Address: to.Addresses[j]}
		return true
	}
	v6first := c.protocol == api.ICMPv6
	if !find(!v6first) && !find(v6first) {
		return fmt.Errorf("%s has %s, %s has %s: none of the same family", cmp.Or(from.Name, c.question.source), join(from.Addresses),
			cmp.Or(to.Name, c.question.destination), join(to.Addresses))
	}
	p := &c.packet
	p.Source, p.Destination = c.Source.Address, c.Destination.Address
	if c.isICMP() {
		c.protocol = api.ICMP
		kind := uint8(8)
		if p.Source.Is6() {
			c.protocol, kind = api.ICMPv6, 128
		}
		if c.kind != nil {
			kind = *c.kind
		}
		p.ICMPType, p.ICMPCode = kind, c.code
		c.ICMPType, c.ICMPCode = &p.ICMPType, &p.ICMPCode
	}
	p.Protocol, p.SourcePort, p.TargetPort = uint8(c.protocol), c.sourcePort, c.port
	if c.protocol.HasPorts() && c.sourcePort == 0 {
		p.SourcePort = anySourcePort
	}
	c.Protocol, c.Source.Port, c.Destination.Port = c.protocol.String(), c.sourcePort, c.port
	return nil
}

// judge asks policy and the maps about both ends. again: the epoch changed meanwhile.
func (c *whyCase) judge() (again bool, err error) {
	if c.maps != nil {
		state, err := c.maps.State()
		if err != nil {
			return false, err
		}
		c.Epoch = state.Epoch
		if c.inMaps, err = c.maps.Pods(); err != nil {
			return false, err
		}
	}
	c.Disagree = c.Disagree[:0]
	if c.Egress, err = c.judgeEnd(policy.Egress, &c.Source, c.packet.Destination); err != nil {
		return false, err
	}
	if c.Ingress, err = c.judgeEnd(policy.Ingress, &c.Destination, c.packet.Source); err != nil {
		return false, err
	}
	if c.maps == nil {
		return false, nil
	}
	state, err := c.maps.State()
	return state.Epoch != c.Epoch, err
}

func (c *whyCase) judgeEnd(d policy.Direction, end *whyEnd, remote netip.Addr) (*oneEnd, error) {
	pod := holding(c.inMaps, end.Address)
	end.Here = pod != nil
	endpoint := c.model.At(end.Address)
	if pod == nil && endpoint == nil {
		return nil, nil
	}
	v := policy.Verdict{Action: policy.Allow, Rule: policy.RuleRef{Index: policy.NoRule}}
	if endpoint != nil {
		v = c.model.Evaluate(endpoint.ID, d, c.packet)
	}
	for _, l := range v.Trace {
		if c.sourcePort == 0 && (l.Rule.Source.Ports != nil || l.Rule.Source.NotPorts != nil) {
			c.note("rules ask for the source's port: this is for %d; write another one behind the source", anySourcePort)
		}
	}
	x := &oneEnd{Action: v.Action.String(), By: c.nameOf(v.Rule, d, decider(v)), Logged: v.Logged}
	if l, ok := v.Nearest(); ok {
		x.Nearest = &miss{ruleName: c.nameOf(l.Ref, d, l.Rule)}
		for _, t := range l.Missed {
			text := c.model.Miss(l.Rule, t, c.packet)
			if t.End == "destination" && c.port == 0 { // none was asked for
				text = strings.Replace(text, "port is 0, not", "port is none of", 1)
			}
			x.Nearest.Missed = append(x.Nearest.Missed, c.withNames(text))
		}
	}
	if pod == nil {
		return x, nil
	}
	id := pod.PolicyIngress
	if d == policy.Egress {
		id = pod.PolicyEgress
	}
	var err error
	if x.Maps, err = c.lookUp(id, remote, d); err != nil {
		return nil, err
	}
	c.compare(x, *end, v, d)
	return x, nil
}

// withNames calls pods as people do, in a text that has the names of their WorkloadEndpoints.
func (c *whyCase) withNames(text string) string {
	for _, end := range []whyEnd{c.Source, c.Destination} {
		if e := c.model.At(end.Address); e != nil && end.Name != "" {
			text = strings.ReplaceAll(text, e.ID, end.Name)
		}
	}
	return text
}

// lookUp is what the maps say of a policy id and the other end's address.
func (c *whyCase) lookUp(id uint32, remote netip.Addr, d policy.Direction) (*inMaps, error) {
	peer, err := c.maps.Peer(remote)
	if err != nil {
		return nil, err
	}
	x := &inMaps{PolicyID: id, Identity: peer.Identity, Action: policy.Allow.String(), By: c.nameOf(policy.RuleRef{Index: policy.NoRule}, d, nil)}
	if id == 0 {
		return x, nil
	}
	p := c.packet
	port := p.TargetPort
	if c.isICMP() {
		port = uint16(p.ICMPType)<<8 | uint16(p.ICMPCode)
	}
	row, err := c.maps.Decide(id, peer.Identity, p.Protocol, port, p.SourcePort)
	switch {
	case errors.Is(err, maps.ErrNotFound):
		x.Action = actionUnknown
	case err != nil:
		return nil, err
	default:
		x.Action = row.Action.String()
		if row.Rule != 0 {
			x.By = c.rule(row.Rule)
		}
	}
	return x, nil
}

// compare notes where the maps say something else than policy.
func (c *whyCase) compare(x *oneEnd, end whyEnd, v policy.Verdict, d policy.Direction) {
	disagree := func(format string, args ...any) {
		c.Disagree = append(c.Disagree, fmt.Sprintf("%s of %s: ", d, end)+fmt.Sprintf(format, args...))
	}
	m := x.Maps
	switch {
	case m.PolicyID == maps.PolicyUnknown && c.enforced.node == "":
		c.note("no policy is known yet, and until then everything of %s is denied: its configuration wants it so (policy.unknown)", end)
	case m.Action == actionUnknown:
		disagree("policy says %s, by %s; the maps have no rows for policy id %d, which denies everything", v.Action, x.By, m.PolicyID)
	case m.Action != v.Action.String():
		disagree("policy says %s, by %s; the maps say %s, by %s", v.Action, x.By, m.Action, m.by())
	case v.Rule.Policy == "" && m.By.ID == 0: // nothing decides, here and there
	case m.By.Rule != x.By.Rule:
		disagree("both say %s, but policy by %s, the maps by %s", v.Action, x.By, m.by())
	}
}

// by says who decides in the maps.
func (m *inMaps) by() string {
	if m.PolicyID == 0 {
		return "policy id 0: no policy"
	}
	return m.By.String()
}

// conclude says what becomes of the packet: whatever is in its way first, as the programs ask.
func (c *whyCase) conclude() error {
	verdict := func(verdict, reason, format string, args ...any) {
		c.Verdict, c.Reason, c.Why = verdict, reason, fmt.Sprintf(format, args...)
	}
	from, to := holding(c.inMaps, c.Source.Address), holding(c.inMaps, c.Destination.Address)
	own, err := c.ownAddresses()
	if err != nil {
		return err
	}
	obstacle, sentence, err := c.way(from, to, own)
	if err != nil {
		return err
	}
	denied := func(x *oneEnd, end whyEnd, reason string) bool {
		if x == nil {
			return false
		}
		action, by := x.Action, x.By
		if x.Maps != nil { // they decide
			action, by = x.Maps.Action, x.Maps.By
			if action == x.Action && by.Policy == "" {
				by = x.By // the same, and its name is known
			}
		}
		if action == policy.Allow.String() {
			return false
		}
		c.deniedHere = x.Maps != nil
		switch action {
		case actionUnknown:
			verdict(verdictDenied, "drop_policy_unknown", "the %s policy of %s is not known", x.By.Direction, end)
		default:
			verdict(verdictDenied, reason, "%s of %s: %s", x.By.Direction, end, by)
		}
		return true
	}
	switch {
	case obstacle != "":
		verdict(verdictDropped, obstacle, "%s", sentence)
	case c.Service != "":
		verdict(verdictService, "", "it is an address of Service %s, which this node's proxy translates: policy judges the pod or address behind it; ask about that", c.Service)
	case from != nil && to != nil && from.IfIndex == to.IfIndex:
		verdict(verdictAllowed, "", "a pod always reaches itself")
	case c.Cluster && c.Source.Address == c.Destination.Address:
		verdict(verdictAllowed, "", "a pod always reaches itself")
	case c.Cluster && c.Destination.Node != "" && c.hosts[c.Source.Address] == c.Destination.Node:
		verdict(verdictAllowed, "", "what a process of node %s sends always reaches its pods", c.Destination.Node)
	case to != nil && slices.Contains(own, c.Source.Address):
		verdict(verdictAllowed, "", "what a process of this host sends always reaches its pods")
	case denied(c.Egress, c.Source, "drop_policy_egress"), denied(c.Ingress, c.Destination, "drop_policy_ingress"):
	case c.Egress == nil && c.Ingress == nil:
		verdict(verdictAllowed, "", "neither end is a pod: no policy is about it")
	default:
		var by []string
		for _, x := range []*oneEnd{c.Egress, c.Ingress} {
			if x != nil {
				by = append(by, x.By.Direction+": "+x.By.String())
			}
		}
		verdict(verdictAllowed, "", "%s", strings.Join(by, "; "))
	}
	if c.port == 0 && c.protocol.HasPorts() && c.Verdict != verdictDropped {
		c.note("no port was given: this is for ports that no rule names")
		c.otherPorts()
	}
	if from == nil && to == nil && !c.Cluster {
		c.note("neither end is a pod of this node, so no packet of it is judged here")
	}
	for _, end := range []whyEnd{c.Source, c.Destination} {
		if end.Node != "" {
			c.note("%s is on node %s, which judges it: ask there for what its maps say", end, end.Node)
		}
	}
	if c.Reason == "" || c.maps == nil {
		return nil
	}
	counts, err := c.maps.Counts()
	for _, n := range counts {
		if n.Verdict == c.Reason {
			c.Counted += n.Packets
		}
	}
	return err
}

// ownAddresses are this host's, if it is a node.
func (c *whyCase) ownAddresses() ([]netip.Addr, error) {
	if c.Cluster {
		return nil, nil
	}
	return hostAddresses()
}

// hostAddresses are this host's own.
func hostAddresses() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out, nil
}

// orient turns the question about if the packet answers a flow: it is judged as the flow was opened.
func (c *whyCase) orient() error {
	if c.maps == nil {
		return nil
	}
	var err error
	if c.flows, err = c.maps.Flows(); err != nil {
		return err
	}
	if c.port == 0 || c.sourcePort == 0 {
		return nil
	}
	from, to := netip.AddrPortFrom(c.Source.Address, c.sourcePort), netip.AddrPortFrom(c.Destination.Address, c.port)
	answers := slices.ContainsFunc(c.flows, func(f maps.Flow) bool {
		return f.Protocol == strings.ToLower(c.Protocol) && f.Opener == to && f.Responder == from
	})
	if !answers {
		return nil
	}
	q := &c.question
	q.source, q.destination, q.sourcePort, q.port = to.Addr().String(), from.Addr().String(), to.Port(), from.Port()
	c.note("such a packet answers a flow that %s opened, and is judged as that flow: this is about it", c.Destination)
	return c.ends()
}

// findFlows finds the flows that were opened as it was asked.
func (c *whyCase) findFlows() {
	named := func(id uint32) *ruleName {
		if id == 0 {
			return nil
		}
		n := c.enforced.rule(id)
		return &n
	}
	for _, f := range c.flows {
		if f.Protocol != strings.ToLower(c.Protocol) || f.Opener.Addr() != c.Source.Address || f.Responder.Addr() != c.Destination.Address {
			continue
		}
		if c.protocol.HasPorts() && (c.port != 0 && c.port != f.Responder.Port() || c.sourcePort != 0 && c.sourcePort != f.Opener.Port()) ||
			c.isICMP() && (f.ICMPType != c.packet.ICMPType || f.ICMPCode != c.packet.ICMPCode) {
			continue
		}
		if c.deniedHere {
			c.note("the flows that were let in before are denied too by now: their packets are dropped")
		}
		c.Flows = append(c.Flows, whyFlow{Flow: f, EgressBy: named(f.RuleEgress), IngressBy: named(f.RuleIngress)})
	}
}

// remember asks the agent what was dropped between the two, in either direction.
func (c *whyCase) remember(cmd *cobra.Command, socket string) {
	filter := agent.DropFilter{Ends: []netip.Prefix{single(c.Source.Address), single(c.Destination.Address)}}
	var all agent.Drops
	err := askAgent(cmd.Context(), socket, "/v1/drops?"+filter.Query().Encode(), &all)
	if err != nil { // the rest of the answer is worth having
		c.note("what was dropped before is not known: %v", err)
		return
	}
	c.Past = &past{Since: all.Since, Lost: all.Lost, Forgotten: all.Forgotten, Drops: []whyDrop{}}
	for _, d := range all.Drops {
		w := whyDrop{Drop: d, Same: c.same(d)}
		if id := map[string]uint32{"drop_policy_egress": d.RuleEgress, "drop_policy_ingress": d.RuleIngress}[d.Reason]; id != 0 {
			by := c.enforced.rule(id)
			w.By = &by
		}
		c.Past.Drops = append(c.Past.Drops, w)
	}
	slices.SortStableFunc(c.Past.Drops, func(a, b whyDrop) int {
		switch {
		case a.Same == b.Same:
			return 0
		case a.Same:
			return -1
		}
		return 1
	})
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// same tells whether a drop is of the flows that were asked about: of an opening, or of an answer.
func (c *whyCase) same(d agent.Drop) bool {
	if d.Protocol != strings.ToLower(c.Protocol) {
		return false
	}
	if c.isICMP() {
		return d.Source == c.Source.Address && d.ICMPType == c.packet.ICMPType && d.ICMPCode == c.packet.ICMPCode
	}
	source, destination := d.SourcePort, d.Port
	if d.Source != c.Source.Address {
		source, destination = d.Port, d.SourcePort
	}
	return (c.port == 0 || c.port == destination) && (c.sourcePort == 0 || c.sourcePort == source)
}
