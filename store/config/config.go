// Package config says which store is used, from the environment and a file: Caracal's own variable, and all the ways in
// which Calico's programs are told.
package config

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/bolt"
	"github.com/caracal-net/caracal/store/etcd"
)

const (
	// CalicoFile is where Calico's programs look for a file.
	CalicoFile = "/etc/calico/calicoctl.cfg"
	// Variable names a store: "bolt:///var/lib/caracal", "etcd://10.0.0.1:2379,10.0.0.2:2379", "etcds://..." with TLS,
	// "kubernetes://" or "kubernetes:///path/of/kubeconfig".
	Variable = "CARACAL_STORE"
	// DirVariable names the directory of a store in a file.
	DirVariable = "CARACAL_STATE_DIR"
	// DefaultDir is the directory otherwise.
	DefaultDir = "/var/lib/caracal"
)

// Type is a kind of store.
type Type string

// The kinds of stores, as they are written.
const (
	Bolt       Type = "bolt"
	Etcd       Type = "etcdv3"
	Kubernetes Type = "kubernetes"
)

var (
	// ErrConfig says that a store is named in a way that can't be used.
	ErrConfig = errors.New("unusable store configuration")
	// ErrEtcdV2 says that the store named is etcd's version 2.
	ErrEtcdV2 = errors.New("the v2 API of etcd is gone (etcd 3.6 has none); move the data to etcdv3 and set the datastore type to etcdv3")
)

// Config is which store is used.
type Config struct {
	Type       Type
	Dir        string      // of Bolt
	Etcd       etcd.Config // of Etcd
	Kubernetes kube.Config // of Kubernetes

	Prefix  string        // before every key; "": store.DefaultPrefix
	Timeout time.Duration // of one operation; 0: the store's default
	Logger  *slog.Logger  // what the store's library says; nil: nothing
}

// Parse reads the configuration: from the environment (os.Getenv), then, for what that does not say, from a file; "" is
// none, and CalicoFile need not be there. Where neither names a store it is Bolt in DefaultDir. ErrConfig, ErrEtcdV2.
func Parse(getenv func(string) string, file string) (Config, error) {
	s, err := readFile(file)
	if err != nil {
		return Config{}, err
	}
	s.merge(fromEnvironment(getenv))
	c := Config{Dir: getenv(DirVariable)}
	if c.Dir == "" {
		c.Dir = DefaultDir
	}
	if v := getenv(Variable); v != "" {
		if err := s.name(v, &c); err != nil {
			return Config{}, fmt.Errorf("%s: %w", Variable, err)
		}
	}
	if err := s.complete(&c); err != nil {
		return Config{}, err
	}
	return c, nil
}

// Open opens the store. It does not ask it anything yet, so that who needs it may start before it.
func Open(ctx context.Context, c Config) (store.Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	switch c.Type {
	case Bolt:
		s, err := bolt.Open(c.Dir, bolt.Options{Prefix: c.Prefix, Wait: c.Timeout})
		if err != nil {
			return nil, err
		}
		return s, nil
	case Etcd:
		e := c.Etcd
		e.Prefix, e.Timeout, e.Logger = c.Prefix, c.Timeout, c.Logger
		s, err := etcd.Open(e)
		if err != nil {
			return nil, err
		}
		return s, nil
	case Kubernetes:
		k := c.Kubernetes
		k.Prefix, k.Timeout, k.Logger = c.Prefix, c.Timeout, c.Logger
		s, err := kube.Open(k)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	return nil, fmt.Errorf("%w: datastore type %q", ErrConfig, c.Type)
}

// spec is what is said in Calico's words. All of it is text there, also what is something else.
type spec struct {
	DatastoreType string `json:"datastoreType"`

	EtcdEndpoints    string `json:"etcdEndpoints"`
	EtcdAuthority    string `json:"etcdAuthority"`
	EtcdScheme       string `json:"etcdScheme"`
	EtcdDiscoverySrv string `json:"etcdDiscoverySrv"`
	EtcdUsername     string `json:"etcdUsername"`
	EtcdPassword     string `json:"etcdPassword"`
	EtcdKeyFile      string `json:"etcdKeyFile"`
	EtcdCertFile     string `json:"etcdCertFile"`
	EtcdCACertFile   string `json:"etcdCACertFile"`
	EtcdKey          string `json:"etcdKey"`
	EtcdCert         string `json:"etcdCert"`
	EtcdCACert       string `json:"etcdCACert"`

	Kubeconfig               string `json:"kubeconfig"`
	KubeconfigInline         string `json:"kubeconfigInline"`
	K8sAPIEndpoint           string `json:"k8sAPIEndpoint"`
	K8sKeyFile               string `json:"k8sKeyFile"`
	K8sCertFile              string `json:"k8sCertFile"`
	K8sCAFile                string `json:"k8sCAFile"`
	K8sAPIToken              string `json:"k8sAPIToken"`
	K8sInsecureSkipTLSVerify string `json:"k8sInsecureSkipTLSVerify"`
	K8sClientQPS             string `json:"k8sClientQPS"`
	K8sCurrentContext        string `json:"k8sCurrentContext"`

	// Known, and of no effect.
	K8sDisableNodePoll any `json:"k8sDisableNodePoll"`
	K8sUsePodCIDR      any `json:"usePodCIDR"`
	CalicoAPIGroup     any `json:"calicoAPIGroup"`
}

// variables are the names of a spec's fields in the environment; each may have CALICO_ before it.
func (s *spec) variables() map[string]*string {
	return map[string]*string{
		"DATASTORE_TYPE":     &s.DatastoreType,
		"ETCD_ENDPOINTS":     &s.EtcdEndpoints,
		"ETCD_AUTHORITY":     &s.EtcdAuthority,
		"ETCD_SCHEME":        &s.EtcdScheme,
		"ETCD_DISCOVERY_SRV": &s.EtcdDiscoverySrv,
		"ETCD_USERNAME":      &s.EtcdUsername,
		"ETCD_PASSWORD":      &s.EtcdPassword,
		"ETCD_KEY_FILE":      &s.EtcdKeyFile,
		"ETCD_CERT_FILE":     &s.EtcdCertFile,
		"ETCD_CA_CERT_FILE":  &s.EtcdCACertFile,

		"KUBECONFIG":                   &s.Kubeconfig,
		"K8S_API_ENDPOINT":             &s.K8sAPIEndpoint,
		"K8S_KEY_FILE":                 &s.K8sKeyFile,
		"K8S_CERT_FILE":                &s.K8sCertFile,
		"K8S_CA_FILE":                  &s.K8sCAFile,
		"K8S_API_TOKEN":                &s.K8sAPIToken,
		"K8S_INSECURE_SKIP_TLS_VERIFY": &s.K8sInsecureSkipTLSVerify,
		"K8S_CLIENT_QPS":               &s.K8sClientQPS,
		"K8S_CURRENT_CONTEXT":          &s.K8sCurrentContext,
	}
}

func fromEnvironment(getenv func(string) string) spec {
	var s spec
	for name, field := range s.variables() {
		if *field = getenv("CALICO_" + name); *field == "" {
			*field = getenv(name)
		}
	}
	return s
}

// merge lets what another spec says win.
func (s *spec) merge(over spec) {
	if over.EtcdEndpoints == "" && over.EtcdAuthority != "" {
		s.EtcdEndpoints = "" // the older way to say the same
	}
	if over.EtcdEndpoints != "" && over.EtcdDiscoverySrv == "" {
		s.EtcdDiscoverySrv = ""
	}
	fields := s.variables()
	for name, from := range over.variables() {
		if *from != "" {
			*fields[name] = *from
		}
	}
	// A file's certificate gives way to one that the environment names.
	for _, f := range []struct{ file, inline *string }{
		{&over.EtcdKeyFile, &s.EtcdKey}, {&over.EtcdCertFile, &s.EtcdCert}, {&over.EtcdCACertFile, &s.EtcdCACert},
		{&over.Kubeconfig, &s.KubeconfigInline},
	} {
		if *f.file != "" {
			*f.inline = ""
		}
	}
}

// name takes a store's name, as Variable has it, into the spec.
func (s *spec) name(v string, c *Config) error {
	scheme, rest, ok := strings.Cut(v, "://")
	if !ok {
		return fmt.Errorf("%w: %q: write it like bolt:///var/lib/caracal, etcd://10.0.0.1:2379,10.0.0.2:2379 or kubernetes://", ErrConfig, v)
	}
	switch scheme {
	case "bolt":
		dir, err := url.PathUnescape(rest)
		if err != nil || !strings.HasPrefix(dir, "/") {
			return fmt.Errorf("%w: %q: the directory must be absolute, as in bolt:///var/lib/caracal", ErrConfig, v)
		}
		s.DatastoreType, c.Dir = string(Bolt), dir
		return nil
	case "etcd", "etcds":
		hosts, prefix, _ := strings.Cut(rest, "/")
		if prefix != "" {
			c.Prefix = "/" + prefix
		}
		web := map[string]string{"etcd": "http", "etcds": "https"}[scheme]
		s.DatastoreType, s.EtcdEndpoints, s.EtcdDiscoverySrv = string(Etcd), "", ""
		for _, h := range strings.Split(hosts, ",") {
			s.EtcdEndpoints += "," + web + "://" + strings.TrimSpace(h)
		}
		return nil
	case "kubernetes":
		file, err := url.PathUnescape(rest)
		if err != nil || file != "" && !strings.HasPrefix(file, "/") {
			return fmt.Errorf("%w: %q: the kubeconfig must be absolute, as in kubernetes:///root/.kube/config", ErrConfig, v)
		}
		s.DatastoreType = string(Kubernetes)
		if file != "" {
			s.Kubeconfig, s.KubeconfigInline = file, ""
		}
		return nil
	}
	return fmt.Errorf("%w: %q: a store is bolt, etcd, etcds for TLS, or kubernetes", ErrConfig, v)
}

// complete makes a configuration of all that was said.
func (s *spec) complete(c *Config) error {
	switch t := strings.ToLower(strings.TrimSpace(s.DatastoreType)); t {
	case "":
		c.Type = Bolt
		if s.EtcdEndpoints != "" || s.EtcdAuthority != "" || s.EtcdDiscoverySrv != "" {
			c.Type = Etcd
		}
	case "bolt", "etcdv3":
		c.Type = Type(t)
	case "etcdv2", "etcd2", "etcd-v2", "etcd:v2", "etcd/v2":
		return fmt.Errorf("%w: datastore type %q: %w", ErrConfig, s.DatastoreType, ErrEtcdV2)
	case "kubernetes", "k8s":
		c.Type = Kubernetes
	default:
		return fmt.Errorf("%w: datastore type %q: it is etcdv3, kubernetes or bolt", ErrConfig, s.DatastoreType)
	}
	switch c.Type {
	case Bolt:
		return nil
	case Kubernetes:
		return s.kubernetes(&c.Kubernetes)
	}
	if s.EtcdDiscoverySrv != "" {
		return fmt.Errorf("%w: etcd is not looked for in DNS (ETCD_DISCOVERY_SRV): name its members in ETCD_ENDPOINTS", ErrConfig)
	}
	c.Etcd = etcd.Config{
		CAFile: s.EtcdCACertFile, CertFile: s.EtcdCertFile, KeyFile: s.EtcdKeyFile,
		CA: s.EtcdCACert, Cert: s.EtcdCert, Key: s.EtcdKey,
		Username: s.EtcdUsername, Password: s.EtcdPassword,
	}
	e := &c.Etcd
	if (e.CA != "" || e.Cert != "" || e.Key != "") && (e.CAFile != "" || e.CertFile != "" || e.KeyFile != "") {
		return fmt.Errorf("%w: certificates both inline and as files", ErrConfig)
	}
	if (e.Cert == "") != (e.Key == "") || (e.CertFile == "") != (e.KeyFile == "") {
		return fmt.Errorf("%w: etcd's client certificate and its key come together", ErrConfig)
	}
	if (e.Username == "") != (e.Password == "") {
		return fmt.Errorf("%w: etcd's user name and password come together", ErrConfig)
	}
	var err error
	e.Endpoints, err = s.endpoints()
	return err
}

// kubernetes says where the Kubernetes API is.
func (s *spec) kubernetes(c *kube.Config) error {
	*c = kube.Config{
		Kubeconfig: s.Kubeconfig, Inline: s.KubeconfigInline, Context: s.K8sCurrentContext,
		Endpoint: s.K8sAPIEndpoint, Token: s.K8sAPIToken, CAFile: s.K8sCAFile, CertFile: s.K8sCertFile, KeyFile: s.K8sKeyFile,
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		return fmt.Errorf("%w: the client certificate of Kubernetes and its key come together", ErrConfig)
	}
	if c.Endpoint != "" {
		u, err := url.Parse(c.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
			return fmt.Errorf("%w: k8sAPIEndpoint %q: write it like https://10.0.0.1:6443", ErrConfig, c.Endpoint)
		}
	}
	if text := s.K8sInsecureSkipTLSVerify; text != "" {
		insecure, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%w: k8sInsecureSkipTLSVerify %q: true or false", ErrConfig, text)
		}
		c.Insecure = insecure
	}
	if text := s.K8sClientQPS; text != "" {
		qps, err := strconv.ParseFloat(text, 32)
		if err != nil || !(qps >= 0 && qps < 1e6) {
			return fmt.Errorf("%w: k8sClientQPS %q: requests in a second, 0 for the default", ErrConfig, text)
		}
		c.QPS = int(math.Ceil(qps))
	}
	return nil
}

// endpoints are the members, each as a URL.
func (s *spec) endpoints() ([]string, error) {
	text := s.EtcdEndpoints
	if text == "" {
		scheme, authority := s.EtcdScheme, s.EtcdAuthority
		if scheme == "" {
			scheme = "http"
		}
		if authority == "" {
			authority = "127.0.0.1:2379"
		}
		text = scheme + "://" + authority
	}
	var all []string
	for e := range strings.SplitSeq(text, ",") {
		e = strings.TrimRight(strings.TrimSpace(e), "/")
		if e == "" {
			continue
		}
		u, err := url.Parse(e)
		port := 0
		if err == nil {
			port, _ = strconv.Atoi(u.Port())
		}
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || port < 1 || port > 65535 ||
			u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
			return nil, fmt.Errorf("%w: etcd endpoint %q: write it like http://10.0.0.1:2379", ErrConfig, e)
		}
		if len(all) > 0 && strings.HasPrefix(all[0], "https:") != (u.Scheme == "https") {
			return nil, fmt.Errorf("%w: etcd endpoints of both http and https", ErrConfig)
		}
		all = append(all, e)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: no etcd endpoint in %q", ErrConfig, text)
	}
	return all, nil
}

// readFile reads a file in the shape of Calico's.
func readFile(file string) (spec, error) {
	if file == "" {
		return spec{}, nil
	}
	b, err := read(file)
	if errors.Is(err, fs.ErrNotExist) && file == CalicoFile {
		return spec{}, nil
	}
	if err != nil {
		return spec{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	s, err := parse(b)
	if err != nil {
		return spec{}, fmt.Errorf("%w: %s: %w", ErrConfig, file, err)
	}
	return s, nil
}

// maxFile is the most that is read of a file, bytes.
const maxFile = 1 << 20

func read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s: larger than %d bytes: that says not where a store is", file, maxFile)
	}
	return b, err
}

// parse reads YAML or JSON.
func parse(b []byte) (spec, error) {
	var doc struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   any    `json:"metadata"`
		Spec       spec   `json:"spec"`
	}
	// As Calico does: a number where text belongs, such as a password of digits, is text.
	if err := yaml.UnmarshalStrict(b, &doc); err != nil {
		return spec{}, locate(b, err)
	}
	if doc.APIVersion != "v1" && doc.APIVersion != "projectcalico.org/v3" {
		return spec{}, locate(b, fmt.Errorf("apiVersion %q: it is projectcalico.org/v3 or v1", doc.APIVersion), "apiVersion")
	}
	if !strings.EqualFold(doc.Kind, "CalicoAPIConfig") {
		return spec{}, locate(b, fmt.Errorf("kind %q: it is CalicoAPIConfig", doc.Kind), "kind")
	}
	return doc.Spec, nil
}

// locate adds the line to an error about a key: the one named, or that which the library's text names.
func locate(b []byte, err error, key ...string) error {
	text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "error converting YAML to JSON: "), "yaml: ")
	text = strings.ReplaceAll(strings.TrimPrefix(text, "unmarshal errors:\n  "), "\n  ", "; ")
	text = strings.TrimPrefix(text, "error unmarshaling JSON: while decoding JSON: json: ")
	if m := unknownKey.FindStringSubmatch(text); m != nil {
		key, text = m[1:], "unknown key "+m[1]
	} else if m := wrongType.FindStringSubmatch(text); m != nil {
		key, text = m[2:], fmt.Sprintf("%s is a %s, not text", m[2], m[1])
	}
	if len(key) == 0 {
		return errors.New(text)
	}
	at := regexp.MustCompile(`(^|[\s{,"'])` + regexp.QuoteMeta(key[0]) + `["']?\s*:`)
	for i, line := range bytes.Split(b, []byte("\n")) {
		if at.Match(line) {
			return fmt.Errorf("line %d: %s", i+1, text)
		}
	}
	return errors.New(text)
}

// What the library says of keys.
var (
	unknownKey = regexp.MustCompile(`^unknown field "(.+)"$`)
	wrongType  = regexp.MustCompile(`^cannot unmarshal (\w+) into Go struct field .*\.(\w+) of type `)
)
