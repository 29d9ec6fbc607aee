package ctl

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
)

// parsed are resources by kind and name.
func parsed(t *testing.T, names ...string) []api.Resource {
	t.Helper()
	texts := map[string]string{
		"Namespace":           "{apiVersion: v1, kind: Namespace, metadata: {name: %s}}",
		"GlobalNetworkPolicy": "{apiVersion: projectcalico.org/v3, kind: GlobalNetworkPolicy, metadata: {name: %s}, spec: {}}",
		"IPPool":              "{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: %s}, spec: {cidr: 10.0.0.0/16}}",
	}
	var all []api.Resource
	for _, n := range names {
		kind, name, _ := strings.Cut(n, " ")
		one, err := manifest.Parse(fmt.Appendf(nil, texts[kind], name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, one...)
	}
	return all
}

func TestMerge(t *testing.T) {
	for _, c := range []struct {
		all, change []string
		remove      bool
		want        []string
		err         string
	}{
		{change: []string{"Namespace a"}, want: []string{"Namespace a"}},
		{all: []string{"Namespace a", "Namespace b"}, change: []string{"Namespace b", "GlobalNetworkPolicy b"}, want: []string{"GlobalNetworkPolicy b", "Namespace a", "Namespace b"}},
		{all: []string{"Namespace a", "Namespace b"}, change: []string{"Namespace b"}, remove: true, want: []string{"Namespace a"}},
		{all: []string{"Namespace a"}, change: []string{"Namespace b"}, remove: true, err: "Namespace b: there is none in force"},
		{all: []string{"Namespace a"}, change: []string{"Namespace a", "IPPool p"}, err: "IPPool p: it is not about policy"},
	} {
		got, err := merge(parsed(t, c.all...), parsed(t, c.change...), c.remove)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q and %q: error %v, want %s", c.all, c.change, err, c.err)
			}
			continue
		}
		var names []string
		for _, r := range got {
			names = append(names, r.String())
		}
		slices.Sort(names)
		if err != nil || !slices.Equal(names, c.want) {
			t.Errorf("%q and %q: %q, %v; want %q", c.all, c.change, names, err, c.want)
		}
	}
}

func TestOnlyIn(t *testing.T) {
	a, b, both := errors.New("a"), errors.New("b"), errors.Join(errors.New("a"), errors.New("b"))
	for _, c := range []struct {
		err, other error
		want       string
	}{{nil, nil, ""}, {nil, a, ""}, {a, nil, "a"}, {a, a, ""}, {both, a, "b"}, {both, both, ""}, {a, b, "a"}} {
		text := ""
		if err := onlyIn(c.err, c.other); err != nil {
			text = err.Error()
		}
		if text != c.want {
			t.Errorf("only in %v, not in %v: %q, want %q", c.err, c.other, text, c.want)
		}
	}
}
