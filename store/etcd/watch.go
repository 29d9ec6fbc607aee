package etcd

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"

	"github.com/caracal-net/caracal/internal/pause"
	"github.com/caracal-net/caracal/store"
)

// watch is a watch of the library's, begun anew whenever that ends.
type watch struct {
	store  *Store
	prefix string // of the cluster's keys
	next   int64  // the first revision that was not received

	events []*clientv3.Event  // received but not told
	told   clientv3.WatchChan // nil: to be begun
	stop   context.CancelFunc // of told
	failed time.Time          // since when it ended again and again; zero: it goes
	sure   time.Time          // when it was last known that the cluster is there, or reported that it is not

	open  context.Context // until it or the store is closed
	close context.CancelFunc
}

// Watch tells the changes after a revision.
func (s *Store) Watch(ctx context.Context, prefix string, after store.Revision) (store.Watch, error) {
	if err := errors.Join(store.CheckPrefix(prefix), store.CheckRevision(after)); err != nil {
		return nil, err
	}
	w := &watch{store: s, prefix: s.space.Covers(prefix), next: int64(after) + 1, sure: time.Now()}
	now, err := s.current(ctx, w.prefix)
	if err != nil {
		return nil, named("watch "+prefix, err)
	}
	if after > now {
		return nil, fmt.Errorf("watch %s: revision %d is not of this cluster, which is at %d: %w", prefix, after, now, store.ErrCompacted)
	}
	w.open, w.close = context.WithCancel(s.open)
	if err := w.begin(ctx); err != nil {
		w.close()
		return nil, named("watch "+prefix, err)
	}
	return w, nil
}

// Close ends the watch.
func (w *watch) Close() { w.close() }

// begin asks for everything from the first revision that was not received.
func (w *watch) begin(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, w.store.timeout)
	defer cancel()
	c, err := w.store.connect(bounded)
	if err != nil {
		return w.store.explain(ctx, err)
	}
	// Watches of one context share a stream, so that one begun anew could come back to the member that was silent.
	alone := metadata.AppendToOutgoingContext(w.open, "watch", strconv.FormatUint(w.store.watches.Add(1), 10))
	// A member that lost its leader ends the watch, instead of staying silent for as long.
	own, stop := context.WithCancel(clientv3.WithRequireLeader(alone))
	given := context.AfterFunc(bounded, stop) // the library waits for a member without an end
	told := c.Watch(own, w.prefix, clientv3.WithRange(clientv3.GetPrefixRangeEnd(w.prefix)), clientv3.WithRev(w.next),
		clientv3.WithProgressNotify(), clientv3.WithCreatedNotify())
	if !given() {
		stop()
		return w.store.explain(ctx, bounded.Err())
	}
	w.told, w.stop = told, stop
	return nil
}

// end lets go of the library's watch. It returns ErrUnavailable when they have ended for the length of the deadline.
func (w *watch) end(why error) error {
	w.stop()
	w.told = nil
	if w.failed.IsZero() {
		w.failed = time.Now()
	}
	if time.Since(w.failed) < w.store.timeout {
		return nil
	}
	w.failed = time.Time{}
	return fmt.Errorf("%w: etcd at %s: %w", store.ErrUnavailable, w.store.where(), why)
}

// Next blocks until there is a change.
func (w *watch) Next(ctx context.Context) (store.Event, error) {
	e, err := w.nextEvent(ctx)
	if err != nil {
		if w.open.Err() != nil {
			err = store.ErrClosed
		}
		return store.Event{}, named("watch "+w.store.space.Key(w.prefix), err)
	}
	return e, nil
}

func (w *watch) nextEvent(ctx context.Context) (store.Event, error) {
	for {
		if err := errors.Join(w.open.Err(), ctx.Err()); err != nil {
			return store.Event{}, err
		}
		if len(w.events) > 0 {
			e := w.events[0]
			w.events = w.events[1:]
			return w.event(e), nil
		}
		if w.told == nil {
			if !w.failed.IsZero() && !pause.For(ctx, retry) {
				continue
			}
			if err := w.begin(ctx); err != nil {
				return store.Event{}, err
			}
			w.sure = time.Now()
		}
		select {
		case r, ok := <-w.told:
			var err error
			if ok {
				err = w.receive(r)
			} else {
				err = w.end(errors.New("the watch ended"))
			}
			if err != nil {
				return store.Event{}, err
			}
		case <-time.After(w.store.timeout - time.Since(w.sure)):
			// The library goes on looking for a member for ever. And the one that it has may answer, but hear nothing of
			// the others: when its disk hangs, for one.
			now, err := w.store.current(ctx, w.prefix)
			if err != nil {
				if ctx.Err() == nil {
					w.sure = time.Now()
				}
				return store.Event{}, err
			}
			if int64(now) >= w.next && w.told != nil { // of ours or of others', we can't know: begin anew, at another member
				w.stop()
				w.told = nil
			}
			w.sure = time.Now()
		case <-w.open.Done():
		case <-ctx.Done():
		}
	}
}

// receive takes what a member sent.
func (w *watch) receive(r clientv3.WatchResponse) error {
	if r.CompactRevision != 0 {
		w.stop()
		w.told = nil
		return fmt.Errorf("revision %d: %w (etcd compacted up to %d)", w.next-1, store.ErrCompacted, r.CompactRevision)
	}
	if err := r.Err(); err != nil {
		if among(err, denials) || strings.Contains(err.Error(), "permission denied") {
			w.stop()
			w.told = nil
			return fmt.Errorf("%w: %w%s", store.ErrDenied, err, w.store.who())
		}
		return w.end(err)
	}
	w.failed, w.sure = time.Time{}, time.Now()
	if n := len(r.Events); n > 0 {
		w.events = r.Events // all of them, of a revision as well
		w.next = r.Events[n-1].Kv.ModRevision + 1
	} else if r.IsProgressNotify() { // there was nothing for us up to here: it may be compacted
		w.next = max(w.next, r.Header.Revision+1)
	}
	return nil
}

func (w *watch) event(e *clientv3.Event) store.Event {
	kv := store.KV{Key: w.store.space.Key(string(e.Kv.Key)), Revision: store.Revision(e.Kv.ModRevision)}
	if e.Type == clientv3.EventTypeDelete {
		return store.Event{KV: kv, Deleted: true}
	}
	kv.Value = value(e.Kv.Value)
	return store.Event{KV: kv}
}
