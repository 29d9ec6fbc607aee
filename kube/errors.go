package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	"github.com/caracal-net/caracal/store"
)

// Manifests are what the errors name as the way out.
const (
	crdsFile = "deploy/kubernetes/crds.yaml"
	rbacFile = "deploy/kubernetes/rbac.yaml"
)

// errAbsent says that the API has no such kind, or not in the version that we ask for.
var errAbsent = errors.New("the Kubernetes API does not serve it")

// explain gives the API's error its sentinel. ctx is the caller's, what is what was tried of which kind.
func (s *Store) explain(ctx context.Context, verb string, k *kind, err error) error {
	switch {
	case err == nil:
		return nil
	case s.open.Err() != nil:
		return store.ErrClosed
	case errors.Is(ctx.Err(), context.Canceled):
		return ctx.Err()
	case absent(err):
		return s.explainAbsent(ctx, k)
	case apierrors.IsNotFound(err):
		return store.ErrNotFound
	case apierrors.IsAlreadyExists(err):
		return store.ErrExists
	case apierrors.IsConflict(err):
		return store.ErrConflict
	case apierrors.IsGone(err), apierrors.IsResourceExpired(err):
		return fmt.Errorf("%w (%w)", store.ErrCompacted, err)
	case apierrors.IsForbidden(err):
		if strings.Contains(err.Error(), " cannot "+verb+" resource ") { // and not that of an admission plugin, such as a quota
			return fmt.Errorf("%w: %w; its ClusterRole needs the verb %s on %s (%s has all that is needed)", store.ErrDenied, err, verb, k, rbacFile)
		}
		return fmt.Errorf("%w: %w", store.ErrDenied, err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%w: Kubernetes API at %s: %w: is the token or the certificate expired, or another cluster's?", store.ErrDenied, s.where(), err)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err), apierrors.IsRequestEntityTooLargeError(err), apierrors.IsMethodNotSupported(err),
		apierrors.IsUnsupportedMediaType(err):
		return fmt.Errorf("%w: %w", store.ErrInvalid, err)
	case certificate(err):
		return fmt.Errorf("%w: Kubernetes API at %s: %w", store.ErrTLS, s.where(), err)
	case ctx.Err() != nil:
		return fmt.Errorf("%w: Kubernetes API at %s: %w", store.ErrUnavailable, s.where(), ctx.Err())
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: Kubernetes API at %s did not answer within %s", store.ErrUnavailable, s.where(), s.timeout)
	}
	return fmt.Errorf("%w: Kubernetes API at %s: %w", store.ErrUnavailable, s.where(), err)
}

// absent tells whether an error is that of a kind that is not served. The API answers an object that is not there with its name, and a
// path that is not there with none.
func absent(err error) bool {
	status := apierrors.APIStatus(nil)
	if !apierrors.IsNotFound(err) || !errors.As(err, &status) {
		return false
	}
	d := status.Status().Details
	return d == nil || slices.ContainsFunc(d.Causes, func(c metav1.StatusCause) bool { return c.Type == metav1.CauseTypeUnexpectedServerResponse })
}

// explainAbsent says what is served instead of a kind: more than the API's "could not find the requested resource".
func (s *Store) explainAbsent(ctx context.Context, k *kind) error {
	what := fmt.Sprintf("%s/%s", k, k.version.Version)
	way := "kubectl apply -f " + crdsFile
	if !k.custom || k.optional {
		way = "it is part of Kubernetes, or of what its network policy API installs"
	}
	var group metav1.APIGroup
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	if s.core().Get().AbsPath("/apis", k.version.Group).Do(bounded).Into(&group) == nil && len(group.Versions) > 0 {
		var served []string
		for _, v := range group.Versions {
			served = append(served, v.Version)
		}
		what += fmt.Sprintf(" (of %s it serves %s)", k.version.Group, strings.Join(served, ", "))
	}
	return fmt.Errorf("%w: Kubernetes API at %s: %w: %s; %s", store.ErrUnavailable, s.where(), errAbsent, what, way)
}

// certificate tells whether an error is that of a certificate, ours or the API's.
func certificate(err error) bool {
	var verify *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var remote *net.OpError
	return errors.As(err, &verify) || errors.As(err, &authority) || errors.As(err, &host) || errors.As(err, &invalid) ||
		errors.As(err, &remote) && remote.Op == "remote error"
}

// again tells whether something may go better at once, and does no harm twice: nothing was sent, or it changes nothing.
func again(verb string, err error) bool {
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" || apierrors.IsTooManyRequests(err) {
		return true
	}
	switch verb {
	case "get", "list", "watch":
		return apierrors.IsServerTimeout(err) || apierrors.IsTimeout(err) || apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) ||
			utilnet.IsConnectionReset(err) || utilnet.IsProbableEOF(err) || utilnet.IsHTTP2ConnectionLost(err)
	}
	return false
}
