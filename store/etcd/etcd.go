// Package etcd keeps a store in an etcd cluster, version 3.4 or later, which all nodes share.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/caracal-net/caracal/internal/pause"
	"github.com/caracal-net/caracal/store"
)

// Config says where the cluster is and who we are to it.
type Config struct {
	Endpoints []string // "http://10.0.0.1:2379", "https://..."; all of one scheme, one per member

	CAFile, CertFile, KeyFile string // PEM, read again for every connection, so that they can be renewed
	CA, Cert, Key             string // PEM itself, instead of files

	Username, Password string

	Prefix  string        // before every key; "": store.DefaultPrefix
	Timeout time.Duration // of one operation, retries included, or of each 500 keys of a list; 0: 5 s
	Logger  *slog.Logger  // what the client library says, mostly at debug level; nil: nothing
}

// page is how many keys are listed at once.
const page = 500

// retry is the pause before something is tried again.
const retry = 100 * time.Millisecond

// Store is a store in a cluster. It connects when it is first used, and again whenever it has to.
type Store struct {
	cfg     Config
	space   store.Space
	certs   *certificates // nil: no TLS
	timeout time.Duration

	open  context.Context // until Close
	close context.CancelFunc

	client  chan *clientv3.Client // the one, nil before it is made; who uses it puts it back
	watches atomic.Uint64         // how often one was begun
}

var _ store.Store = (*Store)(nil)

// Open makes a store of a cluster. It checks what can be checked without asking it: an agent starts without its cluster.
func Open(cfg Config) (*Store, error) {
	space, err := store.NewSpace(cfg.Prefix)
	if err != nil {
		return nil, fmt.Errorf("prefix of the store: %w", err)
	}
	secure, err := checkEndpoints(cfg.Endpoints)
	if err != nil {
		return nil, err
	}
	if cfg.Username == "" && cfg.Password != "" || cfg.Username != "" && cfg.Password == "" {
		return nil, fmt.Errorf("%w: user name and password of etcd come together", store.ErrInvalid)
	}
	s := &Store{cfg: cfg, space: space, timeout: cfg.Timeout, client: make(chan *clientv3.Client, 1)}
	if s.timeout == 0 {
		s.timeout = 5 * time.Second
	}
	if secure {
		s.certs = &certificates{cfg: cfg}
		if _, err := s.certs.tls(); err != nil {
			return nil, err
		}
	}
	s.open, s.close = context.WithCancel(context.Background())
	s.client <- nil
	return s, nil
}

// checkEndpoints tells whether they use TLS. The library takes all for what the first one is.
func checkEndpoints(endpoints []string) (secure bool, err error) {
	if len(endpoints) == 0 {
		return false, fmt.Errorf("%w: no etcd endpoint", store.ErrInvalid)
	}
	for i, e := range endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" ||
			u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			return false, fmt.Errorf("%w: etcd endpoint %q: write it like http://10.0.0.1:2379", store.ErrInvalid, e)
		}
		if i > 0 && secure != (u.Scheme == "https") {
			return false, fmt.Errorf("%w: etcd endpoints of both http and https", store.ErrInvalid)
		}
		secure = u.Scheme == "https"
	}
	return secure, nil
}

// host is an endpoint's host and port.
func host(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err != nil {
		return endpoint
	}
	return net.JoinHostPort(u.Hostname(), u.Port())
}

// Close ends the store's watches and closes its connections.
func (s *Store) Close() error {
	if s.open.Err() != nil {
		return nil
	}
	s.close()
	c := <-s.client
	s.client <- nil
	if c == nil {
		return nil
	}
	if err := c.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("close etcd client: %w", err)
	}
	return nil
}

// connect returns the client. The library makes none while it can't log in, so that is tried again by every operation.
func (s *Store) connect(ctx context.Context) (*clientv3.Client, error) {
	var c *clientv3.Client
	select {
	case c = <-s.client:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { s.client <- c }()
	if c != nil {
		return c, nil
	}
	if s.open.Err() != nil {
		return nil, store.ErrClosed
	}
	wait := s.timeout
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, max(time.Millisecond, time.Until(deadline)))
	}
	cfg := clientv3.Config{
		Context:              s.open,
		Endpoints:            s.cfg.Endpoints,
		Username:             s.cfg.Username,
		Password:             s.cfg.Password,
		DialTimeout:          wait, // of the login
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		Logger:               zapLogger(s.cfg.Logger),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			// The library's own ends at two minutes: as long would we be away from a cluster that is back.
			Backoff:           backoff.Config{BaseDelay: retry, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		})},
	}
	if s.certs != nil {
		var err error
		if cfg.TLS, err = s.certs.tls(); err != nil {
			return nil, err
		}
	}
	made, err := clientv3.New(cfg)
	if err != nil {
		return nil, err
	}
	c = made
	return c, nil
}

// do runs one operation with the store's deadline.
func (s *Store) do(ctx context.Context, fn func(context.Context, *clientv3.Client) error) error {
	if s.open.Err() != nil {
		return store.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// Without a leader a member refuses at once, and that it did nothing is certain: so it can be tried again.
	bounded, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), s.timeout)
	defer cancel()
	defer context.AfterFunc(s.open, cancel)()
	var last error
	for {
		c, err := s.connect(bounded)
		if err == nil {
			err = fn(bounded, c)
		}
		if err == nil {
			return nil
		}
		if bounded.Err() == nil || last == nil {
			last = err
		}
		if !unsent(err) || !pause.For(bounded, retry) {
			return s.explain(ctx, last)
		}
	}
}

// Get returns a key.
func (s *Store) Get(ctx context.Context, key string) (kv store.KV, err error) {
	if err := store.CheckKey(key); err != nil {
		return store.KV{}, err
	}
	err = s.do(ctx, func(ctx context.Context, c *clientv3.Client) error {
		r, err := c.Get(ctx, s.space.Full(key))
		if err != nil {
			return err
		}
		if len(r.Kvs) == 0 {
			return store.ErrNotFound
		}
		kv = store.KV{Key: key, Value: value(r.Kvs[0].Value), Revision: store.Revision(r.Kvs[0].ModRevision)}
		return nil
	})
	return kv, named("get "+key, err)
}

// value is never nil, as on the wire an empty one is.
func value(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// named says what was tried.
func named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// List returns the keys that begin with prefix: in parts, but all at the revision of the first.
func (s *Store) List(ctx context.Context, prefix string) (kvs []store.KV, at store.Revision, err error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, 0, err
	}
	for range 3 {
		kvs, at, err = s.list(ctx, prefix)
		if !errors.Is(err, store.ErrCompacted) { // by others, between two parts
			break
		}
	}
	if err != nil {
		return nil, 0, named("list "+prefix, err)
	}
	return kvs, at, nil
}

func (s *Store) list(ctx context.Context, prefix string) (kvs []store.KV, at store.Revision, err error) {
	from := s.space.Covers(prefix)
	end := clientv3.WithRange(clientv3.GetPrefixRangeEnd(from))
	for more := true; more; {
		err := s.do(ctx, func(ctx context.Context, c *clientv3.Client) error {
			r, err := c.Get(ctx, from, end, clientv3.WithLimit(page), clientv3.WithRev(int64(at)))
			if err != nil {
				return err
			}
			if at == 0 {
				at = store.Revision(r.Header.Revision)
			}
			for _, kv := range r.Kvs {
				kvs = append(kvs, store.KV{Key: s.space.Key(string(kv.Key)), Value: value(kv.Value), Revision: store.Revision(kv.ModRevision)})
				from = string(kv.Key) + "\x00"
			}
			more = r.More && len(r.Kvs) > 0
			return nil
		})
		if err != nil {
			return nil, 0, err
		}
	}
	return kvs, at, nil
}

// Create writes a key that is not there.
func (s *Store) Create(ctx context.Context, key string, value []byte) (at store.Revision, err error) {
	if err := store.CheckWrite(key, value); err != nil {
		return 0, err
	}
	full := s.space.Full(key)
	err = s.do(ctx, func(ctx context.Context, c *clientv3.Client) error {
		r, err := c.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(full), "=", 0)).
			Then(clientv3.OpPut(full, string(value))).
			Commit()
		if err != nil {
			return err
		}
		if !r.Succeeded {
			return store.ErrExists
		}
		at = store.Revision(r.Header.Revision)
		return nil
	})
	return at, named("create "+key, err)
}

// Update writes a key that is at revision was.
func (s *Store) Update(ctx context.Context, key string, value []byte, was store.Revision) (at store.Revision, err error) {
	if err := errors.Join(store.CheckWrite(key, value), store.CheckRevision(was)); err != nil {
		return 0, err
	}
	full := s.space.Full(key)
	err = s.do(ctx, func(ctx context.Context, c *clientv3.Client) error {
		at, err = swap(ctx, c, full, was, clientv3.OpPut(full, string(value)))
		return err
	})
	return at, named("update "+key, err)
}

// Delete removes a key that is at revision was.
func (s *Store) Delete(ctx context.Context, key string, was store.Revision) error {
	if err := errors.Join(store.CheckKey(key), store.CheckRevision(was)); err != nil {
		return err
	}
	full := s.space.Full(key)
	err := s.do(ctx, func(ctx context.Context, c *clientv3.Client) error {
		_, err := swap(ctx, c, full, was, clientv3.OpDelete(full))
		return err
	})
	return named("delete "+key, err)
}

// swap does something to a key that is at revision was; 0 is whatever is there.
func swap(ctx context.Context, c *clientv3.Client, full string, was store.Revision, op clientv3.Op) (store.Revision, error) {
	var unchanged []clientv3.Cmp
	if was != 0 {
		unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(full), "=", int64(was)))
	}
	r, err := c.Txn(ctx).If(unchanged...).Then(op).Else(clientv3.OpGet(full, clientv3.WithKeysOnly())).Commit()
	if err != nil {
		return 0, err
	}
	if r.Succeeded {
		if d := r.Responses[0].GetResponseDeleteRange(); d != nil && d.Deleted == 0 {
			return 0, store.ErrNotFound
		}
		return store.Revision(r.Header.Revision), nil
	}
	there := r.Responses[0].GetResponseRange().Kvs
	if len(there) == 0 {
		return 0, store.ErrNotFound
	}
	return 0, fmt.Errorf("%w (it is at revision %d, not %d)", store.ErrConflict, there[0].ModRevision, was)
}

// current asks the cluster for its revision.
func (s *Store) current(ctx context.Context, prefix string) (at store.Revision, err error) {
	end := clientv3.WithRange(clientv3.GetPrefixRangeEnd(prefix))
	err = s.do(ctx, func(ctx context.Context, c *clientv3.Client) error {
		r, err := c.Get(ctx, prefix, end, clientv3.WithLimit(1), clientv3.WithKeysOnly())
		if err != nil {
			return err
		}
		at = store.Revision(r.Header.Revision)
		return nil
	})
	return at, err
}

// unsent tells whether it is certain that an operation did nothing and may do something when it is tried again.
func unsent(err error) bool {
	return errors.Is(err, rpctypes.ErrNoLeader) || unconnected(err)
}
