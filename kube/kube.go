// Package kube is the Kubernetes API to a node: a store of what its agent must know, and what the agent tells of itself.
package kube

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"github.com/caracal-net/caracal/store"
)

// Config says where the API is and who we are to it.
type Config struct {
	Kubeconfig string // files, with ":" between; "": KUBECONFIG, ~/.kube/config, or what the cluster gives each pod: the first there is
	Inline     string // the text of a kubeconfig, instead of files
	Context    string // of the kubeconfig; "": its current one

	// What counts instead of the kubeconfig's, or without one.
	Endpoint                  string // "https://10.0.0.1:6443"
	Token                     string
	CAFile, CertFile, KeyFile string // PEM, read again when they change
	Insecure                  bool   // true: whoever answers is believed to be the API

	Node    string        // this node's name; "": not on a node
	Prefix  string        // "": the cluster's own resources; else a store apart from them, of keys that begin with it
	Timeout time.Duration // of one operation, retries included, or of each 500 objects of a list; 0: 10 s
	Look    time.Duration // how often a kind is looked for that the API does not serve; 0: one minute
	QPS     int           // requests in a second; 0: 50; below 0: as many as there are
	Logger  *slog.Logger  // what the client library says, mostly at debug level; nil: nothing
}

// Store is a store in the Kubernetes API. It connects when it is first used, and again whenever it has to.
type Store struct {
	cfg     Config
	space   space
	timeout time.Duration
	rest    *rest.Config
	http    *http.Client
	groups  map[schema.GroupVersion]rest.Interface

	first atomic.Int64 // the revision at which the API was first heard of

	self      self // this node's Node
	recording sync.Once
	recorder  record.EventRecorder // of Denied

	open  context.Context // until Close
	close context.CancelFunc
}

// Open makes a store of the API. It checks what can be checked without asking it: an agent starts without its cluster.
func Open(cfg Config) (*Store, error) {
	if err := store.CheckPrefix(cfg.Prefix); err != nil {
		return nil, fmt.Errorf("prefix of the store: %w", err)
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	klog.SetSlogLogger(log) // the library has one for the whole process; otherwise it writes to stderr
	api, err := cfg.rest()
	if err != nil {
		return nil, err
	}
	s := &Store{cfg: cfg, space: space(cfg.Prefix), timeout: cfg.Timeout, rest: api, groups: make(map[schema.GroupVersion]rest.Interface)}
	s.self.err = fmt.Errorf("node %s: %w", cfg.Node, store.ErrUnavailable) // until it is heard
	if s.timeout == 0 {
		s.timeout = 10 * time.Second
	}
	if s.cfg.Look == 0 {
		s.cfg.Look = time.Minute
	}
	through, err := newTransport(api)
	if err != nil {
		return nil, fmt.Errorf("Kubernetes API at %s: %w: %w", s.where(), store.ErrTLS, err)
	}
	s.http = &http.Client{Transport: through}
	for _, version := range versions {
		if s.groups[version], err = s.connect(version); err != nil {
			return nil, err
		}
	}
	s.open, s.close = context.WithCancel(context.Background())
	return s, nil
}

// rest is the library's configuration.
func (c Config) rest() (*rest.Config, error) {
	overrides := &clientcmd.ConfigOverrides{CurrentContext: c.Context}
	overrides.ClusterInfo.Server = c.Endpoint
	overrides.ClusterInfo.CertificateAuthority = c.CAFile
	overrides.ClusterInfo.InsecureSkipTLSVerify = c.Insecure
	overrides.AuthInfo.Token = c.Token
	overrides.AuthInfo.ClientCertificate = c.CertFile
	overrides.AuthInfo.ClientKey = c.KeyFile
	api, err := c.load(overrides)
	if clientcmd.IsEmptyConfig(err) {
		return nil, fmt.Errorf("%w: no kubeconfig, and this is no pod of a cluster; name one in KUBECONFIG, or the API in K8S_API_ENDPOINT", store.ErrInvalid)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: kubeconfig: %w", store.ErrInvalid, err)
	}
	api.QPS = 50
	if c.QPS != 0 {
		api.QPS = float32(c.QPS)
	}
	api.Burst = int(4 * api.QPS)
	api.UserAgent = rest.DefaultKubernetesUserAgent()
	api.WarningHandlerWithContext = rest.NoWarnings{}
	return api, nil
}

func (c Config) load(overrides *clientcmd.ConfigOverrides) (*rest.Config, error) {
	if c.Inline != "" {
		text, err := clientcmd.Load([]byte(c.Inline))
		if err != nil {
			return nil, err
		}
		return clientcmd.NewNonInteractiveClientConfig(*text, c.Context, overrides, nil).ClientConfig()
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	switch files := filepath.SplitList(c.Kubeconfig); len(files) {
	case 0:
	case 1:
		rules.ExplicitPath = files[0]
	default:
		rules.Precedence = files
	}
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides).ClientConfig()
}

// connect makes the client of one group and version; all of them share their connections.
func (s *Store) connect(version schema.GroupVersion) (rest.Interface, error) {
	c := rest.CopyConfig(s.rest)
	c.GroupVersion, c.APIPath = &version, "/apis"
	if version.Group == "" {
		c.APIPath = "/api"
	}
	c.NegotiatedSerializer = codecs
	c.ContentType = runtime.ContentTypeJSON // what we write
	if version == coreVersion || version == networkVersion {
		c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	}
	client, err := rest.RESTClientForConfigAndClient(c, s.http)
	if err != nil {
		return nil, fmt.Errorf("Kubernetes API at %s: %w", s.where(), err)
	}
	return client, nil
}

// core is the client of the core's kinds: Nodes, Pods, Events.
func (s *Store) core() rest.Interface { return s.groups[coreVersion] }

// where names the API.
func (s *Store) where() string {
	if u, err := url.Parse(s.rest.Host); err == nil && u.Host != "" {
		return u.Host
	}
	return s.rest.Host
}

// Close ends the store's watches and closes its connections.
func (s *Store) Close() error {
	if s.open.Err() == nil {
		s.close()
		s.http.CloseIdleConnections()
	}
	return nil
}
