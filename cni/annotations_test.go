package cni

import (
	"strings"
	"testing"
)

func TestAnnotations(t *testing.T) {
	for text, bad := range map[string]string{`["a", "10.0.0.0/8"]`: "", `[]`: "", `a`: "not a JSON list", `{"a": 1}`: "not a JSON list", `[1]`: "not a JSON list", ``: "not a JSON list"} {
		only, err := AnnotatedPools(Annotations{annotationPools4: text})
		if bad == "" && (err != nil || len(only.V4) != strings.Count(text, `"`)/2 || only.V6 != nil) || bad != "" && (err == nil || !strings.Contains(err.Error(), bad)) {
			t.Errorf("%s: %v, %v", text, only, err)
		}
	}
	for _, u := range unsupported {
		err := Annotations{u.name: `["192.0.2.1"]`}.check()
		if err == nil || !strings.Contains(err.Error(), u.name) || asError(err).Code != codeConfig {
			t.Errorf("%s: %v", u.name, err)
		}
		if err := (Annotations{u.name: "[]"}).check(); err != nil {
			t.Errorf("none of %s: %v", u.name, err)
		}
	}
}

// FuzzAnnotatedPools: an annotation names pools, or is an error in one line.
func FuzzAnnotatedPools(f *testing.F) {
	for _, s := range []string{`["default-ipv4-ippool"]`, `[]`, `null`, `["\u0000"]`, "[\"a\nb\"]", `"a"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		only, err := AnnotatedPools(Annotations{annotationPools4: text, annotationPools6: text})
		if err != nil && strings.Contains(err.Error(), "\n") || err == nil && len(only.V4) != len(only.V6) {
			t.Fatalf("%q: %v, %v", text, only, err)
		}
	})
}
