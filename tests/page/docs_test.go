package page

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// notPages are the documents that tell how things are, and may show commands that nobody runs as they stand. Every other one is a
// page to follow, command by command.
var notPages = []string{"ARCHITECTURE.md", "cluster.md", "conflist.md", "doctor.md", "logs.md", "maps.md", "networkpolicy.md", "podbench.md", "policy.md"}

// TestDocs: every page to follow is run by a test, has no commands that are not, and is in README's index.
func TestDocs(t *testing.T) {
	run := runByTests(t, "..")
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	docs, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(docs) < len(notPages) {
		t.Fatalf("documents: %v, %v", docs, err)
	}
	for _, path := range docs {
		name := filepath.Base(path)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		commands, err := Parse(string(text))
		if slices.Contains(notPages, name) {
			if err != nil {
				continue
			}
		} else if err != nil {
			t.Errorf("docs/%s: %v", name, err)
		} else if len(commands) == 0 {
			t.Errorf("docs/%s: no command in it; a document without any is for this test's notPages", name)
		}
		for _, c := range commands {
			if parts, is := run[name]; !is || len(parts) > 0 && !slices.Contains(parts, c.Part) {
				t.Errorf("docs/%s:%d: no test runs the console blocks here (page.Run)", name, c.Line)
				break
			}
		}
		if slices.Contains(notPages, name) {
			continue
		}
		if !strings.Contains(string(readme), "(docs/"+name+")") {
			t.Errorf("docs/%s: README.md has no link to it", name)
		}
	}
}

// runByTests are the documents that tests below dir give to Run, by name, and the parts of them; none: all of it.
func runByTests(t *testing.T, dir string) map[string][]string {
	t.Helper()
	run := make(map[string][]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return fmt.Errorf("read tests: %w", err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, is := n.(*ast.CallExpr)
			if !is || len(call.Args) < 3 {
				return true
			}
			f, is := call.Fun.(*ast.SelectorExpr)
			if !is || f.Sel.Name != "Run" || fmt.Sprint(f.X) != "page" {
				return true
			}
			if doc := literal(call.Args[1]); doc != "" && filepath.Clean(filepath.Join(filepath.Dir(path), doc)) == filepath.Join("../../docs", filepath.Base(doc)) {
				name := filepath.Base(doc)
				parts, before := run[name]
				switch whole := before && len(parts) == 0; {
				case whole:
				case len(call.Args) == 3:
					run[name] = nil
				default:
					for _, arg := range call.Args[3:] {
						parts = append(parts, literal(arg))
					}
					run[name] = parts
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return run
}

// literal is a string that stands in a program, "" for anything else.
func literal(e ast.Expr) string {
	lit, is := e.(*ast.BasicLit)
	if !is {
		return ""
	}
	text, _ := strconv.Unquote(lit.Value)
	return text
}
