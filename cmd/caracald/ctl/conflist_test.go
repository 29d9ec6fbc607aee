package ctl

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/caracal-net/caracal/cni"
)

const wellFormed = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "caracal", "ipam": {"type": "caracal-ipam", "ipv4_pools": ["10.244.0.0/16"]}}]}`

func TestValidateFindsPlaces(t *testing.T) {
	for _, c := range []struct {
		name, data   string
		line, column int
		where, part  string
	}{
		{"syntax", "{\n  \"name\": pods\n}", 2, 11, "", "invalid character 'p'"},
		{"cut off", "{\"name\":\n", 2, 1, "", "unexpected end of JSON"},
		{"not an object", "[]", 1, 1, "", "a configuration is a JSON object"},
		{"null", "null", 1, 1, "", "a configuration is a JSON object"},
		{"empty list", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\n\"plugins\":[]}", 2, 1, "plugins", "no plugin in the list"},
		{"plugins not a list", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\n \"plugins\":{}}", 2, 2, "plugins", "not a list"},
		{"plugin not an object", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[\n 7]}", 2, 2, "plugins[0]", "not an object"},
		{"no plugins", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\"}", 1, 1, "", "neither a list"},
		{"two of ours", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"caracal\"},\n{\"type\":\"calico\"}]}", 2, 2, "plugins[1].type", "a second calico"},
		{"capability", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"type\":\"x\",\n\"capabilities\":{\"ips\":1}}", 2, 17, "capabilities.ips", "neither true nor false"},
		{"mtu", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\n\"type\":\"caracal\",\"mtu\":7}", 2, 18, "mtu", "not between 68 and 65535"},
		{"log level", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\n\"type\":\"caracal\",\"log_level\":\"loud\"}", 2, 18, "log_level", "none of debug"},
		{"policy", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\n\"type\":\"caracal\",\"policy\":{\"unknown\":\"open\"}}", 2, 28, "policy.unknown", "neither \"allow\" nor \"deny\""},
		{"policy's key", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\n\"type\":\"caracal\",\"policy\":{\"unkown\":\"deny\"}}", 2, 18, "policy", "no key \"unkown\""},
		{"gateway", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"type\":\"caracal\",\n\"ipam\":{\"gateway\":\"here\"}}", 2, 9, "ipam.gateway", "not an address"},
		{"route", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"type\":\"bridge\",\n\"ipam\":{\"type\":\"caracal-ipam\",\"routes\":[{\"dst\":\"all\"}]}}", 2, 31, "ipam.routes", "not a prefix"},
		{"pools overlap", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"type\":\"caracal\",\n\"ipam\":{\"ipv4_pools\":[\"10.0.0.0/8\",\"10.1.0.0/16\"]}}", 2, 1, "ipam", "overlaps"},
		{"type with a path", "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"type\":\"../x\"}", 1, 34, "type", "the name of its program"},
		{"no name", "{\"cniVersion\":\"1.0.0\",\"type\":\"caracal\"}", 1, 1, "", "no key \"name\""},
		{"versions", "{\"cniVersions\":[\"9.0.0\"],\"name\":\"n\",\"type\":\"x\"}", 1, 2, "cniVersions", "is in it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := validate([]byte(c.data))
			if v.Valid {
				t.Fatalf("valid: %+v", v)
			}
			if !slices.ContainsFunc(v.Findings, func(f finding) bool {
				return f.Severity == "error" && f.Line == c.line && f.Column == c.column && f.Where == c.where && strings.Contains(f.Message, c.part)
			}) {
				t.Errorf("findings %+v, want %d:%d %s: %s", v.Findings, c.line, c.column, c.where, c.part)
			}
		})
	}
}

func TestValidateTellsDuplicates(t *testing.T) {
	v := validate([]byte("{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\n\"name\":\"m\",\"type\":\"caracal\"}"))
	if !v.Valid || len(v.Findings) != 1 || v.Findings[0].Line != 2 || v.Name != "m" {
		t.Errorf("%+v", v)
	}
}

func TestValidateDeep(t *testing.T) {
	deep := strings.Repeat("[", 5000) + strings.Repeat("]", 5000)
	v := validate([]byte("{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"x\":" + deep + ",\n\"mtu\":7,\"type\":\"caracal\"}"))
	if !slices.ContainsFunc(v.Findings, func(f finding) bool { return f.Where == "mtu" && f.Line == 2 && f.Column == 1 }) {
		t.Errorf("%+v", v)
	}
}

// FuzzValidate: never a panic, every finding lies in the input, and what is valid is so for libcni and the plugin too.
func FuzzValidate(f *testing.F) {
	for _, seed := range []string{
		wellFormed, `{"name":"n","type":"caracal"}`, `{"name":"n","plugins":[{"type":"caracal","mtu":"x"},{}]}`, `{"a":{"a":[[{}]]}}`,
		`{"cniVersions":["1.1.0"],"name":"n","plugins":[{"type":"bridge","ipam":{"type":"caracal-ipam","ipv6_pools":["2001:db8::/64"]}}]}`,
		`[`, ``, `null`, "{\"\\u006eame\":\"n\",\n\"type\":\"caracal\"}", `{"name":"n","plugins":[{"type":"caracal","shaped":true} , {"type":"bandwidth"}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		v := validate(data)
		lines := bytes.Count(data, []byte("\n")) + 1
		for _, found := range v.Findings {
			if found.Line < 1 || found.Line > lines || found.Column < 1 || found.Column > len(data)+1 || found.Message == "" {
				t.Fatalf("finding %+v in %d lines, %d bytes", found, lines, len(data))
			}
		}
		if !v.Valid {
			return
		}
		if v.Kind != "list" {
			if _, err := libcni.NetworkPluginConfFromBytes(data); err != nil {
				t.Fatalf("valid, but not for libcni: %v", err)
			}
			return
		}
		list, err := libcni.NetworkConfFromBytes(data)
		if err != nil {
			t.Fatalf("valid, but not for libcni: %v", err)
		}
		for _, p := range list.Plugins {
			if p.Network.Type != "caracal" {
				continue
			}
			injected, err := libcni.InjectConf(p, map[string]any{"name": list.Name, "cniVersion": v.CNIVersion})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := cni.ParseConfig(injected.Bytes); err != nil {
				t.Fatalf("valid, but not for the plugin: %v in %s", err, injected.Bytes)
			}
		}
		if _, err := json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	})
}
