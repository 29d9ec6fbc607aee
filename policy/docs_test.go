package policy

import (
	"os"
	"strings"
	"testing"
)

// Every example of docs/policy.md is valid, and all of them together are a model.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for i, part := range strings.Split(string(page), "```") {
		if example, ok := strings.CutPrefix(part, "yaml\n"); ok && i%2 == 1 {
			if _, err := FromResources(resources(t, example)); err != nil {
				t.Errorf("%s: %v", example, err)
			}
			all = append(all, example)
		}
	}
	m, err := FromResources(resources(t, strings.Join(all, "---\n")))
	if err != nil || len(all) < 5 || len(m.Tiers) != 4 {
		t.Errorf("%d examples, %d tiers: %v", len(all), len(m.Tiers), err)
	}
}
