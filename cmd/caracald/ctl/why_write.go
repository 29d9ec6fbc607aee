package ctl

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/caracal-net/caracal/policy"
)

// mostShown is how many flows, drops and ports the text has of each; -o json has all.
const mostShown = 10

// write writes the explanation for people.
func (x *explanation) write(out io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s -> %s: %s", x.title(), x.Source.words(), x.Destination.words(), strings.ToUpper(x.Verdict))
	if x.Reason != "" {
		fmt.Fprintf(&b, " (%s)", x.Reason)
	}
	fmt.Fprintf(&b, "\n%s\n", x.Why)
	for _, d := range x.Disagree {
		fmt.Fprintf(&b, "\nTHE MAPS AND POLICY DISAGREE: %s\n", d)
	}
	b.WriteString("\n")
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", label, printable(fmt.Sprintf(format, args...)))
	}
	for _, end := range []struct {
		name string
		of   whyEnd
		*oneEnd
	}{{"egress", x.Source, x.Egress}, {"ingress", x.Destination, x.Ingress}} {
		if end.oneEnd == nil {
			line(end.name, "%s is no pod: nothing decides", end.of)
			continue
		}
		end.write(line, end.name, end.of)
	}
	for i, p := range x.Ports {
		if i == mostShown {
			line("", "and %d more (-o json)", len(x.Ports)-i)
			break
		}
		line(first(i, "ports"), "%s: %s, by %s", p.Ports, p.Verdict, p.By)
	}
	if !x.Cluster {
		line("epoch", "%d", x.Epoch)
	}
	if x.Route != "" {
		line("route", "%s", x.Route)
	}
	if x.Reason != "" && !x.Cluster {
		line("counted", "%d packets of this node were dropped for that reason (caracalctl counters --drops)", x.Counted)
	}
	if !x.Cluster {
		x.writeFlows(line)
		x.writePast(line)
	}
	for i, n := range x.Notes {
		line(first(i, "note"), "%s", n)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// first is a label where a list begins, and nothing in its other lines.
func first(i int, label string) string {
	if i > 0 {
		return ""
	}
	return label
}

func (x *explanation) title() string {
	if x.ICMPType == nil {
		return x.Protocol
	}
	return fmt.Sprintf("%s type %d code %d", x.Protocol, *x.ICMPType, *x.ICMPCode)
}

func (e whyEnd) words() string {
	text := e.Address.String()
	if e.Port != 0 {
		text = netip.AddrPortFrom(e.Address, e.Port).String()
	}
	if e.Name != "" {
		text = printable(e.Name) + " (" + text + ")"
	}
	return text
}

func (o *oneEnd) write(line func(string, string, ...any), name string, of whyEnd) {
	line(name, "%s: %s, by %s", of, o.Action, o.By)
	if o.By.Text != "" {
		line("", "  which says: %s", o.By.Text)
	}
	if o.By.Index == policy.NoRule && o.By.Policy != "" {
		line("", "  no rule before it matches")
	}
	if o.Logged {
		line("", "  a rule that logs matches")
	}
	if n := o.Nearest; n != nil {
		line("", "nearest miss: %s", n.ruleName)
		line("", "  which says: %s", n.Text)
		line("", "  but %s", strings.Join(n.Missed, ", and "))
	}
	switch m := o.Maps; {
	case m == nil && of.Node != "":
		line("", "it is judged on node %s", of.Node)
	case m == nil:
		line("", "it is not judged on this node")
	case m.PolicyID == 0:
		line("", "maps: policy id 0, identity %d of the other end: allow", m.Identity)
	case m.By.ID == 0:
		line("", "maps: policy id %d, identity %d of the other end: %s", m.PolicyID, m.Identity, m.Action)
	default:
		line("", "maps: policy id %d, identity %d of the other end: %s, rule id %d", m.PolicyID, m.Identity, m.Action, m.By.ID)
	}
}

func (x *explanation) writeFlows(line func(string, string, ...any)) {
	if len(x.Flows) == 0 {
		line("flows", "none now")
	}
	for i, f := range x.Flows {
		if i == mostShown {
			line("", "and %d more (-o json)", len(x.Flows)-i)
			break
		}
		line(first(i, "flows"), "%s %s -> %s: %s for %s, %d packets sent, %d received, idle for %s", f.Protocol, f.Opener, f.Responder, f.State,
			brief(f.Age), f.Sent.Packets, f.Received.Packets, brief(f.Idle))
		for _, by := range []*ruleName{f.EgressBy, f.IngressBy} {
			if by != nil {
				line("", "  let in by rule id %d: %s", by.ID, by)
			}
		}
		if f.EgressBy == nil && f.IngressBy == nil {
			line("", "  let in by no rule: no policy applied")
		}
	}
}

func (x *explanation) writePast(line func(string, string, ...any)) {
	if x.Past == nil {
		line("drops", "not known")
		return
	}
	if len(x.Past.Drops) == 0 {
		line("drops", "none between them since %s", moment(x.Past.Since))
	}
	for i, d := range x.Past.Drops {
		if i == mostShown {
			line("", "and %d more (-o json)", len(x.Past.Drops)-i)
			break
		}
		when := "at " + moment(d.Last)
		if d.Count > 1 {
			when = fmt.Sprintf("from %s to %s", moment(d.First), moment(d.Last))
		}
		line(first(i, "drops"), "%d, %s: %s, %s", d.Count, when, dropped(d), d.Reason)
		if d.By != nil {
			line("", "  by rule id %d: %s", d.By.ID, d.By)
		}
	}
	if x.Past.Lost > 0 {
		line("", "%d events of this node were never told: there were too many, or no agent; drops may be missing", x.Past.Lost)
	}
}

// dropped says which packets.
func dropped(d whyDrop) string {
	if d.IsICMP() {
		return fmt.Sprintf("%s %s -> %s type %d code %d", d.Protocol, d.Source, d.Destination, d.ICMPType, d.ICMPCode)
	}
	return fmt.Sprintf("%s %s -> %s", d.Protocol, netip.AddrPortFrom(d.Source, d.SourcePort), netip.AddrPortFrom(d.Destination, d.Port))
}

// moment is a time to the second, with its date if it was not today.
func moment(t time.Time) string {
	if t = t.Local(); time.Since(t) < 20*time.Hour {
		return t.Format("15:04:05")
	}
	return t.Format("2006-01-02 15:04:05")
}
