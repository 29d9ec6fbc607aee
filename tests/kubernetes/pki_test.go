//go:build cluster

package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// pki is a certificate authority and what it has signed, in a directory.
type pki struct {
	t    testing.TB
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newPKI(t testing.TB, dir string) *pki {
	t.Helper()
	p := &pki{t: t, dir: dir}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "cluster"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	p.key = p.newKey("ca")
	p.cert = p.sign("ca", template, template, p.key, p.key)
	// Service accounts' tokens are signed by a key without a certificate.
	sa := p.newKey("sa")
	public, err := x509.MarshalPKIXPublicKey(&sa.PublicKey)
	must(t, err)
	p.write("sa.pub", "PUBLIC KEY", public)
	return p
}

// path is that of a file, such as "ca.crt", "sa.key" or "sa.pub".
func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

// server makes NAME.crt and NAME.key of a server.
func (p *pki) server(name string, names []string, addrs []net.IP) {
	p.leaf(name, &x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: names, IPAddresses: addrs,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
}

// client makes NAME.crt and NAME.key of a user.
func (p *pki) client(name, user string, groups ...string) {
	p.leaf(name, &x509.Certificate{Subject: pkix.Name{CommonName: user, Organization: groups},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
}

// kubeconfig is that of a new user, as text.
func (p *pki) kubeconfig(server, name, user string, groups ...string) string {
	p.client(name, user, groups...)
	data := func(file string) string {
		text, err := os.ReadFile(p.path(file))
		must(p.t, err)
		return base64.StdEncoding.EncodeToString(text)
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: {client-certificate-data: %s, client-key-data: %s}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
`, server, data("ca.crt"), data(name+".crt"), data(name+".key"))
}

func (p *pki) leaf(name string, template *x509.Certificate) {
	template.KeyUsage = x509.KeyUsageDigitalSignature
	p.sign(name, template, p.cert, p.newKey(name), p.key)
}

func (p *pki) newKey(name string) *ecdsa.PrivateKey {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(p.t, err)
	der, err := x509.MarshalECPrivateKey(key)
	must(p.t, err)
	p.write(name+".key", "EC PRIVATE KEY", der)
	return key
}

func (p *pki) sign(name string, template, by *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	p.t.Helper()
	var err error
	template.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	must(p.t, err)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(0, 0, 30)
	der, err := x509.CreateCertificate(rand.Reader, template, by, &key.PublicKey, signer)
	must(p.t, err)
	p.write(name+".crt", "CERTIFICATE", der)
	cert, err := x509.ParseCertificate(der)
	must(p.t, err)
	return cert
}

func (p *pki) write(name, kind string, der []byte) {
	p.t.Helper()
	must(p.t, os.WriteFile(p.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}
