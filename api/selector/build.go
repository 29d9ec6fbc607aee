package selector

import "slices"

// Has selects what has a label. The key must be a ValidKey, here and below.
func Has(key string) Selector { return Selector{&node{op: opHas, key: key}} }

// In selects what has a label with one of some values, none of which may have both kinds of quotes.
func In(key string, values ...string) Selector { return set(opIn, opEqual, key, values) }

// NotIn selects what has no label with one of some values.
func NotIn(key string, values ...string) Selector { return set(opNotIn, opNotEqual, key, values) }

func set(many, one op, key string, values []string) Selector {
	values = slices.Compact(slices.Sorted(slices.Values(values)))
	if len(values) == 1 {
		many = one
	}
	return Selector{&node{op: many, key: key, values: values}}
}

// Not selects what s does not.
func Not(s Selector) Selector {
	switch {
	case s.root == nil:
		return Selector{&node{op: opNot, args: []*node{{op: opAll}}}}
	case s.root.op == opNot:
		return simplify(s.root.args[0])
	}
	return Selector{&node{op: opNot, args: []*node{s.root}}}
}

// And selects what all of them do.
func And(all ...Selector) Selector {
	n := &node{op: opAnd}
	for _, s := range all {
		switch {
		case s.root == nil:
		case s.root.op == opAnd:
			n.args = append(n.args, s.root.args...)
		default:
			n.args = append(n.args, s.root)
		}
	}
	switch len(n.args) {
	case 0:
		return Selector{}
	case 1:
		return simplify(n.args[0])
	}
	return Selector{n}
}

func simplify(n *node) Selector {
	if n.op == opAll {
		return Selector{}
	}
	return Selector{n}
}

// Within is the selector over the labels of something that another thing is in, as they lie, with a prefix, on that thing:
// what is in none has no label member. all() is then what is in any, and global() what is in none, as in Calico.
func (s Selector) Within(prefix, member string) Selector {
	if s.root == nil {
		return Has(member)
	}
	return Selector{s.root.within(prefix, member)}
}

func (n *node) within(prefix, member string) *node {
	switch n.op {
	case opAll:
		return Has(member).root
	case opGlobal:
		return Not(Has(member)).root
	case opNot, opAnd, opOr:
		w := &node{op: n.op}
		for _, a := range n.args {
			w.args = append(w.args, a.within(prefix, member))
		}
		if n.op == opNot && w.args[0].op == opNot { // of !global()
			return w.args[0].args[0]
		}
		return w
	}
	return &node{op: n.op, key: prefix + n.key, values: n.values}
}
