package selector

import "testing"

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
