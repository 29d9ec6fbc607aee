package selector

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestMatches(t *testing.T) {
	labels := map[string]string{"a": "b", "rack": "r1", "empty": "", "projectcalico.org/zone": "z-1", "in": "x", "all": "y", "quote": `it's "`}
	for text, want := range map[string]bool{
		"": true, "  \t": true, "all()": true, "all( )": true, "global()": true, "!all()": false,
		"has(a)": true, "has( a )": true, "!has(a)": false, "has(none)": false, "!has(none)": true, "has(empty)": true,
		`a == "b"`: true, `a == 'b'`: true, `a=='c'`: false, `none == ""`: false, `empty == ""`: true,
		`a != "b"`: false, `a!='c'`: true, `none != "x"`: true,
		`a in {"b", "c"}`: true, `a in{'c'}`: false, `a in {}`: false, `none in {""}`: false, `a in {"b",}`: true,
		`a not in {"b"}`: false, `a notin {"c"}`: true, `none not in {"c"}`: true, `a not in {}`: true,
		`rack contains "1"`: true, `rack contains ""`: true, `rack contains "2"`: false, `none contains ""`: false,
		`rack starts with "r"`: true, `rack starts  with "1"`: false, `rack startswith 'r'`: true,
		`rack ends with "1"`: true, `rack ends with "r"`: false, `none ends with ""`: false,
		`projectcalico.org/zone == "z-1"`: true, `in == "x"`: true, `in in {"x"}`: true, `all == 'y'`: true, `has(all)`: true,
		`quote contains "'"`: true, `quote contains '"'`: true, `a == "B"`: false,

		`a == "b" && rack == "r1"`: true, `a == "b" && rack == "r2"`: false,
		`a == "c" || rack == "r1"`: true, `a == "c" || rack == "r2"`: false,
		`a == "b" || none == "x" && none == "y"`:   true, // && binds tighter
		`(a == "b" || none == "x") && none == "y"`: false,
		`!a == "b"`: false, `!!a == "b"`: true, `! ! ! has(a)`: false, `!(a == "c")`: true, `!(has(a) && has(none))`: true,
		"has(a) &&\n  has(rack)\n": true, `((((has(a)))))`: true,
	} {
		s, err := Parse(text)
		if err != nil || s.Matches(labels) != want {
			t.Errorf("%s: %t, %v; want %t", text, s.Matches(labels), err, want)
		}
	}
}

func TestString(t *testing.T) {
	for text, want := range map[string]string{
		"":                              "all()",
		"( all() )":                     "all()",
		"!all()":                        "!all()",
		"global()":                      "global()",
		"a=='b'":                        `a == "b"`,
		`a=='"'`:                        `a == '"'`,
		"a in{'c','b','c'}":             `a in {"b", "c"}`,
		"a in {'b'}":                    `a == "b"`,
		"a not in {'b', 'b'}":           `a != "b"`,
		"a in {}":                       "a in {}",
		"!!(!has(a))":                   "!has(a)",
		"!(!(!has(a)))":                 "!has(a)",
		"(has(a)&&has(b))&&has(c)":      "has(a) && has(b) && has(c)",
		"has(a)||(has(b)||(has(c)))":    "has(a) || has(b) || has(c)",
		"has(a) || has(b) && has(c)":    "has(a) || (has(b) && has(c))",
		"!(has(a) || b startswith 'c')": `!(has(a) || b starts with "c")`,
	} {
		s, err := Parse(text)
		if err != nil || s.String() != want {
			t.Errorf("%s: %s, %v; want %s", text, s, err, want)
		}
	}
	if (Selector{}).String() != "all()" || !(Selector{}).Matches(nil) {
		t.Error("the zero value is not all()")
	}
}

func TestErrors(t *testing.T) {
	for text, want := range map[string]string{
		"a":                      "column 2: expected ==, !=, in",
		"a = 'b'":                `column 3: expected ==, !=, in, not in, contains, starts with or ends with, found "="`,
		"a == b":                 `column 6: expected a string in quotes, found "b"`,
		"a == ":                  "column 6: expected a string in quotes, found the end",
		"a == 'b":                "column 8: expected ', found the end",
		`a == "b'`:               `column 9: expected ", found the end`,
		"a == 'b' c == 'd'":      `column 10: expected &&, || or the end, found "c"`,
		"a == 'ä' &":             `column 10: expected &&, || or the end, found "&"`,
		"a == 'b' &&":            "column 12: expected a label's name, has(, all(), global(), ! or (, found the end",
		"a in 'b'":               `column 6: expected {, found "'"`,
		"a in {'b' 'c'}":         "column 11: expected , or }",
		"a in {b}":               `column 7: expected a string in quotes or }, found "b"`,
		"a in {'b'":              "column 10: expected , or }, found the end",
		"a not 'b'":              `expected ==, !=, in, not in, contains, starts with or ends with, found "not"`,
		"a starts 'b'":           `found "starts"`,
		"a starts ends with 'b'": `found "starts"`,
		"a not == 'b'":           `found "not"`,
		"(has(a)":                "column 8: expected &&, || or ), found the end",
		"has(a":                  "column 6: expected ), found the end",
		"has()":                  `column 5: expected a label's name, found ")"`,
		"has (a)":                `column 5: expected ==`,
		"all(a)":                 `column 5: expected ), found "a"`,
		")":                      "column 1: expected a label's name",
		"k8s-app: 'x'":           `column 8: expected ==`,
		"a$ == 'b'":              `column 2: expected ==`,
		"ä == 'b'":               `column 1: expected a label's name, has(, all(), global(), ! or (, found "ä"`,

		strings.Repeat("k", 513) + " == 'b'":                "at most 512 bytes",
		strings.Repeat("(", 101) + strings.Repeat(")", 101): "more than 100 parentheses",
		strings.Repeat("(", 60000):                          "more than 100 parentheses",
		strings.Repeat(" ", MaxLength+1):                    "more than 65536",
	} {
		s, err := Parse(text)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%.80s: %s, %v; want %s", text, s, err, want)
		}
	}
	if _, err := Parse(strings.Repeat("!", 60000) + "has(a)"); err != nil {
		t.Error(err)
	}
	if s, err := Parse(strings.Repeat("(", MaxDepth) + "has(a)" + strings.Repeat(")", MaxDepth)); err != nil || s.String() != "has(a)" {
		t.Error(s, err)
	}
	for key, want := range map[string]bool{"a": true, "x.y/z-1_A": true, "": false, "a b": false, "ä": false, strings.Repeat("k", 513): false} {
		if ValidKey(key) != want {
			t.Errorf("ValidKey(%.20q) is not %t", key, want)
		}
	}
}

func TestNeeds(t *testing.T) {
	for text, want := range map[string]string{
		"":                            "map[]",
		"a == 'b'":                    "map[a:[b]]",
		"a != 'b' && !has(c)":         "map[]",
		"has(a) && a in {'c', 'b'}":   "map[a:[b c]]",
		"a == 'b' && c contains 'd'":  "map[a:[b] c:[]]",
		"a == 'b' || a in {'c', 'd'}": "map[a:[b c d]]",
		"a == 'b' || has(a)":          "map[a:[]]",
		"a == 'b' || c == 'd'":        "map[]",
		"a in {}":                     "map[a:[]]",
	} {
		s, err := Parse(text)
		if err != nil || fmt.Sprint(s.Needs()) != want {
			t.Errorf("%s: %v, %v; want %s", text, s.Needs(), err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "all()", "!(a == 'b' || has(c)) && d not in {'e', \"f\"}", "a starts with 'b'", "((a in {})", "global() && x.y/z ends with '\"'", "!!has(a)"} {
		f.Add(s, "a", "b", "d", "e")
	}
	f.Fuzz(func(t *testing.T, text, key1, value1, key2, value2 string) {
		s, err := Parse(text)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		labels := map[string]string{key1: value1, key2: value2}
		again, err := Parse(s.String())
		if err != nil && len(s.String()) <= MaxLength {
			t.Fatalf("%q became %q: %v", text, s, err)
		}
		if err == nil && (again.String() != s.String() || again.Matches(labels) != s.Matches(labels)) {
			t.Fatalf("%q became %q, and that %q", text, s, again)
		}
		if !s.Matches(labels) {
			return
		}
		for key, values := range s.Needs() {
			if value, present := labels[key]; !present || values != nil && !slices.Contains(values, value) {
				t.Fatalf("%q matches %q, which has not what it needs: %q", text, labels, s.Needs())
			}
		}
	})
}
