package kube

import (
	"crypto/x509"
	"errors"
	"net/http"
	"sync/atomic"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
)

// transport is the library's, which reads a token again after a minute, and the authority's certificate never: it is made anew when the
// API takes the token no more, or has a certificate of an authority that it does not know.
type transport struct {
	api *rest.Config
	now atomic.Pointer[http.RoundTripper]
}

func newTransport(api *rest.Config) (*transport, error) {
	t := &transport{api: api}
	return t, t.renew()
}

// renew makes it anew. With files that say the same it is the same: the library keeps them.
func (t *transport) renew() error {
	rt, err := rest.TransportFor(t.api)
	if err == nil {
		t.now.Store(&rt)
	}
	return err
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := (*t.now.Load()).RoundTrip(r)
	if errors.As(err, new(x509.UnknownAuthorityError)) || err == nil && answer.StatusCode == http.StatusUnauthorized {
		_ = t.renew() // for the next one; else it stays as it is
	}
	return answer, err
}

// CloseIdleConnections is what http.Client calls.
func (t *transport) CloseIdleConnections() { utilnet.CloseIdleConnectionsFor(*t.now.Load()) }
