package ctl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/caracal-net/caracal/cni"
)

// finding is something that is wrong, or looks so, at one place of a configuration.
type finding struct {
	Severity string `json:"severity"` // error, warning
	Line     int    `json:"line"`     // from 1
	Column   int    `json:"column"`   // from 1, bytes
	Where    string `json:"where,omitempty"`
	Message  string `json:"message"`
}

// verdict is what is to be said of a configuration.
type verdict struct {
	Valid      bool      `json:"valid"`
	Kind       string    `json:"kind,omitempty"` // list, single
	Name       string    `json:"name,omitempty"`
	CNIVersion string    `json:"cniVersion,omitempty"`
	Plugins    []string  `json:"plugins"`
	Findings   []finding `json:"findings"`
}

// Keys that the CNI specification 1.1.0 (section 1) and its CONVENTIONS.md give a meaning.
var (
	listKeys     = []string{"cniVersion", "cniVersions", "name", "disableCheck", "disableGC", "loadOnlyInlinedPlugins", "plugins", "args"}
	pluginKeys   = []string{"cniVersion", "name", "type", "ipam", "dns", "ipMasq", "capabilities", "args", "runtimeConfig", "prevResult"}
	capabilities = []string{
		"portMappings", "ipRanges", "bandwidth", "dns", "ips", "mac", "infinibandGUID", "deviceID", "aliases", "cgroupPath",
		"io.kubernetes.cri.pod-annotations",
	}
	ownTypes  = []string{"caracal", "calico"}
	ownIPAMs  = []string{"caracal-ipam", "calico-ipam"}
	inMessage = regexp.MustCompile(` \(line (\d+), column (\d+)\)$`)
)

// validate checks a configuration: JSON, structure, then each plugin's entry.
func validate(data []byte) verdict {
	c := &conflist{data: data}
	c.Plugins, c.Findings = []string{}, []finding{}
	c.check()
	c.Valid = !c.failed()
	slices.SortStableFunc(c.Findings, func(a, b finding) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return c.verdict
}

// conflist is one validation at work.
type conflist struct {
	verdict
	data []byte
	at   map[string]int64 // path of a key or element -> offset of it
}

func (c *conflist) failed() bool {
	return slices.ContainsFunc(c.Findings, func(f finding) bool { return f.Severity == "error" })
}

func (c *conflist) add(severity, where string, offset int64, format string, args ...any) {
	offset = min(max(offset, 0), int64(len(c.data)))
	before := c.data[:offset]
	f := finding{severity, bytes.Count(before, []byte("\n")) + 1, len(before) - bytes.LastIndexByte(before, '\n'), where, fmt.Sprintf(format, args...)}
	c.Findings = append(c.Findings, f)
}

func (c *conflist) error(where, format string, args ...any) {
	c.add("error", where, c.offset(where), format, args...)
}

func (c *conflist) warning(where, format string, args ...any) {
	c.add("warning", where, c.offset(where), format, args...)
}

// offset is where a path is, or the nearest one above it.
func (c *conflist) offset(path string) int64 {
	for {
		if o, ok := c.at[path]; ok || path == "" {
			return o
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
}

func (c *conflist) check() {
	var root map[string]json.RawMessage
	if !c.decode(&root) {
		return
	}
	c.locate()
	c.name(root)
	c.versions(root)
	switch {
	case root["plugins"] != nil:
		c.Kind = "list"
		c.unknown("", root, listKeys, "of a configuration list")
		c.list(root)
	case root["type"] != nil:
		c.Kind = "single"
		c.plugin("", c.data, root)
	default:
		c.error("", "neither a list (no key \"plugins\") nor a single configuration (no key \"type\")")
	}
	if c.Kind == "list" && !c.failed() { // whatever else libcni minds
		if _, err := libcni.NetworkConfFromBytes(c.data); err != nil {
			c.error("", "%v", err)
		}
	}
}

// decode reads the outermost object, or says where the JSON is wrong.
func (c *conflist) decode(root *map[string]json.RawMessage) bool {
	if len(bytes.TrimSpace(c.data)) == 0 {
		c.add("error", "", 0, "no configuration: nothing but white space")
		return false
	}
	err := json.Unmarshal(c.data, root)
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		at := syntax.Offset // the bytes read, the wrong one among them
		if at < int64(len(c.data)) || !strings.HasPrefix(syntax.Error(), "unexpected end") {
			at--
		}
		c.add("error", "", at, "not JSON: %v", syntax)
	case err != nil || *root == nil:
		c.add("error", "", 0, "a configuration is a JSON object")
	default:
		return true
	}
	return false
}

// locate notes where every key and element is, and keys that come twice.
func (c *conflist) locate() {
	c.at = map[string]int64{"": 0}
	d := json.NewDecoder(bytes.NewReader(c.data))
	d.UseNumber()
	c.walk(d, "", 0)
}

// deepest is how deep places are noted; what lies deeper counts as where its parent is.
const deepest = 8

// walk reads one value. The data was decoded before: it is JSON, and not nested too deeply for a recursion.
func (c *conflist) walk(d *json.Decoder, path string, depth int) {
	t, err := d.Token()
	if err != nil {
		return
	}
	if depth > deepest {
		for open := nesting(t); open > 0; open += nesting(t) {
			if t, err = d.Token(); err != nil {
				return
			}
		}
		return
	}
	switch t {
	case json.Delim('{'):
		seen := make(map[string]bool)
		for d.More() {
			t, err := d.Token()
			key, ok := t.(string)
			if err != nil || !ok {
				return
			}
			child := key
			if path != "" {
				child = path + "." + key
			}
			at := c.begin(d.InputOffset(), key)
			if seen[key] {
				c.add("warning", child, at, "the key comes twice; the last one counts")
			}
			seen[key] = true
			c.at[child] = at
			c.walk(d, child, depth+1)
		}
		_, _ = d.Token() // the bracket that closes it
	case json.Delim('['):
		for i := 0; d.More(); i++ {
			child := path + "[" + strconv.Itoa(i) + "]"
			c.at[child] = c.skip(d.InputOffset())
			c.walk(d, child, depth+1)
		}
		_, _ = d.Token() // the bracket that closes it
	}
}

// nesting is by how much a token changes the depth.
func nesting(t json.Token) int {
	switch t {
	case json.Delim('{'), json.Delim('['):
		return 1
	case json.Delim('}'), json.Delim(']'):
		return -1
	}
	return 0
}

// begin is where the key that ends at an offset begins.
func (c *conflist) begin(end int64, key string) int64 {
	if quoted := int64(len(key)) + 2; end >= quoted && c.data[end-quoted] == '"' {
		return end - quoted
	}
	return end // written with escapes
}

// skip is the first offset of the value behind white space and a comma.
func (c *conflist) skip(offset int64) int64 {
	for offset < int64(len(c.data)) && strings.IndexByte(" \t\r\n,", c.data[offset]) >= 0 {
		offset++
	}
	return offset
}

func (c *conflist) name(root map[string]json.RawMessage) {
	raw, ok := root["name"]
	if !ok {
		c.error("", "no key \"name\": a network needs one")
		return
	}
	if json.Unmarshal(raw, &c.Name) != nil {
		c.error("name", "not a string")
		return
	}
	if err := utils.ValidateNetworkName(c.Name); err != nil {
		c.error("name", "%q: it must begin with a letter or digit and hold only letters, digits, '_', '.' and '-'", c.Name)
	}
}

func (c *conflist) versions(root map[string]json.RawMessage) {
	supported := cni.Versions.SupportedVersions()
	raw, ok := root["cniVersion"]
	switch {
	case !ok && root["cniVersions"] == nil:
		c.CNIVersion = "0.1.0"
		c.warning("", "no key \"cniVersion\": version 0.1.0 is meant then")
	case !ok:
	case json.Unmarshal(raw, &c.CNIVersion) != nil:
		c.error("cniVersion", "not a string")
	case !slices.Contains(supported, c.CNIVersion):
		c.error("cniVersion", "%q is none of %s", c.CNIVersion, strings.Join(supported, ", "))
	}
	raw, ok = root["cniVersions"]
	if !ok {
		return
	}
	var all []string
	if json.Unmarshal(raw, &all) != nil {
		c.error("cniVersions", "not a list of strings")
		return
	}
	known := slices.DeleteFunc(slices.Clone(all), func(v string) bool { return !slices.Contains(supported, v) })
	if len(known) == 0 {
		c.error("cniVersions", "none of %s is in it", strings.Join(supported, ", "))
		return
	}
	for _, v := range known { // the newest that both sides know is used
		if slices.Index(supported, v) > slices.Index(supported, c.CNIVersion) {
			c.CNIVersion = v
		}
	}
}

func (c *conflist) list(root map[string]json.RawMessage) {
	for _, key := range []string{"disableCheck", "disableGC", "loadOnlyInlinedPlugins"} {
		if raw, ok := root[key]; ok && !slices.Contains([]string{"true", "false"}, strings.ToLower(strings.Trim(string(raw), `"`))) {
			c.error(key, "neither true nor false")
		}
	}
	var plugins []json.RawMessage
	if err := json.Unmarshal(root["plugins"], &plugins); err != nil {
		c.error("plugins", "not a list")
		return
	}
	if len(plugins) == 0 {
		c.error("plugins", "no plugin in the list")
	}
	entries := make([]map[string]json.RawMessage, len(plugins))
	for i, raw := range plugins {
		where := fmt.Sprintf("plugins[%d]", i)
		if json.Unmarshal(raw, &entries[i]) != nil || entries[i] == nil {
			c.error(where, "not an object")
			continue
		}
		c.plugin(where, raw, entries[i])
	}
	c.chain(entries)
}

// chain looks at how plugins work together.
func (c *conflist) chain(entries []map[string]json.RawMessage) {
	own := -1
	for i, e := range entries {
		kind := text(e["type"])
		switch {
		case slices.Contains(ownTypes, kind) && own >= 0:
			c.error(fmt.Sprintf("plugins[%d].type", i), "a second %s in one list: both would make the same interface", kind)
		case slices.Contains(ownTypes, kind):
			own = i
		case kind == "bandwidth" && own >= 0 && !declares(entries[own], "bandwidth") && !strings.Contains(string(entries[own]["shaped"]), "true"):
			c.warning(fmt.Sprintf("plugins[%d]", own), "bandwidth follows: declare \"capabilities\": {\"bandwidth\": true} here too (or \"shaped\": true), otherwise shaped pods' packets pass their queues by")
		}
	}
}

func declares(entry map[string]json.RawMessage, capability string) bool {
	var caps map[string]bool
	return json.Unmarshal(entry["capabilities"], &caps) == nil && caps[capability]
}

// plugin checks one plugin's entry; path is "" for a single configuration.
func (c *conflist) plugin(path string, raw json.RawMessage, entry map[string]json.RawMessage) {
	at := func(key string) string {
		if path == "" {
			return key
		}
		return path + "." + key
	}
	kind := text(entry["type"])
	if kind == "" || strings.ContainsAny(kind, "/\x00") {
		c.error(at("type"), "a plugin's entry needs \"type\", the name of its program")
		return
	}
	c.Plugins = append(c.Plugins, kind)
	c.capabilities(at("capabilities"), entry["capabilities"])
	var ipam map[string]json.RawMessage
	if raw, ok := entry["ipam"]; ok && json.Unmarshal(raw, &ipam) != nil {
		c.error(at("ipam"), "not an object")
		return
	}
	own, ownIPAM := slices.Contains(ownTypes, kind), slices.Contains(ownIPAMs, text(ipam["type"]))
	if own {
		c.unknown(path, entry, append(fields(reflect.TypeFor[cni.Config]()), pluginKeys...), "that "+kind+" uses")
		ownIPAM = ownIPAM || text(ipam["type"]) == ""
	}
	if ownIPAM {
		c.unknown(at("ipam"), ipam, fields(reflect.TypeFor[cni.IPAMConfig]()), "that caracal-ipam uses")
	}
	if own || ownIPAM {
		c.parse(path, raw, len(entry) == 0)
	}
}

func (c *conflist) capabilities(path string, raw json.RawMessage) {
	if raw == nil {
		return
	}
	var caps map[string]json.RawMessage
	if json.Unmarshal(raw, &caps) != nil {
		c.error(path, "not an object of capabilities and true or false")
		return
	}
	for _, name := range sortedKeys(caps) {
		var on bool
		if json.Unmarshal(caps[name], &on) != nil {
			c.error(path+"."+name, "neither true nor false")
		}
		if !slices.Contains(capabilities, name) {
			c.warning(path+"."+name, "no runtime is known to offer this capability; known are %s", strings.Join(capabilities, ", "))
		}
	}
}

// parse lets the plugin read its entry, with the network's name and version put in as libcni does, at the end: so lines
// and columns stay those of the whole.
func (c *conflist) parse(path string, raw json.RawMessage, empty bool) {
	name, version := c.Name, c.CNIVersion // of which the list's own checks have told when they are wrong
	if utils.ValidateNetworkName(name) != nil {
		name = "unnamed"
	}
	if all := cni.Versions.SupportedVersions(); !slices.Contains(all, version) {
		version = all[len(all)-1]
	}
	put := fmt.Sprintf(`"name":%q,"cniVersion":%q}`, name, version)
	if !empty {
		put = "," + put
	}
	entry := bytes.TrimSpace(raw)
	padded := append(blank(c.data[:c.skip(c.offset(path))]), entry[:len(entry)-1]...)
	_, err := cni.ParseConfig(append(padded, put...))
	if err == nil {
		return
	}
	message, where := err.Error(), path
	if m := inMessage.FindStringSubmatch(message); m != nil {
		line, _ := strconv.Atoi(m[1])
		column, _ := strconv.Atoi(m[2])
		c.Findings = append(c.Findings, finding{"error", line, column, path, strings.TrimSuffix(message, m[0])})
		return
	}
	// The plugin names the key first: "mtu 7: ...", "ipam.ipv4_pools: ...".
	word, rest, _ := strings.Cut(message, " ")
	key := strings.TrimSuffix(word, ":")
	if path != "" {
		key = path + "." + key
	}
	if _, ok := c.at[key]; ok {
		where = key
		if strings.HasSuffix(word, ":") {
			message = rest
		}
	}
	c.error(where, "%s", message)
}

// blank is data with everything but line ends made spaces.
func blank(data []byte) []byte {
	out := bytes.Repeat([]byte(" "), len(data))
	for i, b := range data {
		if b == '\n' {
			out[i] = b
		}
	}
	return out
}

// unknown warns of keys that mean nothing here.
func (c *conflist) unknown(path string, object map[string]json.RawMessage, known []string, what string) {
	for _, key := range sortedKeys(object) {
		if slices.ContainsFunc(known, func(k string) bool { return strings.EqualFold(k, key) }) {
			continue
		}
		where := key
		if path != "" {
			where = path + "." + key
		}
		c.warning(where, "not a key %s; it has no effect", what)
	}
}

// fields are the JSON keys of a struct.
func fields(t reflect.Type) []string {
	var keys []string
	for i := range t.NumField() {
		if tag, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); tag != "" && tag != "-" {
			keys = append(keys, tag)
		}
	}
	return keys
}

func sortedKeys(m map[string]json.RawMessage) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// text is a JSON string's value, "" for anything else.
func text(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}
