package selector

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// ErrInvalid says that a text is no selector; the error gives the column, from 1, and what was expected there.
var ErrInvalid = errors.New("invalid selector")

// Parse reads a selector. As in Calico an empty text is all(), && binds tighter than ||, and a string ends at the next quote
// of its kind: there are no escapes. Lines may end anywhere between words, as they do in YAML.
func Parse(text string) (Selector, error) {
	if len(text) > MaxLength {
		return Selector{}, fmt.Errorf("%w: %d bytes are more than %d", ErrInvalid, len(text), MaxLength)
	}
	p := &parser{text: text}
	if p.skip(); p.pos == len(text) {
		return Selector{}, nil
	}
	root, err := p.join(opOr)
	if err == nil && p.pos < len(text) {
		err = p.expected("&&, || or the end")
	}
	if err != nil || root.op == opAll {
		return Selector{}, err
	}
	return Selector{root}, nil
}

// ValidKey tells whether a label's name is one that a selector can name.
func ValidKey(key string) bool {
	return key != "" && len(key) <= MaxKey && keyLength(key) == len(key)
}

func keyLength(s string) int {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("_./-", rune(c)) {
			return i
		}
	}
	return len(s)
}

// parser stands before a word of text, or at its end.
type parser struct {
	text  string
	pos   int
	depth int
}

// expected is the error that something else is at the parser's place.
func (p *parser) expected(what string) error {
	found := "the end"
	if p.pos < len(p.text) {
		_, size := utf8.DecodeRuneInString(p.text[p.pos:])
		found = fmt.Sprintf("%q", p.text[p.pos:p.pos+max(size, keyLength(p.text[p.pos:min(p.pos+20, len(p.text))]))])
	}
	return fmt.Errorf("%w: column %d: expected %s, found %s", ErrInvalid, utf8.RuneCountInString(p.text[:p.pos])+1, what, found)
}

func (p *parser) skip() {
	p.pos += len(p.text[p.pos:]) - len(strings.TrimLeft(p.text[p.pos:], " \t\r\n"))
}

// take takes a word, and the space behind it, if it is next.
func (p *parser) take(word string) bool {
	if !strings.HasPrefix(p.text[p.pos:], word) {
		return false
	}
	p.pos += len(word)
	p.skip()
	return true
}

// takeBoth takes two words, between which there may be space, or none of them.
func (p *parser) takeBoth(first, second string) bool {
	at := p.pos
	if p.take(first) && p.take(second) {
		return true
	}
	p.pos = at
	return false
}

// join reads terms between && or ||.
func (p *parser) join(o op) (*node, error) {
	word, term := "||", func() (*node, error) { return p.join(opAnd) }
	if o == opAnd {
		word, term = "&&", p.term
	}
	n := &node{op: o}
	for {
		arg, err := term()
		if err != nil {
			return nil, err
		}
		if arg.op == o {
			n.args = append(n.args, arg.args...)
		} else {
			n.args = append(n.args, arg)
		}
		if p.take(word) {
			continue
		}
		if len(n.args) == 1 {
			return n.args[0], nil
		}
		return n, nil
	}
}

// term reads one condition or what is in parentheses, with any number of ! before it.
func (p *parser) term() (*node, error) {
	negated := false
	for p.take("!") {
		negated = !negated
	}
	n, err := p.positive()
	switch {
	case err != nil || !negated:
		return n, err
	case n.op == opNot:
		return n.args[0], nil
	}
	return &node{op: opNot, args: []*node{n}}, nil
}

func (p *parser) positive() (*node, error) {
	switch {
	case p.take("("):
		if p.depth++; p.depth > MaxDepth {
			return nil, fmt.Errorf("%w: column %d: more than %d parentheses within each other", ErrInvalid, p.pos, MaxDepth)
		}
		n, err := p.join(opOr)
		if err != nil {
			return nil, err
		}
		p.depth--
		return n, p.close("&&, || or )")
	case p.take("all("):
		return &node{op: opAll}, p.close(")")
	case p.take("global("):
		return &node{op: opGlobal}, p.close(")")
	case p.take("has("):
		key, err := p.key("a label's name")
		if err != nil {
			return nil, err
		}
		return &node{op: opHas, key: key}, p.close(")")
	}
	key, err := p.key("a label's name, has(, all(), global(), ! or (")
	if err != nil {
		return nil, err
	}
	return p.condition(key)
}

func (p *parser) close(what string) error {
	if !p.take(")") {
		return p.expected(what)
	}
	return nil
}

func (p *parser) key(what string) (string, error) {
	key := p.text[p.pos : p.pos+keyLength(p.text[p.pos:])]
	switch {
	case key == "":
		return "", p.expected(what)
	case len(key) > MaxKey:
		return "", p.expected(fmt.Sprintf("a label's name of at most %d bytes", MaxKey))
	}
	p.take(key)
	return key, nil
}

// condition reads what follows a label's name.
func (p *parser) condition(key string) (*node, error) {
	n := &node{key: key}
	switch {
	case p.take("=="):
		n.op = opEqual
	case p.take("!="):
		n.op = opNotEqual
	case p.take("contains"):
		n.op = opContains
	case p.takeBoth("starts", "with"):
		n.op = opStartsWith
	case p.takeBoth("ends", "with"):
		n.op = opEndsWith
	case p.takeBoth("not", "in"):
		n.op = opNotIn
	case p.take("in"):
		n.op = opIn
	default:
		return nil, p.expected("==, !=, in, not in, contains, starts with or ends with")
	}
	if n.op == opIn || n.op == opNotIn {
		return p.set(n)
	}
	value, err := p.literal("a string in quotes")
	n.values = []string{value}
	return n, err
}

// set reads the values in braces. A comma may follow the last one, as in Calico.
func (p *parser) set(n *node) (*node, error) {
	if !p.take("{") {
		return nil, p.expected("{")
	}
	n.values = []string{}
	for what := "a string in quotes or }"; !p.take("}"); {
		value, err := p.literal(what)
		if err != nil {
			return nil, err
		}
		n.values = append(n.values, value)
		if !p.take(",") && !strings.HasPrefix(p.text[p.pos:], "}") {
			return nil, p.expected(", or }")
		}
	}
	slices.Sort(n.values)
	n.values = slices.Compact(n.values)
	if len(n.values) == 1 { // the same condition
		n.op -= opIn - opEqual
	}
	return n, nil
}

func (p *parser) literal(what string) (string, error) {
	if p.pos == len(p.text) || p.text[p.pos] != '"' && p.text[p.pos] != '\'' {
		return "", p.expected(what)
	}
	value, _, closed := strings.Cut(p.text[p.pos+1:], p.text[p.pos:p.pos+1])
	if !closed {
		quote := p.text[p.pos]
		p.pos = len(p.text)
		return "", p.expected(string(quote))
	}
	p.pos += len(value) + 2
	p.skip()
	return value, nil
}
