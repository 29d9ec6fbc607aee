package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/caracal-net/caracal/store"
)

// sentinels are errors that have been explained.
var sentinels = []error{
	store.ErrNotFound, store.ErrExists, store.ErrConflict, store.ErrCompacted, store.ErrDenied, store.ErrTLS, store.ErrInvalid,
	store.ErrClosed,
}

// denials are what a cluster says to somebody that it does not know, or that may not do this.
var denials = []error{
	rpctypes.ErrAuthFailed, rpctypes.ErrPermissionDenied, rpctypes.ErrInvalidAuthToken, rpctypes.ErrUserEmpty,
	rpctypes.ErrUserNotFound, rpctypes.ErrAuthOldRevision, rpctypes.ErrInvalidAuthMgmt,
}

// explain gives an error its sentinel. ctx is the caller's.
func (s *Store) explain(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case s.open.Err() != nil:
		return store.ErrClosed
	case errors.Is(ctx.Err(), context.Canceled):
		return ctx.Err()
	case among(err, sentinels):
		return err
	case among(err, denials):
		return fmt.Errorf("%w: %w%s", store.ErrDenied, err, s.who())
	case errors.Is(err, rpctypes.ErrCompacted):
		return fmt.Errorf("%w (%w)", store.ErrCompacted, err)
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return fmt.Errorf("%w: %w; its members' --max-request-bytes must be 1.5 MB at least", store.ErrInvalid, err)
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%w: %w; compact and defragment it, then disarm its alarm (etcdctl compact, defrag, alarm disarm)", store.ErrNoSpace, err)
	}
	if code := codeOf(err); code != codes.Unavailable && code != codes.DeadlineExceeded && code != codes.Canceled && code != codes.ResourceExhausted {
		return fmt.Errorf("etcd at %s: %w", s.where(), err)
	}
	if why := s.certs.diagnose(ctx, s.cfg.Endpoints); why != nil {
		return why
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: etcd at %s: %w", store.ErrUnavailable, s.where(), ctx.Err())
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: etcd at %s did not answer within %s: is most of its members up?", store.ErrUnavailable, s.where(), s.timeout)
	}
	return fmt.Errorf("%w: etcd at %s: %w", store.ErrUnavailable, s.where(), err)
}

func among(err error, of []error) bool {
	for _, e := range of {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// codeOf finds the kind of an error of the library, of the transport or of a context.
func codeOf(err error) codes.Code {
	var e rpctypes.EtcdError
	switch {
	case errors.As(err, &e):
		return e.Code()
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	code := status.Code(err)
	if text := err.Error(); code == codes.Unknown && strings.HasSuffix(text, context.DeadlineExceeded.Error()) {
		return codes.DeadlineExceeded // a member's own context, passed on without a code
	}
	return code
}

// unconnected tells whether an operation was never sent because no member could be connected to.
func unconnected(err error) bool {
	text := err.Error()
	return codeOf(err) == codes.Unavailable &&
		(strings.Contains(text, "last connection error: ") || strings.Contains(text, "error while dialing") || strings.Contains(text, "Error while dialing"))
}

// where names the endpoints.
func (s *Store) where() string {
	hosts := make([]string, len(s.cfg.Endpoints))
	for i, e := range s.cfg.Endpoints {
		hosts[i] = host(e)
	}
	return strings.Join(hosts, ", ")
}

// who names us.
func (s *Store) who() string {
	if s.cfg.Username == "" {
		return " (without a user name)"
	}
	return fmt.Sprintf(" (user %s)", s.cfg.Username)
}
