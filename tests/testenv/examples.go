package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Examples parses every example in the help of a command and of those below it, and every line of README.md and docs/*.md that
// calls it, with its flags and arguments. Nothing is run. root makes the command anew for each.
func Examples(t *testing.T, root func() *cobra.Command) {
	t.Helper()
	parse := func(where, line string) int {
		t.Helper()
		calls := 0
		for _, call := range callsOf(line, root().Name()) {
			calls++
			c := root()
			found, rest, err := c.Find(call)
			if err == nil {
				err = found.ParseFlags(rest)
			}
			if err == nil && !found.Runnable() {
				err = fmt.Errorf("%s does nothing by itself", found.CommandPath())
			}
			if err == nil {
				err = found.ValidateArgs(found.Flags().Args())
			}
			if err == nil {
				err = found.ValidateRequiredFlags()
			}
			if err != nil {
				t.Errorf("%s: %s: %v", where, line, err)
			}
		}
		return calls
	}
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for line := range strings.Lines(c.Example) {
			if line = strings.TrimSpace(line); parse(c.CommandPath(), line) == 0 {
				t.Errorf("%s: the example %q does not call it", c.CommandPath(), line)
			}
		}
		for _, below := range c.Commands() {
			walk(below)
		}
	}
	walk(root())

	dir, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	docs, err := filepath.Glob(filepath.Join(dir, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(docs, filepath.Join(dir, "README.md")) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if line, indented := strings.CutPrefix(line, "    "); indented { // a block of code
				parse(filepath.Base(path), strings.TrimPrefix(strings.TrimSpace(line), "# "))
			}
		}
	}
}

// word is an operator of the shell, a comment, or what stands between blanks with its quotes.
var word = regexp.MustCompile(`&&|<<?|>>?|[|;]|#.*|(?:'[^']*'|"[^"]*"|[^\s|;<>'"])+`)

// callsOf are the arguments of each call of a program in a line of shell.
func callsOf(line, program string) (all [][]string) {
	var call []string
	end := func() {
		for len(call) > 0 && strings.Contains(call[0], "=") { // an assignment before it
			call = call[1:]
		}
		if len(call) > 0 && filepath.Base(call[0]) == program {
			all = append(all, call[1:])
		}
		call = nil
	}
	words := word.FindAllString(line, -1)
	for i := 0; i < len(words); i++ {
		switch w := words[i]; {
		case w == "|" || w == ";" || w == "&&":
			end()
		case w[0] == '<' || w[0] == '>':
			i++ // a file, or where the text ends
		case strings.HasPrefix(w, "#"):
		default:
			call = append(call, strings.NewReplacer("'", "", `"`, "").Replace(w))
		}
	}
	end()
	return all
}
