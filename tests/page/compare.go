package page

import (
	"fmt"
	"regexp"
	"strings"
)

// anyLines is the line that stands for any number of lines.
const anyLines = "..."

// compare holds output against what the document shows, whose first line is that of the document with number first.
func compare(want []string, first int, out string) error {
	got := trimEnd(strings.Split(out, "\n"))
	at := map[int]bool{0: true} // where in got we may be
	matched := 0                // lines of got, at most, by the last of want that is no anyLines
	for i, w := range want {
		next := make(map[int]bool)
		skip := false
		for p := 0; p <= len(got); p++ {
			switch {
			case strings.TrimSpace(w) == anyLines:
				skip = skip || at[p]
				next[p] = skip
			case at[p] && p < len(got) && matches(w, got[p]):
				next[p+1] = true
				matched = p + 1
			}
		}
		if !some(next) {
			saw := "got the output's end"
			switch {
			case i > 0 && strings.TrimSpace(want[i-1]) == anyLines:
				saw = "which no line behind is"
			case matched < len(got):
				saw = fmt.Sprintf("got %q", got[matched])
			}
			return fmt.Errorf("line %d: want %q, %s", first+i, w, saw)
		}
		at = next
	}
	if !at[len(got)] {
		return fmt.Errorf("line %d: more output follows than the document shows: %q", first+len(want)-1, got[matched])
	}
	return nil
}

func some(set map[int]bool) bool {
	for _, is := range set {
		if is {
			return true
		}
	}
	return false
}

// dots are an ellipsis and, where there are more than three, what is before it.
var dots = regexp.MustCompile(`\.\.\.+`)

// matches tells whether line is what want says, in which "..." stands for anything.
func matches(want, line string) bool {
	want, line = strings.Join(strings.Fields(want), " "), strings.Join(strings.Fields(line), " ")
	var parts []string
	from := 0
	for _, d := range dots.FindAllStringIndex(want, -1) {
		parts = append(parts, want[from:d[1]-len("...")])
		from = d[1]
	}
	if parts = append(parts, want[from:]); len(parts) == 1 {
		return want == line
	}
	line, ok := strings.CutPrefix(line, parts[0])
	last := parts[len(parts)-1]
	if !ok || !strings.HasSuffix(line, last) {
		return false
	}
	line = strings.TrimSuffix(line, last)
	for _, p := range parts[1 : len(parts)-1] {
		var found bool
		if _, line, found = strings.Cut(line, p); !found {
			return false
		}
	}
	return true
}
