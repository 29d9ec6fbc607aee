package ctl

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// Whatever a variable holds, a template whose placeholders are in quotes stays JSON, and says just that.
func FuzzFill(f *testing.F) {
	f.Add("n1", "info")
	f.Add(`"`, `\`)
	f.Add("__CNI_MTU__", "a\nb\x00")
	f.Add("\xff", "<&>")
	f.Fuzz(func(t *testing.T, node, level string) {
		if strings.ContainsRune(node+level, 0) {
			t.Skip("no variable can hold that")
		}
		for name, value := range map[string]string{"KUBERNETES_NODE_NAME": node, "LOG_LEVEL": level} {
			if err := os.Setenv(name, value); err != nil {
				t.Skip(err)
			}
		}
		o := &installOptions{mtu: 1450}
		text, err := o.fill([]byte(`{"nodename": "__KUBERNETES_NODE_NAME__", "log_level": "__LOG_LEVEL__", "mtu": __CNI_MTU__}`))
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			NodeName string `json:"nodename"`
			LogLevel string `json:"log_level"`
			MTU      int    `json:"mtu"`
		}
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		same := func(set, got string) bool { return set == "" || string([]rune(set)) == got } // what is not UTF-8 is replaced
		if !same(node, got.NodeName) || !same(level, got.LogLevel) || got.MTU != 1450 {
			t.Errorf("%q, %q: %s", node, level, text)
		}
	})
}

// What calls itself a network is never more than refused.
func FuzzPrograms(f *testing.F) {
	f.Add([]byte(`{"plugins": [{"type": "caracal", "ipam": {"type": "x"}}]}`))
	f.Add([]byte(`{"type": "calico", "plugins": 7}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, name := range programs(text) {
			if name == "" {
				t.Error("a program without a name")
			}
		}
	})
}
