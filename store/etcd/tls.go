package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/store"
)

// certificates are who we are and whom we trust.
type certificates struct {
	cfg Config
}

// tls reads the configuration of our connections. Who trusts whom is fixed by it; our own certificate is read again for
// every connection.
func (c *certificates) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.cfg.CA != "" || c.cfg.CAFile != "" {
		pem, err := content(c.cfg.CA, c.cfg.CAFile)
		if err != nil {
			return nil, err
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w: %s holds no certificate in PEM", store.ErrTLS, name(c.cfg.CAFile, "the CA's certificate"))
		}
	}
	if c.cfg.Cert == "" && c.cfg.CertFile == "" && c.cfg.Key == "" && c.cfg.KeyFile == "" {
		return cfg, nil
	}
	if _, err := c.own(); err != nil {
		return nil, err
	}
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.own() }
	return cfg, nil
}

// own is our certificate; nil when we have none.
func (c *certificates) own() (*tls.Certificate, error) {
	if c.cfg.Cert == "" && c.cfg.CertFile == "" && c.cfg.Key == "" && c.cfg.KeyFile == "" {
		return nil, nil
	}
	cert, err := content(c.cfg.Cert, c.cfg.CertFile)
	if err != nil {
		return nil, err
	}
	key, err := content(c.cfg.Key, c.cfg.KeyFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%w: %s with %s: %w", store.ErrTLS, name(c.cfg.CertFile, "our certificate"), name(c.cfg.KeyFile, "its key"), err)
	}
	return &pair, nil
}

// content is PEM, or that of a file.
func content(pem, file string) ([]byte, error) {
	if pem != "" {
		return []byte(pem), nil
	}
	if file == "" {
		return nil, fmt.Errorf("%w: a certificate and its key come together", store.ErrTLS)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", store.ErrTLS, err)
	}
	return b, nil
}

func name(file, what string) string {
	if file != "" {
		return file
	}
	return what
}

// shakes is how often a member is asked at most while it resets the connection: one that closes it before it has read all we sent
// resets it, and what it said, or that it closed it, is lost. Whether it has read all is chance.
const shakes = 8

// diagnose asks every member why there is no connection: the library only says that there is none. It returns nil unless
// certificates keep us from all that can be reached.
func (c *certificates) diagnose(ctx context.Context, endpoints []string) error {
	if c == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	found := make([]error, len(endpoints))
	var wg sync.WaitGroup
	for i, e := range endpoints {
		wg.Go(func() {
			for range shakes {
				if found[i] = c.shake(ctx, host(e)); !errors.Is(found[i], unix.ECONNRESET) {
					return
				}
			}
		})
	}
	wg.Wait()
	var first error
	for _, err := range found {
		if err == nil {
			return nil
		}
		if first == nil && errors.Is(err, store.ErrTLS) {
			first = err
		}
	}
	return first
}

// shake connects to a member and returns why that fails: ErrTLS when it is for a certificate.
func (c *certificates) shake(ctx context.Context, addr string) error {
	cfg, err := c.tls()
	if err != nil {
		return err
	}
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer raw.Close()
	deadline, _ := ctx.Deadline()
	if err := raw.SetDeadline(deadline); err != nil {
		return err
	}
	cfg.ServerName, _, _ = net.SplitHostPort(addr)
	cfg.NextProtos = []string{"h2"}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		if errors.Is(err, io.EOF) || errors.As(err, new(tls.RecordHeaderError)) {
			return fmt.Errorf("%w: etcd at %s does not speak TLS: is it http://%s?", store.ErrTLS, addr, addr)
		}
		return c.name(addr, err)
	}
	// What a server thinks of our certificate it says after the handshake. One that likes it speaks first (RFC 9113,
	// section 3.4).
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return c.name(addr, err)
	}
	return nil
}

// name says which certificate is bad, and how.
func (c *certificates) name(addr string, err error) error {
	var theirs *tls.CertificateVerificationError
	switch {
	case errors.As(err, &theirs) && len(theirs.UnverifiedCertificates) > 0:
		cert := theirs.UnverifiedCertificates[0]
		return fmt.Errorf("%w: that of etcd at %s, %s: %w", store.ErrTLS, addr, describe(cert), theirs.Err)
	case !strings.Contains(err.Error(), "remote error: tls: "): // that is how the library tells an alert of the other side
		return err
	}
	ours := "that we have none"
	if own, ownErr := c.own(); ownErr != nil {
		return ownErr
	} else if own != nil {
		ours = name(c.cfg.CertFile, "our certificate")
		if own.Leaf != nil {
			ours += ", " + describe(own.Leaf)
			if time.Now().After(own.Leaf.NotAfter) {
				ours += ", which has expired"
			}
		}
	}
	return fmt.Errorf("%w: etcd at %s refuses %s: %w", store.ErrTLS, addr, ours, err)
}

func describe(cert *x509.Certificate) string {
	return fmt.Sprintf("%s, valid from %s to %s", cert.Subject, cert.NotBefore.Format(time.DateOnly), cert.NotAfter.Format(time.DateOnly))
}
