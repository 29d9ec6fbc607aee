package kube

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/caracal-net/caracal/internal/pause"
	"github.com/caracal-net/caracal/store"
)

const (
	// renew is the longest that one request of a watch lasts, and half of it the shortest.
	renew = 10 * time.Minute
	// short is how long a request of a watch lasts that may be followed by the next one at once.
	short = time.Second
)

// watch is one watch of the API for each kind, each begun anew where it ended.
//
// client-go's informers do more and other things: they keep all objects, which the agent keeps as values already, and hide at which
// revision they are, which List and Watch promise. So of the library it is the request and its decoder.
type watch struct {
	store  *Store
	prefix string
	told   []store.Event // before the events
	events chan event
	lost   error // ErrCompacted: it does not go on

	open  context.Context // until it or the store is closed
	close context.CancelFunc
}

// event is what one of the API's watches says.
type event struct {
	store.Event
	err error
}

// Watch tells the changes after a revision: those of one kind in their order, of several in the order in which the API tells them. After 0
// it begins with what there was when the store was first used.
func (s *Store) Watch(ctx context.Context, prefix string, after store.Revision) (store.Watch, error) {
	if err := errors.Join(store.CheckPrefix(prefix), store.CheckRevision(after)); err != nil {
		return nil, err
	}
	w := &watch{store: s, prefix: prefix, events: make(chan event)}
	at, err := w.from(ctx, after)
	if err != nil {
		return nil, named("watch "+prefix, err)
	}
	w.open, w.close = context.WithCancel(s.open)
	for _, k := range s.space.covered(prefix) {
		go w.follow(k, at)
	}
	return w, nil
}

// from finds the revision that the API is to be asked for changes after.
func (w *watch) from(ctx context.Context, after store.Revision) (store.Revision, error) {
	s := w.store
	if after > 0 {
		now, err := s.now(ctx, w.prefix)
		if err == nil && after > now {
			err = fmt.Errorf("revision %d is not of this cluster, which is at %d: %w", after, now, store.ErrCompacted)
		}
		return after, err
	}
	kvs, at, err := s.list(ctx, w.prefix, store.Revision(s.first.Load()))
	if errors.Is(err, store.ErrCompacted) {
		kvs, at, err = s.List(ctx, w.prefix)
	}
	slices.SortFunc(kvs, func(a, b store.KV) int { return int(a.Revision - b.Revision) })
	for _, kv := range kvs {
		w.told = append(w.told, store.Event{KV: kv})
	}
	return at, err
}

// now asks the API for its revision.
func (s *Store) now(ctx context.Context, prefix string) (at store.Revision, err error) {
	k := s.space.covered(prefix)[0]
	err = s.do(ctx, "list", k, func(ctx context.Context) error {
		list := k.newList()
		if err := s.selecting(k, prefix).Param("limit", "1").Do(ctx).Into(list); err != nil {
			return err
		}
		l, err := meta.ListAccessor(list)
		if err != nil {
			return err
		}
		at, err = revision(l.GetResourceVersion())
		return err
	})
	return at, err
}

// Close ends the watch.
func (w *watch) Close() { w.close() }

// Next blocks until there is a change.
func (w *watch) Next(ctx context.Context) (store.Event, error) {
	e, err := w.next(ctx)
	if err != nil && w.open.Err() != nil {
		err = store.ErrClosed
	}
	return e, named("watch "+w.prefix, err)
}

func (w *watch) next(ctx context.Context) (store.Event, error) {
	if err := errors.Join(w.open.Err(), ctx.Err(), w.lost); err != nil {
		return store.Event{}, err
	}
	if len(w.told) > 0 {
		e := w.told[0]
		w.told = w.told[1:]
		return e, nil
	}
	select {
	case e := <-w.events:
		if errors.Is(e.err, store.ErrCompacted) {
			w.lost = e.err
		}
		return e.Event, e.err
	case <-w.open.Done():
		return store.Event{}, w.open.Err()
	case <-ctx.Done():
		return store.Event{}, ctx.Err()
	}
}

// tell hands something to Next and tells whether the watch goes on.
func (w *watch) tell(e store.Event, err error) bool {
	select {
	case w.events <- event{e, err}:
		return true
	case <-w.open.Done():
		return false
	}
}

// follow watches one kind after a revision until the watch ends.
func (w *watch) follow(k *kind, at store.Revision) {
	f := &follower{watch: w, kind: k, at: at, values: make(map[string]uint64)}
	pauses := backoff()
	for w.open.Err() == nil {
		begin := time.Now()
		err := f.stream()
		if time.Since(begin) > short {
			pauses = backoff()
		}
		switch {
		case k.optional && errors.Is(err, errAbsent):
			if !f.appear() {
				return
			}
			continue
		case errors.Is(err, store.ErrCompacted):
			w.tell(store.Event{}, err)
			return
		case errors.Is(err, store.ErrDenied):
			if !w.tell(store.Event{}, err) {
				return
			}
		case err == nil:
		default:
			if f.failed.IsZero() {
				f.failed = begin
			}
			if time.Since(f.failed) >= w.store.timeout {
				if !w.tell(store.Event{}, err) {
					return
				}
				f.failed = time.Time{}
			}
		}
		if err != nil || time.Since(begin) < short {
			pause.For(w.open, pauses.Step())
		}
	}
}

// follower is one of the API's watches.
type follower struct {
	*watch
	kind   *kind
	at     store.Revision    // what was heard
	failed time.Time         // since when nothing is heard; zero: it goes
	values map[string]uint64 // hashes of what was told of kinds that change often in what is nothing to us
}

var seed = maphash.MakeSeed()

// stream tells what the API says until it ends the request.
func (f *follower) stream() error {
	s := f.store
	if f.open.Err() != nil {
		return store.ErrClosed
	}
	err := s.events(f.open, s.selecting(f.kind, f.prefix).Param("allowWatchBookmarks", "true"), fmt.Sprint(f.at), func() { f.failed = time.Time{} }, f.receive)
	return s.explain(f.open, "watch", f.kind, err)
}

// events has the API tell what comes after a version until it ends that, or fn or it fails. It has the store's timeout to begin, which
// begun hears of.
func (s *Store) events(open context.Context, r *rest.Request, after string, begun func(), fn func(apiwatch.Event) error) error {
	ctx, cancel := context.WithCancel(open)
	defer cancel()
	answer := time.AfterFunc(s.timeout, cancel)
	seconds := int(renew.Seconds()/2) + rand.IntN(int(renew.Seconds()/2))
	api, err := r.Param("watch", "true").Param("resourceVersion", after).Param("timeoutSeconds", fmt.Sprint(seconds)).Watch(ctx)
	if !answer.Stop() && err == nil {
		api.Stop()
		err = context.DeadlineExceeded
	}
	if err != nil {
		if open.Err() == nil && ctx.Err() != nil {
			err = context.DeadlineExceeded // ours
		}
		return err
	}
	defer api.Stop()
	begun()
	for e := range api.ResultChan() {
		if err := fn(e); err != nil {
			return err
		}
	}
	return nil
}

// receive takes one event.
func (f *follower) receive(e apiwatch.Event) error {
	switch e.Type {
	case apiwatch.Error:
		return apierrors.FromObject(e.Object)
	case apiwatch.Bookmark:
		m, err := meta.Accessor(e.Object)
		if err != nil {
			return err
		}
		at, err := revision(m.GetResourceVersion())
		f.at = max(f.at, at)
		return err
	}
	return f.take(e.Object, e.Type == apiwatch.Deleted)
}

// take tells of an object.
func (f *follower) take(o runtime.Object, deleted bool) error {
	kv, there, err := f.store.space.read(f.kind, o)
	if err != nil {
		return err
	}
	f.at = max(f.at, kv.Revision)
	if kv.Key == "" || !strings.HasPrefix(kv.Key, f.prefix) {
		return nil
	}
	event := store.Event{KV: kv, Deleted: deleted || !there}
	if event.Deleted {
		event.Value = nil
	}
	if f.kind.readOnly { // a pod's status changes several times for one time that it is something to us
		was, known := f.values[kv.Key]
		sum := maphash.Bytes(seed, kv.Value)
		switch {
		case event.Deleted && !deleted && !known: // on its node's own network, it was never there
			return nil
		case event.Deleted:
			delete(f.values, kv.Key)
		case known && was == sum:
			return nil
		default:
			f.values[kv.Key] = sum
		}
	}
	if !f.tell(event, nil) {
		return store.ErrClosed
	}
	return nil
}

// appear waits until a kind is served, and then tells of all there is of it. It tells whether the watch goes on.
func (f *follower) appear() bool {
	for pause.For(f.open, f.store.cfg.Look+rand.N(f.store.cfg.Look/4+1)) {
		var all []store.KV
		at, err := f.store.listKind(f.open, f.kind, f.prefix, 0, func(kv store.KV) { all = append(all, kv) })
		if err != nil || at == 0 {
			continue
		}
		slices.SortFunc(all, func(a, b store.KV) int { return int(a.Revision - b.Revision) })
		for _, kv := range all {
			if strings.HasPrefix(kv.Key, f.prefix) && !f.tell(store.Event{KV: kv}, nil) {
				return false
			}
		}
		f.at = at
		return true
	}
	return false
}
