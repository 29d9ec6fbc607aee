package selector

import (
	"strings"
	"testing"
)

func TestBuild(t *testing.T) {
	parse := func(text string) Selector {
		s, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, test := range []struct {
		got  Selector
		want string
	}{
		{Has("a"), "has(a)"},
		{In("a", "c", "b", "c"), `a in {"b", "c"}`},
		{In("a", "b"), `a == "b"`},
		{NotIn("a", "b", "b"), `a != "b"`},
		{NotIn("a", "c", "b"), `a not in {"b", "c"}`},
		{Not(Has("a")), "!has(a)"},
		{Not(Not(Has("a"))), "has(a)"},
		{Not(Selector{}), "!all()"},
		{Not(Not(Selector{})), "all()"},
		{And(), "all()"},
		{And(Selector{}, Has("a")), "has(a)"},
		{And(parse("has(a) && has(b)"), parse("has(c) || has(d)")), "has(a) && has(b) && (has(c) || has(d))"},
		{parse("").Within("in.", "m"), "has(m)"},
		{parse("global()").Within("in.", "m"), "!has(m)"},
		{parse("!global()").Within("in.", "m"), "has(m)"},
		{parse("!(a == 'b' || all()) && b not in {'x', 'y'}").Within("in.", "m"), `!(in.a == "b" || has(m)) && in.b not in {"x", "y"}`},
	} {
		if test.got.String() != test.want {
			t.Errorf("%s, want %s", test.got, test.want)
		}
		if again := parse(test.got.String()); again.String() != test.want {
			t.Errorf("%s is read as %s", test.want, again)
		}
	}
}

// Within sees on a thing what the selector sees on what the thing is in.
func FuzzWithin(f *testing.F) {
	for _, text := range []string{"", "!all()", "has(a) && b == 'x' || !(c in {'a', 'b'})", "!(!has(a) && b not in {'x'})", "a starts with 'b' && (has(c) || d contains 'e')"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			return
		}
		w := s.Within("in.", "member")
		if again, err := Parse(w.String()); err == nil && again.String() != w.String() {
			t.Fatalf("%s is read as %s", w, again)
		}
		for _, labels := range []map[string]string{{}, {"a": "x", "b": "x", "c": "a"}, {"a": "bc", "d": "e"}} {
			inside := map[string]string{"member": ""}
			for key, value := range labels {
				inside["in."+key] = value
			}
			if !strings.Contains(s.String(), "global()") && w.Matches(inside) != s.Matches(labels) {
				t.Fatalf("%s is %t, %s is %t of %v", s, s.Matches(labels), w, w.Matches(inside), labels)
			}
		}
	})
}
