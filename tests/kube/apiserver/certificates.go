package apiserver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// authority issues the certificates of an API and of its users.
type authority struct {
	dir, file string
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, dir, name string) *authority {
	t.Helper()
	a := &authority{dir: dir, key: newKey(t), cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
	}}
	a.file = a.sign(t, name, a.cert, a.key)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue makes a certificate of a user in some groups, or of a server with an address, and returns its file and its key's.
func (a *authority) issue(t testing.TB, user string, groups []string, addr string) (cert, key string) {
	t.Helper()
	k := newKey(t)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: user, Organization: groups}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotBefore: a.cert.NotBefore, NotAfter: a.cert.NotAfter,
	}
	if addr != "" {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		c.IPAddresses = []net.IP{net.ParseIP(addr), net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1)}
		c.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	}
	name := strings.NewReplacer("/", "_", ":", "_").Replace(user)
	return a.sign(t, name, c, k), a.private(t, name, k)
}

func (a *authority) sign(t testing.TB, name string, c *x509.Certificate, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return a.write(t, name+".crt", "CERTIFICATE", der)
}

func (a *authority) private(t testing.TB, name string, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return a.write(t, name+".key", "PRIVATE KEY", der)
}

// Reissue gives the API a certificate of an authority of that name, a new one unless there is one, and returns the file of its
// certificate. The API takes it when it is restarted.
func (s *Server) Reissue(name string) (file string) {
	s.t.Helper()
	ca := s.ca
	if name != "ca" {
		ca = newAuthority(s.t, s.Dir, name)
	}
	ca.issue(s.t, servingName, nil, s.o.Addr)
	return ca.file
}

// servingName is the API's.
const servingName = "kube-apiserver"

// accountKey is what tokens of service accounts are signed with.
func (a *authority) accountKey(t testing.TB) string {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return a.write(t, "account.key", "EC PRIVATE KEY", der)
}

func (a *authority) write(t testing.TB, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Kubeconfig writes a kubeconfig of a user in some groups, by a certificate, and returns its path. "" is an administrator.
func (s *Server) Kubeconfig(user string, groups ...string) string {
	s.t.Helper()
	if user == "" {
		user, groups = "admin", []string{"system:masters"}
	}
	cert := filepath.Join(s.Dir, strings.NewReplacer("/", "_", ":", "_").Replace(user)+".crt")
	path := strings.TrimSuffix(cert, ".crt") + ".kubeconfig"
	if _, err := os.Stat(path); err == nil && user == "admin" {
		return path
	}
	cert, key := s.ca.issue(s.t, user, groups, "")
	c := api.NewConfig()
	c.Clusters["test"] = &api.Cluster{Server: s.URL, CertificateAuthority: s.ca.file}
	c.AuthInfos[user] = &api.AuthInfo{ClientCertificate: cert, ClientKey: key}
	c.Contexts["test"] = &api.Context{Cluster: "test", AuthInfo: user}
	c.CurrentContext = "test"
	if err := api.FlattenConfig(c); err != nil { // one file, which may be copied
		s.t.Fatal(err)
	}
	if err := clientcmd.WriteToFile(*c, path); err != nil {
		s.t.Fatal(err)
	}
	return path
}
