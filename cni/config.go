package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// Where a node's state lies unless the configuration says otherwise.
const (
	DefaultStateDir = "/var/lib/caracal"
	DefaultBPFFSDir = "/sys/fs/bpf/caracal"
)

// MaxConfig is the most that is read from stdin, bytes.
const MaxConfig = 1 << 20

// Versions are the specification's versions that are spoken, oldest first.
var Versions = version.PluginSupports("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

// Config is the plugin's network configuration: CNI's own keys, Calico's, and ours. Unknown keys are kept out of the way.
type Config struct {
	CNIVersion string     `json:"cniVersion"`
	Name       string     `json:"name"`
	Type       string     `json:"type"`
	IPAM       IPAMConfig `json:"ipam"`
	DNS        types.DNS  `json:"dns"`

	MTU             int             `json:"mtu"`      // bytes; 0: that of the interface with the default route
	IPMasq          truth           `json:"ipMasq"`   // true: what leaves all pools gets the host's address
	NodeName        string          `json:"nodename"` // Calico's
	LogLevel        string          `json:"log_level"`
	LogFormat       string          `json:"log_format"` // text or json
	LogFilePath     string          `json:"log_file_path"`
	LogFileMaxSize  int             `json:"log_file_max_size"` // MB
	LogFileMaxAge   int             `json:"log_file_max_age"`  // days
	LogFileMaxCount int             `json:"log_file_max_count"`
	StateDir        string          `json:"state_dir"`
	BPFFSDir        string          `json:"bpffs_dir"`
	BootIDFile      string          `json:"boot_id_file"`
	AgentSocket     string          `json:"agent_socket"`
	Shaped          bool            `json:"shaped"` // true: a later plugin shapes the bandwidth without the capability
	MaxFlows        uint32          `json:"max_flows"`
	Args            Args            `json:"args"`
	Labels          labels          `json:"labels"` // Calico's, beside args.cni.labels
	Policy          PolicyConfig    `json:"policy"`
	RuntimeConfig   RuntimeConfig   `json:"runtimeConfig"`
	PrevResult      json.RawMessage `json:"prevResult"`

	ValidAttachments       *[]Attachment `json:"cni.dev/valid-attachments"`
	LegacyValidAttachments *[]Attachment `json:"cni.dev/attachments"`

	raw  []byte
	prev *types100.Result
}

// Attachment is one that a GC call says is still valid.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// IPAMConfig is the ipam object. Type caracal-ipam, calico-ipam or none is our own; any other is a plugin to call.
type IPAMConfig struct {
	Type         string      `json:"type"`
	Cluster      bool        `json:"cluster"` // true: the cluster's pools, which this node's agent records
	IPv4Pools    []string    `json:"ipv4_pools"`
	IPv6Pools    []string    `json:"ipv6_pools"`
	AssignIPv4   *truth      `json:"assign_ipv4"` // absent: when there is such a pool
	AssignIPv6   *truth      `json:"assign_ipv6"`
	BlockSize4   int         `json:"ipv4_block_size"` // prefix length; 0: 26
	BlockSize6   int         `json:"ipv6_block_size"` // prefix length; 0: 122
	Reservations []string    `json:"reservations"`    // addresses or prefixes never given out
	Gateway      string      `json:"gateway"`         // as IPAM of another main plugin: the gateway in the result
	Routes       []routeConf `json:"routes"`          // likewise
}

type routeConf struct {
	Dst string `json:"dst"`
	GW  string `json:"gw"`
}

// Args is the args object: what a user adds for one attachment (CNI CONVENTIONS.md).
type Args struct {
	CNI struct {
		IPs    []string `json:"ips"`
		MAC    string   `json:"mac"`
		Labels labels   `json:"labels"`
	} `json:"cni"`
	Labels labels `json:"labels"`
}

// RuntimeConfig is what a runtime fills in for the capabilities that the configuration declares.
type RuntimeConfig struct {
	IPs       []string `json:"ips"`
	MAC       string   `json:"mac"`
	Bandwidth *struct {
		IngressRate uint64 `json:"ingressRate"` // bits per second
		EgressRate  uint64 `json:"egressRate"`
	} `json:"bandwidth"`
	DNS *struct { // runtimes differ in case; encoding/json matches both
		Servers  []string `json:"servers"`
		Searches []string `json:"searches"`
		Options  []string `json:"options"`
	} `json:"dns"`
	PortMappings   []portMapping `json:"portMappings"`
	PodAnnotations Annotations   `json:"io.kubernetes.cri.pod-annotations"` // of containerd's and CRI-O's CRI; nil: it sends none
}

// labels are key-value pairs: as an object, or as CNI's convention has them, a list of {key, value}.
type labels map[string]string

func (l *labels) UnmarshalJSON(b []byte) error {
	var object map[string]string
	if json.Unmarshal(b, &object) == nil {
		*l = object
		return nil
	}
	var list []struct{ Key, Value string }
	if err := json.Unmarshal(b, &list); err != nil {
		return errors.New("labels are neither an object nor a list of key and value")
	}
	*l = make(labels)
	for _, e := range list {
		(*l)[e.Key] = e.Value
	}
	return nil
}

// truth is a truth value as Calico writes it: "true", or true.
type truth bool

func (f *truth) UnmarshalJSON(b []byte) error {
	switch strings.ToLower(strings.Trim(string(b), `"`)) {
	case "true":
		*f = true
	case "false", "null":
		*f = false
	default:
		return fmt.Errorf("%s is neither \"true\" nor \"false\"", b)
	}
	return nil
}

// ParseConfig reads and validates a network configuration. The error is an *Error.
func ParseConfig(data []byte) (*Config, error) {
	c, err := parseForDel(data)
	if err != nil {
		return nil, err
	}
	if c.MTU != 0 && (c.MTU < 68 || c.MTU > 65535) {
		return nil, fail(codeConfig, "mtu %d: not between 68 and 65535", c.MTU)
	}
	if strings.Contains(filepath.Base(c.BPFFSDir), ".") {
		return nil, fail(codeConfig, "bpffs_dir %q: a bpf file system takes no names with a '.'", c.BPFFSDir)
	}
	if _, err := c.logging(func(string) string { return "" }); err != nil {
		return nil, err
	}
	if err := c.Policy.check(); err != nil {
		return nil, err
	}
	if c.ownIPAM() {
		cfg, err := c.pools()
		if err != nil {
			return nil, err
		}
		if _, err := c.gateway(); err != nil {
			return nil, err
		}
		if _, err := c.routes(); err != nil {
			return nil, err
		}
		if err := cfg.Validate(); err != nil {
			return nil, fail(codeConfig, "ipam: %s", err)
		}
	}
	return c, c.parsePrev()
}

// parseForDel reads a network configuration and validates no more of it than DEL needs, which goes by the record: what
// was attached must be removable also when the configuration has been spoilt since.
func parseForDel(data []byte) (*Config, error) {
	c := &Config{raw: data}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, decodeError(data, err)
	}
	if c.CNIVersion == "" {
		c.CNIVersion = "0.1.0" // what the specification's first version means by leaving it out
	}
	if !supported(c.CNIVersion) {
		return nil, &Error{
			Code: codeVersion, Msg: "incompatible CNI versions",
			Details: fmt.Sprintf("config is %q, plugin supports %q", c.CNIVersion, Versions.SupportedVersions()),
		}
	}
	if !validName(c.Name) {
		return nil, fail(codeConfig, "name %q: it must begin with a letter or digit and hold only letters, digits, '_', '.' and '-'", c.Name)
	}
	for _, d := range []struct {
		key string
		dir *string
		def string
	}{{"state_dir", &c.StateDir, DefaultStateDir}, {"bpffs_dir", &c.BPFFSDir, DefaultBPFFSDir}, {"agent_socket", &c.AgentSocket, DefaultSocket}} {
		if *d.dir == "" {
			*d.dir = d.def
		}
		if !strings.HasPrefix(*d.dir, "/") {
			return nil, fail(codeConfig, "%s %q: not an absolute path", d.key, *d.dir)
		}
	}
	return c, nil
}

func (c *Config) parsePrev() error {
	raw := bytes.TrimSpace(c.PrevResult)
	if len(raw) == 0 || bytes.Equal(raw, []byte("null")) {
		return nil
	}
	result, err := version.NewResult(c.CNIVersion, raw)
	if err == nil {
		c.prev, err = types100.NewResultFromResult(result)
	}
	if err != nil {
		return fail(codeDecode, "prevResult: %s", err)
	}
	return nil
}

func supported(v string) bool {
	for _, s := range Versions.SupportedVersions() {
		if s == v {
			return true
		}
	}
	return false
}

// atLeast tells whether the configuration's version is min or later.
func (c *Config) atLeast(min string) bool {
	ok, err := version.GreaterThanOrEqualTo(c.CNIVersion, min)
	return err == nil && ok
}

// decodeError says where and what is wrong with JSON.
func decodeError(data []byte, err error) *Error {
	var syntax *json.SyntaxError
	var typed *json.UnmarshalTypeError
	switch {
	case errors.As(err, &typed) && typed.Field == "":
		return fail(codeConfig, "configuration on stdin: JSON, but a value of type %s where an object belongs", typed.Value)
	case errors.As(err, &typed):
		return fail(codeConfig, "configuration key %q: a %s where a %s belongs (%s)", typed.Field, typed.Value, inJSON(typed.Type), position(data, typed.Offset))
	case errors.As(err, &syntax):
		return fail(codeDecode, "configuration on stdin is not JSON: %s (%s)", syntax, position(data, syntax.Offset))
	case len(bytes.TrimSpace(data)) == 0:
		return fail(codeDecode, "no configuration on stdin")
	}
	return fail(codeConfig, "configuration on stdin: %s", err)
}

// inJSON is what a value of a type is called there.
func inJSON(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "object"
	case reflect.Slice:
		return "array"
	case reflect.Int, reflect.Uint32, reflect.Uint64:
		return "number"
	}
	return t.String()
}

func position(data []byte, offset int64) string {
	offset = min(max(offset, 0), int64(len(data)))
	before := data[:offset]
	return fmt.Sprintf("line %d, column %d", bytes.Count(before, []byte("\n"))+1, len(before)-bytes.LastIndexByte(before, '\n'))
}

func (c *Config) ownIPAM() bool {
	switch c.IPAM.Type {
	case "", "caracal-ipam", "calico-ipam":
		return true
	}
	return false
}

// pools is the configuration of our own IPAM.
func (c *Config) pools() (ipam.Config, error) {
	// Calico's IPAM gives out of the datastore's pools where none are named.
	calico := c.IPAM.Type == "calico-ipam" && len(c.IPAM.IPv4Pools)+len(c.IPAM.IPv6Pools) == 0
	cfg := ipam.Config{Cluster: c.IPAM.Cluster || calico}
	for _, f := range []struct {
		key   string
		list  []string
		v6    bool
		block int
	}{{"ipv4_pools", c.IPAM.IPv4Pools, false, c.IPAM.BlockSize4}, {"ipv6_pools", c.IPAM.IPv6Pools, true, c.IPAM.BlockSize6}} {
		for _, s := range f.list {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return cfg, fail(codeConfig, "ipam.%s: %q is not a CIDR such as 10.244.0.0/16; a pool's name does not do", f.key, s)
			}
			if p.Addr().Is6() != f.v6 {
				return cfg, fail(codeConfig, "ipam.%s: %s is of the other family", f.key, s)
			}
			cfg.Pools = append(cfg.Pools, api.IPPool{CIDR: p, BlockSize: f.block})
		}
	}
	for _, s := range c.IPAM.Reservations {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			a, err := netip.ParseAddr(s)
			if err != nil {
				return cfg, fail(codeConfig, "ipam.reservations: %q is neither an address nor a prefix", s)
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		cfg.Reservations = append(cfg.Reservations, p.Masked())
	}
	return cfg, nil
}

// families says which families an attachment gets an address of.
func (c *Config) families(tx *node.Tx, cfg ipam.Config) (v4, v6 bool, err error) {
	pools, _, err := ipam.Pools(tx, cfg)
	v4, v6 = ipam.Families(pools)
	if c.IPAM.AssignIPv4 != nil {
		v4 = bool(*c.IPAM.AssignIPv4)
	}
	if c.IPAM.AssignIPv6 != nil {
		v6 = bool(*c.IPAM.AssignIPv6)
	}
	return v4, v6, err
}

// requested are the addresses that somebody asked for. In each family the runtime's capability counts before args.cni before the
// pod's annotation before CNI_ARGS (CNI CONVENTIONS.md says it of the three that it knows): nerdctl sends an IPv6 address by the
// first and an IPv4 address by the last.
func (c *Config) requested(env *Env) ([]netip.Addr, error) {
	annotated, err := c.RuntimeConfig.PodAnnotations.list(annotationIPs, "addresses", "10.244.0.7")
	if err != nil {
		return nil, err
	}
	var arg []string
	if env.Args["IP"] != "" {
		arg = strings.Split(env.Args["IP"], ",")
	}
	var addrs []netip.Addr
	for _, asked := range []struct {
		where string
		list  []string
	}{{"runtimeConfig.ips", c.RuntimeConfig.IPs}, {"args.cni.ips", c.Args.CNI.IPs}, {"annotation " + annotationIPs, annotated}, {"CNI_ARGS IP", arg}} {
		more, err := parseAddrs(asked.where, asked.list)
		if err != nil {
			return nil, err
		}
		before := addrs
		for _, a := range more {
			if !slices.ContainsFunc(before, func(b netip.Addr) bool { return b.Is4() == a.Is4() }) {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs, nil
}

// parseAddrs reads addresses, and ignores the prefix lengths that they may have.
func parseAddrs(where string, list []string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, s := range list {
		a, err := netip.ParseAddr(s)
		if err != nil {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, fail(codeConfig, "%s: %s is not an address", where, quoted(s))
			}
			a = p.Addr()
		}
		addrs = append(addrs, a.Unmap())
	}
	return addrs, nil
}

// mac is the MAC address that somebody asked for, in the order of requested; nil when nobody did.
func (c *Config) mac(env *Env) (net.HardwareAddr, error) {
	for _, asked := range []struct{ where, mac string }{
		{"runtimeConfig.mac", c.RuntimeConfig.MAC}, {"args.cni.mac", c.Args.CNI.MAC},
		{"annotation " + annotationMAC, c.RuntimeConfig.PodAnnotations[annotationMAC]}, {"CNI_ARGS MAC", env.Args["MAC"]},
	} {
		if asked.mac == "" {
			continue
		}
		m, err := net.ParseMAC(asked.mac)
		if err != nil || len(m) != 6 || m[0]&1 == 1 || bytes.Equal(m, make([]byte, 6)) {
			return nil, fail(codeConfig, "%s: %s is not a unicast Ethernet address", asked.where, quoted(asked.mac))
		}
		return m, nil
	}
	return nil, nil
}

func (c *Config) labels() map[string]string {
	all := make(map[string]string)
	for _, from := range []labels{c.Labels, c.Args.Labels, c.Args.CNI.Labels} {
		for k, v := range from {
			all[k] = v
		}
	}
	return all
}

// shaped tells whether a later plugin of the chain will shape this attachment's bandwidth.
func (c *Config) shaped() bool {
	b := c.RuntimeConfig.Bandwidth
	return c.Shaped || b != nil && (b.IngressRate > 0 || b.EgressRate > 0)
}

// dns is what the result says of name resolution: the configuration's, or what the runtime asked for.
func (c *Config) dns() types.DNS {
	d := c.DNS
	if r := c.RuntimeConfig.DNS; r != nil && len(r.Servers)+len(r.Searches)+len(r.Options) > 0 {
		d = types.DNS{Nameservers: r.Servers, Search: r.Searches, Options: r.Options, Domain: d.Domain}
	}
	return d
}
