package page

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const document = `# A title

` + "```console" + `
# printf 'one\ntwo   words\n'; echo err >&2
one
two words
err

# cat >$DIR/file <<'X'
> some

> text
> X
` + "```" + `

1. an item

   ` + "```console" + `
   # cat $DIR/file \
   >   ; exit 3 # exit 3
   ...
   t...t
   ` + "```" + `

` + "```toml" + `
# no command
` + "```" + `
`

func TestParse(t *testing.T) {
	document := strings.Replace(document, "\n\n> text", "\n>\n> text", 1)
	got, err := Parse(document)
	if err != nil {
		t.Fatal(err)
	}
	want := []Command{
		{Line: 4, Script: `printf 'one\ntwo   words\n'; echo err >&2`, Output: []string{"one", "two words", "err"}, OutputLine: 5},
		{Line: 9, Script: "cat >$DIR/file <<'X'\nsome\n\ntext\nX"},
		{Line: 19, Script: "cat $DIR/file \\\n  ; exit 3 # exit 3", Exit: 3, Output: []string{"...", "t...t"}, OutputLine: 21},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
}

func TestParseRefuses(t *testing.T) {
	block := func(kind string, lines ...string) string {
		return "```" + kind + "\n" + strings.Join(lines, "\n") + "\n```\n"
	}
	for name, test := range map[string]struct{ text, want string }{
		"sh":                    {"text\n\n" + block("sh", "rm -rf /"), "line 3: a sh block is not run"},
		"bash":                  {block("bash", "true"), "line 1: a bash block is not run"},
		"a prompt elsewhere":    {block("", "h1# true"), "line 2: a command outside a console block"},
		"an indented block":     {"Do this:\n\n    caracalctl pods\n", "line 3: an indented block is not run"},
		"an open block":         {"text\n```console\n# true\n", "line 2: the block that begins here has no end"},
		"output without prompt": {block("console", "", "hello", "# true"), "line 3: output before the first prompt"},
		"a large status":        {block("console", "# false # exit 256"), "line 2: exit status 256 is not between 0 and 255"},
		"an endless status":     {block("console", "# false # exit 99999999999999999999"), "is not between 0 and 255"},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := Parse(test.text); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("commands %v, error %v; want %q", got, err, test.want)
			}
		})
	}
	for _, text := range []string{
		"a list\n\n- one\n\n    - deeper\n    1. deeper\n", block("", "a --> b"), block("text", "some"), "    begins\n"[4:],
	} {
		if got, err := Parse(text); err != nil || len(got) != 0 {
			t.Errorf("%q: commands %v, error %v; want none", text, got, err)
		}
	}
}

func TestCompare(t *testing.T) {
	for _, test := range []struct {
		want, out string
		err       string // "": equal
	}{
		{"a b", "a   b\n\n", ""},
		{"a b", "  a\tb", ""},
		{"a b", "ab", `line 7: want "a b", got "ab"`},
		{"a\nb", "a\n\nb", `line 8: want "b", got ""`},
		{"a\nb", "a", `line 8: want "b", got the output's end`},
		{"a", "a\nb", `line 7: more output follows than the document shows: "b"`},
		{"...", "", ""},
		{"...", "a\nb", ""},
		{"...\nb", "a\nb\na\nb", ""},
		{"a\n...", "a", ""},
		{"...\nb\n...\nc", "b\nc\nb\nd", `line 10: more output follows than the document shows: "b"`},
		{"...\nb\n...\na", "b\na\nb", `line 10: more output follows than the document shows: "b"`},
		{"...\nx", "a\nb", `line 8: want "x", which no line behind is`},
		{"10.244....  eth0", "10.244.3.7  eth0", ""},
		{"10.244....", "10.2441", `line 7: want "10.244....", got "10.2441"`},
		{"a...b...c", "a1b2c", ""},
		{"a...b...c", "a1c", `line 7: want "a...b...c", got "a1c"`},
		{"ab...ba", "aba", `line 7: want "ab...ba", got "aba"`},
		{"(a...", "(a.*[", ""},
	} {
		err := compare(strings.Split(test.want, "\n"), 7, test.out)
		if got := fmt.Sprint(err); err == nil && test.err != "" || err != nil && got != test.err {
			t.Errorf("want %q, output %q: %v; want %q", test.want, test.out, err, test.err)
		}
	}
}

// sh is a machine: this one.
func sh(t *testing.T) Shell {
	dir := t.TempDir()
	return func(ctx context.Context, script string) (string, error) {
		cmd := exec.CommandContext(ctx, "sh", "-c", script)
		cmd.Env = append(os.Environ(), "DIR="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("sh: %w", err)
		}
		return string(out), err
	}
}

// failure is a test that keeps what it fails with.
type failure struct {
	testing.TB
	said string
}

func (f *failure) Helper()         {}
func (f *failure) Log(args ...any) {}
func (f *failure) Fatal(args ...any) {
	f.Fatalf("%s", fmt.Sprint(args...))
}
func (f *failure) Fatalf(format string, args ...any) {
	f.said = fmt.Sprintf(format, args...)
	panic(f)
}

// runDocument runs a document and returns what it fails with.
func runDocument(t *testing.T, text string, shells map[string]Shell, parts ...string) string {
	path := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	f := &failure{TB: t}
	func() {
		defer func() {
			if r := recover(); r != nil && r != any(f) {
				panic(r)
			}
		}()
		Run(f, path, shells, parts...)
	}()
	return f.said
}

func TestRun(t *testing.T) {
	if said := runDocument(t, strings.Replace(document, "\n\n> text", "\n>\n> text", 1), map[string]Shell{"h1": sh(t)}); said != "" {
		t.Error(said)
	}
	two := map[string]Shell{"h1": sh(t), "h2": sh(t)}
	if said := runDocument(t, "```console\nh1# echo 1 >$DIR/f\nh2# test -e $DIR/f # exit 1\nh1# cat $DIR/f\n1\n```\n", two); said != "" {
		t.Error(said)
	}
	parts := "```console\n# false\n```\n## One\n```console\n# printf 1 >>$DIR/p\n```\n## Two\n```console\n# printf 2 >>$DIR/p\n```\n## Three\n```console\n# cat $DIR/p\n2\n```\n"
	if said := runDocument(t, parts, map[string]Shell{"": sh(t)}, "Two", "Three"); said != "" {
		t.Error(said)
	}
	if said := runDocument(t, parts, map[string]Shell{"": sh(t)}, "Four"); !strings.Contains(said, `below "## Four"`) {
		t.Errorf("a part that is not there: %q", said)
	}
	for name, test := range map[string]struct{ block, want string }{
		"status":       {"h1# echo out; exit 2", "page.md:2: (...) h1# echo out; exit 2\n    out\n...: line 2: exit status 2, want 0"},
		"other status": {"h1# true # exit 1", "line 2: exit status 0, want 1"},
		"output":       {"h1# printf 'a\\nb\\n'\na\nc", `line 4: want "c", got "b"`},
		"a signal":     {"h1# kill -9 $$", "line 2: exit status -1, want 0"},
		"no machine":   {"h1# true\nh3# true", `page.md:3: prompt "h3# " names no machine of this test; there is h1, h2`},
		"which":        {"# true", `page.md:2: prompt "# " names no machine, and there are several: h1, h2`},
		"nothing":      {"", "nothing to run"},
	} {
		t.Run(name, func(t *testing.T) {
			said := runDocument(t, "```console\n"+test.block+"\n```\n", two)
			if err := compare(append(append([]string{"..."}, strings.Split("..."+test.want+"...", "\n")...), "..."), 1, said); err != nil {
				t.Errorf("fails with %q, want %q", said, test.want)
			}
		})
	}
	broken := map[string]Shell{"h1": func(context.Context, string) (string, error) { return "", os.ErrPermission }}
	if said := runDocument(t, "```console\n# true\n```", broken); !strings.Contains(said, "line 2: run it: permission denied") {
		t.Errorf("a machine that does not run it: %q", said)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{document, "", "```console", "```console\n# a\n> b\nc\n```", "~~~~ console x\nh1# a # exit 7\n~~~\n~~~~", "\t\x00\n\n\txx", "```console\n>\n```"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		commands, err := Parse(text)
		if err != nil {
			if len(commands) > 0 || !strings.HasPrefix(err.Error(), "line ") {
				t.Fatalf("commands %v, error %v", commands, err)
			}
			return
		}
		lines, last := strings.Split(text, "\n"), 0
		for _, c := range commands {
			if c.Line <= last || c.Line > len(lines) {
				t.Fatalf("line %d after %d of %d", c.Line, last, len(lines))
			}
			last = c.Line + strings.Count(c.Script, "\n")
			if c.Script == "" || c.Exit < 0 || c.Exit > 255 {
				t.Fatalf("%+v", c)
			}
			if first, _, _ := strings.Cut(c.Script, "\n"); !strings.Contains(lines[c.Line-1], c.Machine+"# ") || !strings.Contains(lines[c.Line-1], first) {
				t.Fatalf("%+v is not in line %q", c, lines[c.Line-1])
			}
			if len(c.Output) > 0 && c.OutputLine != last+1 {
				t.Fatalf("%+v: output is in line %d", c, c.OutputLine)
			}
			last += len(c.Output)
		}
	})
}

func FuzzCompare(f *testing.F) {
	f.Add("a\n...\nb....c\n", "x")
	f.Add("....", "\xff ... ...")
	f.Fuzz(func(t *testing.T, out, other string) {
		// A document that shows the very output is right, and so is one that shows only dots.
		want := trimEnd(strings.Split(out, "\n"))
		if err := compare(want, 1, out); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		if err := compare([]string{"...", "..."}, 1, out); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		_ = compare(want, 1, other)
	})
}
