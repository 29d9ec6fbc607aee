// Package selector is Calico's selector language: which labels something must have.
//
//	has(rack) && rack not in {"a", "b"} || role == "db" && !(name starts with "test-")
//
// A condition on a label that is absent is false, but for != and not in, which are true.
package selector

import (
	"slices"
	"strings"
)

// Limits of what Parse takes: a selector is also what somebody hostile may write.
const (
	MaxLength = 64 << 10 // bytes of a selector
	MaxKey    = 512      // bytes of a label's name, as Calico
	MaxDepth  = 100      // parentheses within parentheses
)

// Selector is a parsed selector. It is immutable; the zero value is all().
type Selector struct{ root *node }

// op is what a node does.
type op int

const (
	opAll op = iota
	opGlobal
	opHas
	opEqual
	opNotEqual
	opIn
	opNotIn
	opContains
	opStartsWith
	opEndsWith
	opNot
	opAnd
	opOr
)

var words = map[op]string{
	opEqual: "==", opNotEqual: "!=", opIn: "in", opNotIn: "not in",
	opContains: "contains", opStartsWith: "starts with", opEndsWith: "ends with",
}

// node is a condition on a label, or what joins others.
type node struct {
	op     op
	key    string
	values []string // of opIn and opNotIn sorted, each once; of the other conditions one
	args   []*node  // of opNot one; of opAnd and opOr two or more, none of the same op
}

// Matches tells whether labels are selected.
func (s Selector) Matches(labels map[string]string) bool {
	return s.root == nil || s.root.matches(labels)
}

func (n *node) matches(labels map[string]string) bool {
	switch n.op {
	case opNot:
		return !n.args[0].matches(labels)
	case opAnd:
		return !slices.ContainsFunc(n.args, func(a *node) bool { return !a.matches(labels) })
	case opOr:
		return slices.ContainsFunc(n.args, func(a *node) bool { return a.matches(labels) })
	case opAll, opGlobal:
		return true
	}
	value, present := labels[n.key]
	switch n.op {
	case opHas:
		return present
	case opEqual:
		return present && value == n.values[0]
	case opNotEqual:
		return !present || value != n.values[0]
	case opIn, opNotIn:
		_, found := slices.BinarySearch(n.values, value)
		return (present && found) == (n.op == opIn)
	case opContains:
		return present && strings.Contains(value, n.values[0])
	case opStartsWith:
		return present && strings.HasPrefix(value, n.values[0])
	default: // opEndsWith
		return present && strings.HasSuffix(value, n.values[0])
	}
}

// String is the selector in its canonical form: Parse reads it back as an equal one, and two selectors that differ only in
// spaces, quotes, needless parentheses and negations, or the order within a set, have the same.
func (s Selector) String() string {
	if s.root == nil {
		return "all()"
	}
	var b strings.Builder
	s.root.write(&b, false)
	return b.String()
}

func (n *node) write(b *strings.Builder, inside bool) {
	switch n.op {
	case opAll:
		b.WriteString("all()")
	case opGlobal:
		b.WriteString("global()")
	case opHas:
		b.WriteString("has(" + n.key + ")")
	case opNot:
		b.WriteByte('!')
		n.args[0].write(b, true)
	case opAnd, opOr:
		if inside {
			b.WriteByte('(')
		}
		join := " && "
		if n.op == opOr {
			join = " || "
		}
		for i, a := range n.args {
			if i > 0 {
				b.WriteString(join)
			}
			a.write(b, true)
		}
		if inside {
			b.WriteByte(')')
		}
	case opIn, opNotIn:
		b.WriteString(n.key + " " + words[n.op] + " {")
		for i, v := range n.values {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(quote(v))
		}
		b.WriteByte('}')
	default:
		b.WriteString(n.key + " " + words[n.op] + " " + quote(n.values[0]))
	}
}

// quote needs no escapes: a literal ends at the next quote of its kind, so none holds both.
func quote(s string) string {
	if strings.Contains(s, `"`) {
		return "'" + s + "'"
	}
	return `"` + s + `"`
}

// Needs are labels without which the selector matches nothing, each with the values that it must have one of; nil: any
// value. It is what an index over selectors is made of, and need not be complete.
func (s Selector) Needs() map[string][]string {
	if s.root == nil {
		return nil
	}
	return s.root.needs()
}

func (n *node) needs() map[string][]string {
	switch n.op {
	case opHas, opContains, opStartsWith, opEndsWith:
		return map[string][]string{n.key: nil}
	case opEqual, opIn:
		return map[string][]string{n.key: slices.Clone(n.values)}
	case opAnd: // of what two operands say of a label, the narrower is kept
		all := make(map[string][]string)
		for _, a := range n.args {
			for key, values := range a.needs() {
				if before, known := all[key]; !known || before == nil || values != nil && len(values) < len(before) {
					all[key] = values
				}
			}
		}
		return all
	case opOr:
		all := n.args[0].needs()
		for _, a := range n.args[1:] {
			other := a.needs()
			for key, values := range all {
				more, needed := other[key]
				switch {
				case !needed:
					delete(all, key)
				case values == nil || more == nil:
					all[key] = nil
				default:
					all[key] = append(values, more...)
				}
			}
		}
		return all
	}
	return nil
}
