package config

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store/etcd"
)

type env map[string]string

func (e env) get(name string) string { return e[name] }

// v3 is a file of calicoctl's.
const v3 = `apiVersion: projectcalico.org/v3
kind: CalicoAPIConfig
metadata:
spec:
  datastoreType: "etcdv3"
  etcdEndpoints: "https://etcd1:2379,https://etcd2:2379/"
  etcdUsername: calico
  etcdPassword: 12345
  etcdKeyFile: /etc/calico/key.pem
  etcdCertFile: /etc/calico/cert.pem
  etcdCACertFile: /etc/calico/ca.pem
`

func TestParse(t *testing.T) {
	fromV3 := Config{Type: Etcd, Dir: DefaultDir, Etcd: etcd.Config{
		Endpoints: []string{"https://etcd1:2379", "https://etcd2:2379"}, Username: "calico", Password: "12345",
		KeyFile: "/etc/calico/key.pem", CertFile: "/etc/calico/cert.pem", CAFile: "/etc/calico/ca.pem",
	}}
	plain := func(endpoints ...string) Config {
		return Config{Type: Etcd, Dir: DefaultDir, Etcd: etcd.Config{Endpoints: endpoints}}
	}
	for name, test := range map[string]struct {
		env  env
		file string
		want Config
	}{
		"nothing":          {nil, "", Config{Type: Bolt, Dir: DefaultDir}},
		"directory":        {env{"CARACAL_STATE_DIR": "/x"}, "", Config{Type: Bolt, Dir: "/x"}},
		"ours, a file":     {env{"CARACAL_STORE": "bolt:///x/y", "CARACAL_STATE_DIR": "/z"}, v3, Config{Type: Bolt, Dir: "/x/y"}},
		"ours, a cluster":  {env{"CARACAL_STORE": "etcd://a:1,b:2"}, "", plain("http://a:1", "http://b:2")},
		"ours over theirs": {env{"CARACAL_STORE": "etcd://a:1", "ETCD_ENDPOINTS": "http://c:3", "DATASTORE_TYPE": "kubernetes"}, "", plain("http://a:1")},
		"ours with TLS and a prefix": {env{"CARACAL_STORE": "etcds://a:1/one/two"}, "",
			Config{Type: Etcd, Dir: DefaultDir, Prefix: "/one/two", Etcd: etcd.Config{Endpoints: []string{"https://a:1"}}}},
		"endpoints":                   {env{"ETCD_ENDPOINTS": "http://a:1, http://b:2"}, "", plain("http://a:1", "http://b:2")},
		"endpoints, Calico's":         {env{"CALICO_ETCD_ENDPOINTS": "http://a:1", "ETCD_ENDPOINTS": "http://b:2"}, "", plain("http://a:1")},
		"authority":                   {env{"ETCD_AUTHORITY": "a:1", "ETCD_SCHEME": "https"}, "", plain("https://a:1")},
		"authority, no scheme":        {env{"ETCD_AUTHORITY": "a:1"}, "", plain("http://a:1")},
		"endpoints over authority":    {env{"ETCD_AUTHORITY": "a:1", "ETCD_ENDPOINTS": "http://b:2"}, "", plain("http://b:2")},
		"type only":                   {env{"DATASTORE_TYPE": "etcdv3"}, "", plain("http://127.0.0.1:2379")},
		"type, Calico's":              {env{"CALICO_DATASTORE_TYPE": "etcdv3", "DATASTORE_TYPE": "etcdv2"}, "", plain("http://127.0.0.1:2379")},
		"file":                        {nil, v3, fromV3},
		"environment over file":       {env{"ETCD_USERNAME": "root", "ETCD_ENDPOINTS": "https://c:3"}, v3, over(fromV3, "root", "https://c:3")},
		"authority over a file's own": {env{"ETCD_AUTHORITY": "c:3", "ETCD_SCHEME": "https"}, v3, over(fromV3, "calico", "https://c:3")},
		"JSON": {nil, `{"apiVersion":"v1","kind":"calicoApiConfig","metadata":{},"spec":{"etcdEndpoints":"http://a:1","kubeconfig":""}}`,
			plain("http://a:1")},
		"kubernetes": {env{"DATASTORE_TYPE": "kubernetes", "KUBECONFIG": "/a:/b"}, "", cluster(kube.Config{Kubeconfig: "/a:/b"})},
		"ours, kubernetes": {env{"CARACAL_STORE": "kubernetes://", "ETCD_ENDPOINTS": "http://c:3", "K8S_CURRENT_CONTEXT": "x"}, "",
			cluster(kube.Config{Context: "x"})},
		"ours, a kubeconfig": {env{"CARACAL_STORE": "kubernetes:///a%20b", "KUBECONFIG": "/c"}, "", cluster(kube.Config{Kubeconfig: "/a b"})},
		"kubernetes in a file": {nil, "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec:\n  datastoreType: kubernetes\n" +
			"  k8sAPIEndpoint: https://a:1\n  k8sAPIToken: 12\n  k8sCAFile: /ca\n  k8sInsecureSkipTLSVerify: true\n  k8sClientQPS: 0.5\n",
			cluster(kube.Config{Endpoint: "https://a:1", Token: "12", CAFile: "/ca", Insecure: true, QPS: 1})},
		"a kubeconfig over a file's own": {env{"KUBECONFIG": "/a"}, "apiVersion: v1\nkind: calicoApiConfig\nspec:\n  datastoreType: kubernetes\n" +
			"  kubeconfigInline: x\n", cluster(kube.Config{Kubeconfig: "/a"})},
		"v1": {nil, "apiVersion: v1\nkind: calicoApiConfig\nspec:\n  datastoreType: etcdv3\n  etcdAuthority: a:1\n", plain("http://a:1")},
		"inline": {nil, "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec:\n  etcdEndpoints: https://a:1\n  etcdCACert: |\n    x\n    y\n",
			Config{Type: Etcd, Dir: DefaultDir, Etcd: etcd.Config{Endpoints: []string{"https://a:1"}, CA: "x\ny\n"}}},
	} {
		got, err := Parse(test.env.get, write(t, test.file))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func cluster(c kube.Config) Config { return Config{Type: Kubernetes, Dir: DefaultDir, Kubernetes: c} }

func over(c Config, user string, endpoints ...string) Config {
	c.Etcd.Username, c.Etcd.Endpoints = user, endpoints
	return c
}

// write makes a file; "" is none.
func write(t *testing.T, content string) string {
	if content == "" {
		return ""
	}
	path := filepath.Join(t.TempDir(), "calicoctl.cfg")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestParseRefuses(t *testing.T) {
	head := "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec:\n"
	for name, test := range map[string]struct {
		env  env
		file string
		want string
		is   error
	}{
		"etcdv2":                  {env{"DATASTORE_TYPE": "etcdv2"}, "", "v2 API of etcd is gone", ErrEtcdV2},
		"etcdv2 in a file":        {nil, "apiVersion: v1\nkind: calicoApiConfig\nspec:\n  datastoreType: etcdv2\n", "etcdv3", ErrEtcdV2},
		"etcd:v2":                 {env{"CALICO_DATASTORE_TYPE": "ETCD:V2"}, "", "etcdv3", ErrEtcdV2},
		"kubernetes, relative":    {env{"CARACAL_STORE": "kubernetes://config"}, "", "absolute", ErrConfig},
		"kubernetes, key alone":   {env{"DATASTORE_TYPE": "kubernetes", "K8S_KEY_FILE": "/k"}, "", "come together", ErrConfig},
		"kubernetes, no URL":      {env{"DATASTORE_TYPE": "kubernetes", "K8S_API_ENDPOINT": "10.0.0.1:6443"}, "", "write it like https://", ErrConfig},
		"kubernetes, no number":   {env{"DATASTORE_TYPE": "kubernetes", "K8S_CLIENT_QPS": "many"}, "", `"many"`, ErrConfig},
		"kubernetes, perhaps TLS": {env{"DATASTORE_TYPE": "kubernetes", "K8S_INSECURE_SKIP_TLS_VERIFY": "perhaps"}, "", "true or false", ErrConfig},
		"other type":              {env{"DATASTORE_TYPE": "consul"}, "", `"consul"`, ErrConfig},
		"no scheme":               {env{"ETCD_ENDPOINTS": "a:1"}, "", "write it like http://", ErrConfig},
		"no port":                 {env{"ETCD_ENDPOINTS": "http://a"}, "", "write it like http://", ErrConfig},
		"a path":                  {env{"ETCD_ENDPOINTS": "http://a:1/x"}, "", "write it like http://", ErrConfig},
		"no endpoint":             {env{"ETCD_ENDPOINTS": ","}, "", "no etcd endpoint", ErrConfig},
		"both schemes":            {env{"ETCD_ENDPOINTS": "http://a:1,https://b:1"}, "", "both http and https", ErrConfig},
		"discovery":               {env{"ETCD_DISCOVERY_SRV": "example.com"}, "", "ETCD_ENDPOINTS", ErrConfig},
		"key alone":               {env{"ETCD_ENDPOINTS": "https://a:1", "ETCD_KEY_FILE": "/k"}, "", "come together", ErrConfig},
		"user alone":              {env{"ETCD_ENDPOINTS": "https://a:1", "ETCD_USERNAME": "u"}, "", "come together", ErrConfig},
		"inline and files":        {nil, head + "  etcdEndpoints: https://a:1\n  etcdCert: x\n  etcdKeyFile: y\n", "both inline and as files", ErrConfig},
		"ours, unknown":           {env{"CARACAL_STORE": "consul://a:1"}, "", "bolt, etcd, etcds", ErrConfig},
		"ours, a path":            {env{"CARACAL_STORE": "/x"}, "", "write it like bolt://", ErrConfig},
		"ours, relative":          {env{"CARACAL_STORE": "bolt://x"}, "", "absolute", ErrConfig},
		"unknown key":             {nil, head + "  etcdEndpoints: http://a:1\n  etcdUser: u\n", "line 5: unknown key etcdUser", ErrConfig},
		"unknown top key":         {nil, head + "  etcdEndpoints: http://a:1\nspecs: {}\n", "line 5: unknown key specs", ErrConfig},
		"unknown JSON key":        {nil, `{"apiVersion":"v1","kind":"calicoApiConfig",` + "\n" + `"spec":{"etcdUser":"u"}}`, "line 2: unknown key etcdUser", ErrConfig},
		"key twice":               {nil, head + "  etcdUsername: a\n  etcdUsername: b\n", "line 5", ErrConfig},
		"not text":                {nil, head + "  etcdUsername: [a]\n", "line 4: etcdUsername is a array, not text", ErrConfig},
		"no YAML":                 {nil, head + "  etcdUsername: [a\n", "line", ErrConfig},
		"other kind":              {nil, "apiVersion: v1\nkind: Pod\n", `line 2: kind "Pod"`, ErrConfig},
		"other version":           {nil, "apiVersion: v2\nkind: CalicoAPIConfig\n", `line 1: apiVersion "v2"`, ErrConfig},
		"no version":              {nil, "kind: CalicoAPIConfig\n", `apiVersion ""`, ErrConfig},
		"a list":                  {nil, "- a\n", "calicoctl.cfg", ErrConfig},
		"nothing in a file":       {nil, "# nothing\n", `apiVersion ""`, ErrConfig},
	} {
		_, err := Parse(test.env.get, write(t, test.file))
		if !errors.Is(err, test.is) || !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: an error of several lines: %q", name, err)
		}
	}
	if _, err := Parse(env{}.get, "/nowhere/calicoctl.cfg"); !errors.Is(err, ErrConfig) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestOpen(t *testing.T) {
	ctx := context.Background()
	s, err := Open(ctx, Config{Type: Bolt, Dir: t.TempDir(), Prefix: "/x"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Create(ctx, "/k", nil); err != nil {
		t.Errorf("create: %v", err)
	}
	// A cluster need not be there yet.
	c, err := Open(ctx, Config{Type: Etcd, Etcd: etcd.Config{Endpoints: []string{"http://192.0.2.1:2379"}}})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	for _, bad := range []Config{{}, {Type: "x"}, {Type: Etcd}, {Type: Bolt, Prefix: "x"},
		{Type: Etcd, Etcd: etcd.Config{Endpoints: []string{"https://a:1"}, CAFile: "/nowhere"}}} {
		if s, err := Open(ctx, bad); err == nil || s != nil {
			t.Errorf("%+v: %v, %v", bad, s, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(v3), "etcd://a:1")
	f.Add([]byte("apiVersion: v1\nkind: calicoApiConfig\nspec:\n  datastoreType: etcdv2\n"), "")
	f.Add([]byte(`{"apiVersion":"v1","kind":"calicoApiConfig","spec":{"etcdUser":"u"}}`), "bolt:///x")
	f.Add([]byte("apiVersion: v1\nkind: calicoApiConfig\nspec:\n  etcdUsername: [a]\n"), "etcds://a:1/x")
	f.Fuzz(func(t *testing.T, file []byte, ours string) {
		s, err := parse(file)
		if err != nil {
			return
		}
		c := Config{Dir: DefaultDir}
		if ours != "" && s.name(ours, &c) != nil {
			return
		}
		if s.complete(&c) != nil {
			return
		}
		switch c.Type {
		case Bolt:
			if !strings.HasPrefix(c.Dir, "/") {
				t.Errorf("directory %q", c.Dir)
			}
		case Kubernetes:
		case Etcd:
			c.Etcd.CAFile, c.Etcd.CertFile, c.Etcd.KeyFile, c.Etcd.CA, c.Etcd.Cert, c.Etcd.Key = "", "", "", "", "", ""
			c.Prefix = ""
			if s, err := Open(context.Background(), c); err != nil {
				t.Errorf("%+v: %v", c.Etcd, err)
			} else {
				s.Close()
			}
		default:
			t.Errorf("type %q", c.Type)
		}
	})
}
