// Package page runs the commands of a document, so that what a user is told to type is what was tried. They stand in blocks
// of their own, as they look in a terminal:
//
//	```console
//	h1# podman run -d --name web \
//	> --network caracal localhost/busybox
//	h1# caracalctl pods
//	CONTAINER     INTERFACE  ADDRESSES
//	...           eth0       10.244...
//	h2# ping -c 1 10.244.9.9 # exit 1
//	```
//
// A prompt is the name of a machine and "# ", or just "# " where there is one machine; "> " continues a command. What follows is
// its output, compared line by line: runs of blanks are equal, "..." in a line stands for anything, a line "..." for any number
// of lines. A command without output in the document may print what it likes. Its exit status must be 0, or what a comment
// "# exit N" at the end of its first or last line says.
package page

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// Shell runs a script by sh on one machine and returns what it wrote to standard output and standard error, together. The error
// of a script that ended with another status than 0 has an *exec.ExitError inside, or another error with ExitCode() int.
type Shell func(ctx context.Context, script string) (out string, err error)

// timeout is how long one command may take.
const timeout = 60 * time.Second

// Run runs all commands of the document at path in order, or those in the parts ("## title") that are named, and fails the test at the
// first that does not do as the document says. shells has the machines by the names in the prompts.
func Run(t testing.TB, path string, shells map[string]Shell, parts ...string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimLeft(path, "./")
	commands, err := Parse(string(text))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	for _, p := range parts {
		if !slices.ContainsFunc(commands, func(c Command) bool { return c.Part == p }) {
			t.Fatalf("%s: no ```console block below \"## %s\", so there is nothing to run", name, p)
		}
	}
	if len(commands) == 0 {
		t.Fatalf("%s: no ```console block, so there is nothing to run", name)
	}
	if len(parts) > 0 {
		commands = slices.DeleteFunc(commands, func(c Command) bool { return !slices.Contains(parts, c.Part) })
	}
	for _, c := range commands { // all of them before the first is run
		if _, err := c.shell(shells); err != nil {
			t.Fatalf("%s:%d: %v", name, c.Line, err)
		}
	}
	for _, c := range commands {
		shell, _ := c.shell(shells)
		begin := time.Now()
		out, err := c.run(t.Context(), shell)
		show := fmt.Sprintf("%s:%d: (%v) %s# %s\n%s", name, c.Line, time.Since(begin).Round(time.Millisecond), c.Machine,
			strings.ReplaceAll(c.Script, "\n", "\n> "), indented(out))
		if err != nil {
			t.Fatalf("%s\n%s: %v", show, name, err)
		}
		t.Log(show)
	}
}

// shell is the machine that the prompt names.
func (c *Command) shell(shells map[string]Shell) (Shell, error) {
	if s, ok := shells[c.Machine]; ok {
		return s, nil
	}
	var names []string
	for n, s := range shells {
		if names = append(names, n); c.Machine == "" && len(shells) == 1 {
			return s, nil
		}
	}
	slices.Sort(names)
	if c.Machine == "" {
		return nil, fmt.Errorf("prompt %q names no machine, and there are several: %s", "# ", strings.Join(names, ", "))
	}
	return nil, fmt.Errorf("prompt %q names no machine of this test; there is %s", c.Machine+"# ", strings.Join(names, ", "))
}

// run returns the command's output, and what is not as the document says.
func (c *Command) run(ctx context.Context, shell Shell) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out, err := shell(ctx, c.Script)
	var exit interface{ ExitCode() int }
	status := 0
	switch {
	case ctx.Err() != nil:
		return out, fmt.Errorf("line %d: not done after %v: %w", c.Line, timeout, ctx.Err())
	case errors.As(err, &exit):
		status = exit.ExitCode()
	case err != nil:
		return out, fmt.Errorf("line %d: run it: %w", c.Line, err)
	}
	if status != c.Exit {
		return out, fmt.Errorf("line %d: exit status %d, want %d", c.Line, status, c.Exit)
	}
	if len(c.Output) == 0 {
		return out, nil
	}
	return out, compare(c.Output, c.OutputLine, out)
}

func indented(s string) string {
	return "    " + strings.ReplaceAll(strings.TrimRight(s, " \n"), "\n", "\n    ")
}
