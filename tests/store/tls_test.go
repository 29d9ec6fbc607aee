package store_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/etcd"
	"github.com/caracal-net/caracal/store/storetest"
)

// authority signs certificates.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.cert, a.key = a.sign(t, "ca", &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-72 * time.Hour), NotAfter: time.Now().Add(time.Hour),
	})
	return a
}

// sign writes <file>.pem and <file>.key.
func (a *authority) sign(t testing.TB, file string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		a.path(file, ".pem"): {Type: "CERTIFICATE", Bytes: der},
		a.path(file, ".key"): {Type: "EC PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (a *authority) path(file, ext string) string { return filepath.Join(a.dir, file+ext) }

// issue makes a certificate for loopback, one that has expired if it is to be.
func (a *authority) issue(t testing.TB, file, name string, expired bool) {
	t.Helper()
	until := time.Now().Add(time.Hour)
	if expired {
		until = time.Now().Add(-time.Hour)
	}
	a.sign(t, file, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: until,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
}

// flags make a member speak TLS with a certificate, and ask for one.
func (a *authority) flags(file string) []string {
	return []string{"--cert-file", a.path(file, ".pem"), "--key-file", a.path(file, ".key"),
		"--client-cert-auth", "--trusted-ca-file", a.path("ca", ".pem")}
}

func (a *authority) config(c *cluster, file string) etcd.Config {
	cfg := etcd.Config{Endpoints: c.endpoints(), CAFile: a.path("ca", ".pem"), Timeout: time.Second}
	if file != "" {
		cfg.CertFile, cfg.KeyFile = a.path(file, ".pem"), a.path(file, ".key")
	}
	return cfg
}

// Certificates that are not good are named, whose they are and why, and a store goes on when they are renewed.
func TestCertificates(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t, "the right authority"), newAuthority(t, "another authority")
	ca.issue(t, "server", "etcd server", false)
	ca.issue(t, "client", "node one", false)
	ca.issue(t, "old", "node two", true)
	other.issue(t, "client", "stranger", false)
	c := startCluster(t, 1, ca.flags("server")...)
	good := open(t, ca.config(c, "client"))
	until(t, "etcd serves", func() error { _, _, err := good.List(context.Background(), ""); return err })
	storetest.Put(t, good, "/k", "1")

	inline := ca.config(c, "")
	for field, file := range map[*string]string{&inline.CA: ca.path("ca", ".pem"), &inline.Cert: ca.path("client", ".pem"), &inline.Key: ca.path("client", ".key")} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		*field = string(b)
	}
	inline.CAFile = ""
	if kv, err := open(t, inline).Get(storetest.Context(t), "/k"); err != nil || string(kv.Value) != "1" {
		t.Errorf("with inline certificates: %q, %v", kv.Value, err)
	}

	strange := ca.config(c, "")
	strange.CertFile, strange.KeyFile = other.path("client", ".pem"), other.path("client", ".key")
	distrust := ca.config(c, "client")
	distrust.CAFile = other.path("ca", ".pem")
	for name, test := range map[string]struct {
		cfg  etcd.Config
		want []string
	}{
		"ours has expired":     {ca.config(c, "old"), []string{ca.path("old", ".pem"), "node two", "has expired"}},
		"ours is a stranger's": {strange, []string{other.path("client", ".pem"), "stranger"}},
		"we have none":         {ca.config(c, ""), []string{"that we have none"}},
		"theirs is not ours":   {distrust, []string{"etcd server", "unknown authority"}},
	} {
		s := open(t, test.cfg)
		begin := time.Now()
		_, err := s.Get(storetest.Context(t), "/k")
		_, watchErr := s.Watch(storetest.Context(t), "", 0)
		for _, err := range []error{err, watchErr} {
			if !errors.Is(err, store.ErrTLS) {
				t.Errorf("%s: %v", name, err)
			}
			for _, want := range test.want {
				if !strings.Contains(fmt.Sprint(err), want) {
					t.Errorf("%s: error %v, want %q", name, err, want)
				}
			}
		}
		if took := time.Since(begin); took > 2*(test.cfg.Timeout+slack) {
			t.Errorf("%s took %s", name, took)
		}
		if name == "ours has expired" {
			// It is renewed under its name, and the same store goes on.
			ca.issue(t, "old", "node two", false)
			until(t, "the renewed certificate is used", func() error { _, err := s.Get(context.Background(), "/k"); return err })
		}
	}

	// With a user name the client library logs in before it exists.
	login := ca.config(c, "")
	login.Username, login.Password = "node", "pw"
	if _, err := open(t, login).Get(storetest.Context(t), "/k"); !errors.Is(err, store.ErrTLS) {
		t.Errorf("login without a certificate: %v", err)
	}

	plain := etcd.Config{Endpoints: []string{strings.Replace(c.members[0].client, "https", "http", 1)}, Timeout: time.Second}
	if _, err := open(t, plain).Get(storetest.Context(t), "/k"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("without TLS: %v", err)
	}
}

func TestServerCertificateExpired(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "the right authority")
	ca.issue(t, "server", "etcd server", true)
	ca.issue(t, "client", "node one", false)
	c := startCluster(t, 1, ca.flags("server")...)
	s := open(t, ca.config(c, "client"))
	// Until the member listens it is merely absent.
	until(t, "the certificate is refused", func() error {
		_, err := s.Get(storetest.Context(t), "/k")
		if !errors.Is(err, store.ErrTLS) {
			return fmt.Errorf("get: %w", err)
		}
		for _, want := range []string{c.members[0].client[len("https://"):], "etcd server", "expired"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
		}
		return nil
	})
}

// What is wrong with files is known before anybody is asked.
func TestCertificateFiles(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t, "one"), newAuthority(t, "two")
	ca.issue(t, "client", "node", false)
	other.issue(t, "client", "node", false)
	base := etcd.Config{Endpoints: []string{"https://127.0.0.1:1"}}
	for name, change := range map[string]func(*etcd.Config){
		"no CA file":    func(c *etcd.Config) { c.CAFile = filepath.Join(ca.dir, "none") },
		"no CA":         func(c *etcd.Config) { c.CA = "hello" },
		"a key as CA":   func(c *etcd.Config) { c.CAFile = ca.path("client", ".key") },
		"cert alone":    func(c *etcd.Config) { c.CertFile = ca.path("client", ".pem") },
		"another's key": func(c *etcd.Config) { c.CertFile, c.KeyFile = ca.path("client", ".pem"), other.path("client", ".key") },
	} {
		cfg := base
		change(&cfg)
		if s, err := etcd.Open(cfg); !errors.Is(err, store.ErrTLS) || s != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A plain endpoint named https is told so.
func TestNoTLSThere(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	s := open(t, etcd.Config{Endpoints: []string{strings.Replace(c.members[0].client, "http", "https", 1)}, Timeout: 5 * time.Second})
	if _, err := s.Get(storetest.Context(t), "/k"); !errors.Is(err, store.ErrTLS) || !strings.Contains(err.Error(), "does not speak TLS: is it http://") {
		t.Errorf("get: %v", err)
	}
}

// A server that closes a connection before it has read all of it resets it. etcd does so now and then; this one every other time.
func TestNoTLSReset(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetReadDeadline(time.Now().Add(time.Second))
			room := 1
			if n%2 == 1 {
				room = 64 << 10
			}
			c.Read(make([]byte, room))
			c.Close()
		}
	}()
	s := open(t, etcd.Config{Endpoints: []string{"https://" + l.Addr().String()}, Timeout: time.Second})
	for range 4 { // that the first attempt is not reset is chance
		if _, err := s.Get(storetest.Context(t), "/k"); !errors.Is(err, store.ErrTLS) {
			t.Errorf("get: %v", err)
		}
	}
}
