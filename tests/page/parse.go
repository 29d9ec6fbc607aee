package page

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Command is one command of a document and what the document says of it.
type Command struct {
	Line       int      // of the prompt, the first is 1
	Part       string   // title of the part ("## title") that it is in, "" before the first
	Machine    string   // in the prompt, "" if none is named
	Script     string   // for sh
	Exit       int      // status
	Output     []string // empty: the document shows none
	OutputLine int      // of the first line of Output
}

var (
	fence  = regexp.MustCompile("^( *)(```+|~~~+) *([^ `]*)[^`]*$")
	prompt = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9_.-]*)?# ( *\S.*)$`)
	exit   = regexp.MustCompile(`(?:^|\s)# exit (\d+)\s*$`)
	indent = regexp.MustCompile(`^(?: {4}|\t)\s*(?:[^-*+\s\d]|[-*+]\S|\d+[^.)\d])`) // not a deeper list
)

// notRun are the kinds of block with commands that nobody would run.
var notRun = map[string]bool{"sh": true, "bash": true, "shell": true, "zsh": true, "shell-session": true, "terminal": true}

// Parse returns the commands in the console blocks of a document in Markdown. A block in which commands would stand without being
// run (of another kind, or indented) is an error, and so is one that is not closed. An error begins with the line.
func Parse(text string) ([]Command, error) {
	var (
		all    []Command
		closer string // of the block that we are in
		margin int
		kind   string
		part   string
		opened int
		block  []string
	)
	blank := true
	for i, line := range strings.Split(text, "\n") {
		n, line := i+1, strings.TrimRight(line, " \t\r")
		m := fence.FindStringSubmatch(line)
		switch {
		case closer == "" && m != nil:
			margin, closer, kind, opened, block = len(m[1]), m[2], m[3], n, nil
			if notRun[kind] {
				return nil, fmt.Errorf("line %d: a %s block is not run: make it a console block, with prompts", n, kind)
			}
		case closer == "" && blank && indent.MatchString(line):
			return nil, fmt.Errorf("line %d: an indented block is not run: make it a console block if these are commands, else a block between ``` lines", n)
		case closer == "":
			blank = line == ""
			if title, ok := strings.CutPrefix(line, "## "); ok {
				part = title
			}
		case m != nil && m[3] == "" && strings.HasPrefix(m[2], closer):
			closer, blank = "", true
			if kind == "console" {
				commands, err := parseBlock(block, opened+1)
				if err != nil {
					return nil, err
				}
				for i := range commands {
					commands[i].Part = part
				}
				all = append(all, commands...)
			}
		default:
			if kind == "" && prompt.MatchString(line) {
				return nil, fmt.Errorf("line %d: a command outside a console block is not run", n)
			}
			cut := 0
			for cut < margin && strings.HasPrefix(line[cut:], " ") {
				cut++
			}
			block = append(block, line[cut:])
		}
	}
	if closer != "" {
		return nil, fmt.Errorf("line %d: the block that begins here has no end", opened)
	}
	return all, nil
}

// parseBlock reads one console block, whose first line is that of the document with number first.
func parseBlock(lines []string, first int) (all []Command, err error) {
	typing := false // lines may continue the command
	for i, line := range lines {
		n := first + i
		if m := prompt.FindStringSubmatch(line); m != nil {
			all, typing = append(all, Command{Line: n, Machine: m[1], Script: strings.TrimSpace(m[2])}), true
			continue
		}
		if len(all) == 0 {
			if line == "" {
				continue
			}
			return nil, fmt.Errorf("line %d: output before the first prompt (NAME# command, or # command)", n)
		}
		c := &all[len(all)-1]
		if more, ok := strings.CutPrefix(line, ">"); ok && typing && (more == "" || more[0] == ' ') {
			c.Script += "\n" + strings.TrimPrefix(more, " ")
			continue
		}
		if typing {
			typing, c.OutputLine = false, n
		}
		c.Output = append(c.Output, line)
	}
	for i := range all {
		c := &all[i]
		c.Output = trimEnd(c.Output)
		script := strings.Split(c.Script, "\n")
		m := exit.FindStringSubmatch(script[0])
		if m == nil {
			m = exit.FindStringSubmatch(script[len(script)-1])
		}
		if m == nil {
			continue
		}
		if c.Exit, err = strconv.Atoi(m[1]); err != nil || c.Exit > 255 {
			return nil, fmt.Errorf("line %d: exit status %s is not between 0 and 255", c.Line, m[1])
		}
	}
	return all, nil
}

// trimEnd leaves out empty lines at the end.
func trimEnd(lines []string) []string {
	for len(lines) > 0 && strings.TrimSpace(lines[len(lines)-1]) == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}
