// Package storetest is what every store must do, as tests.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/caracal-net/caracal/store"
)

// Deadline is far beyond what anything here takes.
const Deadline = 30 * time.Second

// Run runs the suite. open makes a store that is empty; what it needs to be closed later is its own business.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, store.Store)
	}{
		{"one key's life", life},
		{"compare and swap", compareAndSwap},
		{"one of many creates", oneCreates},
		{"counting together", countTogether},
		{"prefixes", prefixes},
		{"values", values},
		{"limits", limits},
		{"a big list", bigList},
		{"a list while others write", listWhileWriting},
		{"watch", watch},
		{"watch resumes", watchResumes},
		{"watch with many writers", watchManyWriters},
		{"cancelled", cancelled},
		{"closed", closed},
		{"copy", copies},
		{"export and import", exportImport},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// Context ends with the deadline.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Deadline)
	t.Cleanup(cancel)
	return ctx
}

// Put writes a key whatever is there.
func Put(t testing.TB, s store.Store, key, value string) store.Revision {
	t.Helper()
	r, err := s.Update(Context(t), key, []byte(value), 0)
	if err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
	return r
}

// Follow watches what comes after what prefix has now, until ctx or the test ends.
func Follow(ctx context.Context, t testing.TB, s store.Store, prefix string) store.Watch {
	t.Helper()
	_, at := list(t, s, prefix)
	w, err := s.Watch(ctx, prefix, at)
	if err != nil {
		t.Fatalf("watch %q: %v", prefix, err)
	}
	t.Cleanup(w.Close)
	return w
}

// Next is the watch's next event.
func Next(t testing.TB, w store.Watch) store.Event {
	t.Helper()
	e, err := w.Next(Context(t))
	if err != nil {
		t.Fatalf("next: %v", err)
	}
	return e
}

// Quiet fails when the watch has anything to tell. It waits no longer than it takes a change of another key to be told.
func Quiet(t testing.TB, s store.Store, w store.Watch, prefix string) {
	t.Helper()
	key := prefix + "quiet"
	r := Put(t, s, key, "")
	if e := Next(t, w); e.Key != key || e.Revision != r {
		t.Errorf("an event that should not be: %+v", e)
	}
}

func list(t testing.TB, s store.Store, prefix string) ([]store.KV, store.Revision) {
	t.Helper()
	kvs, r, err := s.List(Context(t), prefix)
	if err != nil {
		t.Fatalf("list %q: %v", prefix, err)
	}
	return kvs, r
}

func keys(kvs []store.KV) string {
	var all []string
	for _, kv := range kvs {
		all = append(all, kv.Key)
	}
	return strings.Join(all, " ")
}

func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func life(t *testing.T, s store.Store) {
	ctx := Context(t)
	if kvs, _ := list(t, s, ""); len(kvs) != 0 {
		t.Fatalf("not empty: %v", kvs)
	}
	_, err := s.Get(ctx, "/nodes/h1")
	wantErr(t, "get of no key", err, store.ErrNotFound)
	_, err = s.Update(ctx, "/nodes/h1", nil, 7)
	wantErr(t, "update of no key", err, store.ErrNotFound)
	wantErr(t, "delete of no key", s.Delete(ctx, "/nodes/h1", 0), store.ErrNotFound)
	wantErr(t, "delete of no key at a revision", s.Delete(ctx, "/nodes/h1", 7), store.ErrNotFound)

	r1, err := s.Create(ctx, "/nodes/h1", []byte("one"))
	if err != nil || r1 <= 0 {
		t.Fatalf("create: %d, %v", r1, err)
	}
	_, err = s.Create(ctx, "/nodes/h1", []byte("other"))
	wantErr(t, "create of a key that is there", err, store.ErrExists)
	kv, err := s.Get(ctx, "/nodes/h1")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(store.KV{Key: "/nodes/h1", Value: []byte("one"), Revision: r1}, kv); diff != "" {
		t.Errorf("after create (-want +got):\n%s", diff)
	}
	r2, err := s.Update(ctx, "/nodes/h1", []byte("two"), r1)
	if err != nil || r2 <= r1 {
		t.Fatalf("update: %d after %d, %v", r2, r1, err)
	}
	kvs, r := list(t, s, "/nodes/")
	if diff := cmp.Diff([]store.KV{{Key: "/nodes/h1", Value: []byte("two"), Revision: r2}}, kvs); diff != "" || r < r2 {
		t.Errorf("list at %d (-want +got):\n%s", r, diff)
	}
	if err := s.Delete(ctx, "/nodes/h1", r2); err != nil {
		t.Fatalf("delete: %v", err)
	}
	if kvs, r := list(t, s, ""); len(kvs) != 0 || r <= r2 {
		t.Errorf("after delete at %d: %v", r, kvs)
	}
	// A key that comes back has a later revision than it ever had.
	if r3, err := s.Create(ctx, "/nodes/h1", nil); err != nil || r3 <= r2+1 {
		t.Errorf("create again: %d after %d, %v", r3, r2, err)
	}
}

func compareAndSwap(t *testing.T, s store.Store) {
	ctx := Context(t)
	r1 := Put(t, s, "/k", "1")
	r2 := Put(t, s, "/k", "2")
	_, err := s.Update(ctx, "/k", []byte("late"), r1)
	wantErr(t, "update at an old revision", err, store.ErrConflict)
	_, err = s.Update(ctx, "/k", []byte("early"), r2+100)
	wantErr(t, "update at a revision to come", err, store.ErrConflict)
	wantErr(t, "delete at an old revision", s.Delete(ctx, "/k", r1), store.ErrConflict)
	if kv, err := s.Get(ctx, "/k"); err != nil || string(kv.Value) != "2" || kv.Revision != r2 {
		t.Errorf("changed by what failed: %+v, %v", kv, err)
	}
	// A change of another key is none of this one's.
	Put(t, s, "/other", "")
	if _, err := s.Update(ctx, "/k", []byte("3"), r2); err != nil {
		t.Errorf("update: %v", err)
	}
	if err := s.Delete(ctx, "/k", 0); err != nil {
		t.Errorf("delete whatever is there: %v", err)
	}
	_, err = s.Update(ctx, "/k", nil, -1)
	wantErr(t, "update at a negative revision", err, store.ErrInvalid)
	wantErr(t, "delete at a negative revision", s.Delete(ctx, "/k", -1), store.ErrInvalid)
}

// together runs fn n times at once.
func together(n int, fn func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			fn(i)
		})
	}
	close(start)
	wg.Wait()
}

func oneCreates(t *testing.T, s store.Store) {
	for round := range 5 {
		key := fmt.Sprintf("/blocks/%d", round)
		var mu sync.Mutex
		var winners []int
		together(8, func(i int) {
			_, err := s.Create(Context(t), key, fmt.Append(nil, i))
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				winners = append(winners, i)
			} else if !errors.Is(err, store.ErrExists) {
				t.Errorf("create: %v", err)
			}
		})
		kv, err := s.Get(Context(t), key)
		if err != nil || len(winners) != 1 || string(kv.Value) != fmt.Sprint(winners[0]) {
			t.Errorf("round %d: winners %v, value %q, %v", round, winners, kv.Value, err)
		}
		// And one deletes.
		var gone int
		together(8, func(int) {
			err := s.Delete(Context(t), key, kv.Revision)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				gone++
			} else if !errors.Is(err, store.ErrNotFound) {
				t.Errorf("delete: %v", err)
			}
		})
		if gone != 1 {
			t.Errorf("round %d: deleted %d times", round, gone)
		}
	}
}

func countTogether(t *testing.T, s store.Store) {
	const workers, each = 6, 10
	Put(t, s, "/count", "0")
	together(workers, func(int) {
		for range each {
			for {
				kv, err := s.Get(Context(t), "/count")
				if err != nil {
					t.Errorf("get: %v", err)
					return
				}
				n := 0
				if _, err := fmt.Sscan(string(kv.Value), &n); err != nil {
					t.Errorf("value %q: %v", kv.Value, err)
					return
				}
				_, err = s.Update(Context(t), "/count", fmt.Append(nil, n+1), kv.Revision)
				if err == nil {
					break
				}
				if !errors.Is(err, store.ErrConflict) {
					t.Errorf("update: %v", err)
					return
				}
			}
		}
	})
	if kv, err := s.Get(Context(t), "/count"); err != nil || string(kv.Value) != fmt.Sprint(workers*each) {
		t.Errorf("counted to %s, want %d: %v", kv.Value, workers*each, err)
	}
}

func prefixes(t *testing.T, s store.Store) {
	all := []string{"/node", "/nodes", "/nodes-b/x", "/nodes/h1", "/nodes/h1/a", "/nodes/h10", "/nodes/h2", "/nodes0/x", "/z/ä"}
	for _, k := range all {
		Put(t, s, k, k)
	}
	for prefix, want := range map[string]string{
		"":            strings.Join(all, " "),
		"/":           strings.Join(all, " "),
		"/nodes/":     "/nodes/h1 /nodes/h1/a /nodes/h10 /nodes/h2",
		"/nodes/h1":   "/nodes/h1 /nodes/h1/a /nodes/h10",
		"/nodes/h1/":  "/nodes/h1/a",
		"/nodes/h10":  "/nodes/h10",
		"/nodes/h100": "",
		"/z/":         "/z/ä",
	} {
		if kvs, _ := list(t, s, prefix); keys(kvs) != want {
			t.Errorf("%q: %s, want %s", prefix, keys(kvs), want)
		}
	}
	w, err := s.Watch(Context(t), "/nodes/h1/", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if e := Next(t, w); e.Key != "/nodes/h1/a" {
		t.Errorf("watch of another prefix: %+v", e)
	}
	Put(t, s, "/nodes/h10", "new")
	Quiet(t, s, w, "/nodes/h1/")
}

func values(t *testing.T, s store.Store) {
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	w, err := s.Watch(Context(t), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for i, v := range [][]byte{{}, {0}, every, []byte("ä\n\x00b"), bytes.Repeat([]byte{0xff}, store.MaxValue)} {
		key := fmt.Sprintf("/v/%d", i)
		if _, err := s.Create(Context(t), key, v); err != nil {
			t.Fatalf("create of %d bytes: %v", len(v), err)
		}
		kv, err := s.Get(Context(t), key)
		if err != nil || kv.Value == nil || !bytes.Equal(kv.Value, v) {
			t.Errorf("value of %d bytes came back as %d (nil: %t), %v", len(v), len(kv.Value), kv.Value == nil, err)
		}
		if e := Next(t, w); e.Key != key || e.Value == nil || !bytes.Equal(e.Value, v) {
			t.Errorf("value of %d bytes was told as %d of %s", len(v), len(e.Value), e.Key)
		}
	}
	kvs, _ := list(t, s, "")
	if len(kvs) != 5 || kvs[0].Value == nil || !bytes.Equal(kvs[2].Value, every) {
		t.Errorf("listed other values")
	}
}

func limits(t *testing.T, s store.Store) {
	ctx := Context(t)
	Put(t, s, "/there", "x")
	before, r := list(t, s, "")
	for name, key := range map[string]string{
		"empty": "", "relative": "nodes/h1", "control": "/a\nb", "zero": "/a\x00b", "not UTF-8": "/a\xff", "delete": "/a\x7f",
		"long": "/" + strings.Repeat("x", store.MaxKey), "invisible": "/a\u200bb",
	} {
		_, err := s.Get(ctx, key)
		wantErr(t, "get, "+name, err, store.ErrInvalid)
		_, err = s.Create(ctx, key, nil)
		wantErr(t, "create, "+name, err, store.ErrInvalid)
		_, err = s.Update(ctx, key, nil, 0)
		wantErr(t, "update, "+name, err, store.ErrInvalid)
		wantErr(t, "delete, "+name, s.Delete(ctx, key, 0), store.ErrInvalid)
		if key != "" {
			_, _, err = s.List(ctx, key)
			wantErr(t, "list, "+name, err, store.ErrInvalid)
			_, err = s.Watch(ctx, key, 0)
			wantErr(t, "watch, "+name, err, store.ErrInvalid)
		}
	}
	large := make([]byte, store.MaxValue+1)
	_, err := s.Create(ctx, "/large", large)
	wantErr(t, "create of a large value", err, store.ErrInvalid)
	_, err = s.Update(ctx, "/there", large, 0)
	wantErr(t, "update to a large value", err, store.ErrInvalid)
	_, err = s.Watch(ctx, "", -1)
	wantErr(t, "watch after a negative revision", err, store.ErrInvalid)
	after, r2 := list(t, s, "")
	if diff := cmp.Diff(before, after); diff != "" || r != r2 {
		t.Errorf("changed from %d to %d by what is invalid:\n%s", r, r2, diff)
	}
	longest := "/" + strings.Repeat("x", store.MaxKey-1)
	Put(t, s, longest, "")
	if kv, err := s.Get(ctx, longest); err != nil || kv.Key != longest {
		t.Errorf("the longest key: %v", err)
	}
}

func bigList(t *testing.T, s store.Store) {
	const n = 3000
	together(16, func(i int) {
		for k := i; k < n; k += 16 {
			if _, err := s.Create(Context(t), fmt.Sprintf("/big/%04d", k), fmt.Appendf(nil, "value %d", k)); err != nil {
				t.Errorf("create: %v", err)
				return
			}
		}
	})
	Put(t, s, "/bigger", "")
	kvs, _ := list(t, s, "/big/")
	if len(kvs) != n {
		t.Fatalf("%d keys, want %d", len(kvs), n)
	}
	for i, kv := range kvs {
		if kv.Key != fmt.Sprintf("/big/%04d", i) || string(kv.Value) != fmt.Sprintf("value %d", i) || kv.Revision <= 0 {
			t.Fatalf("%d: %+v", i, kv)
		}
	}
}

// listWhileWriting moves a token through many keys, written before it is deleted, so that at every revision there are one or
// two keys with it, and none is missing because the list was read in parts.
func listWhileWriting(t *testing.T, s store.Store) {
	const n = 1100
	for i := range n {
		Put(t, s, fmt.Sprintf("/ring/%04d", i), "-")
	}
	ctx, cancel := context.WithCancel(Context(t))
	written := make(chan struct{})
	go func() {
		defer close(written)
		// From the end to the beginning and back, so that a list in parts would meet it never or twice.
		last := ""
		for i := 0; ctx.Err() == nil; i++ {
			key := fmt.Sprintf("/ring/%04d", []int{n - 1, 0}[i%2])
			if _, err := s.Update(ctx, key, []byte("token"), 0); err != nil {
				break
			}
			if last != "" {
				if _, err := s.Update(ctx, last, []byte("-"), 0); err != nil {
					break
				}
			}
			last = key
		}
	}()
	Put(t, s, "/ring/0000", "token")
	var previous store.Revision
	for range 20 {
		kvs, r := list(t, s, "/ring/")
		tokens := 0
		for _, kv := range kvs {
			if string(kv.Value) == "token" {
				tokens++
			}
			if kv.Revision > r {
				t.Errorf("a key of revision %d in a list of %d", kv.Revision, r)
			}
		}
		if len(kvs) != n || tokens == 0 || tokens > 2 || r < previous {
			t.Errorf("%d keys with %d tokens at %d after %d", len(kvs), tokens, r, previous)
		}
		previous = r
	}
	cancel()
	<-written
}

func watch(t *testing.T, s store.Store) {
	ctx := Context(t)
	Put(t, s, "/w/before", "")
	w := Follow(ctx, t, s, "/w/")
	var want []store.Event
	for i := range 5 {
		key := fmt.Sprintf("/w/%d", i%2)
		r := Put(t, s, key, fmt.Sprint(i))
		want = append(want, store.Event{KV: store.KV{Key: key, Value: fmt.Append(nil, i), Revision: r}})
		Put(t, s, "/other", "")
	}
	if err := s.Delete(ctx, "/w/0", 0); err != nil {
		t.Fatal(err)
	}
	_, deleted := list(t, s, "/w/")
	want = append(want, store.Event{KV: store.KV{Key: "/w/0", Revision: deleted}, Deleted: true})
	var got []store.Event
	for range want {
		got = append(got, Next(t, w))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	// One that waits already is woken.
	event := make(chan store.Event)
	go func() {
		defer close(event)
		e, err := w.Next(Context(t))
		if err != nil {
			t.Errorf("next: %v", err)
		}
		event <- e
	}()
	r := Put(t, s, "/w/late", "")
	if e := <-event; e.Key != "/w/late" || e.Revision != r {
		t.Errorf("woken by %+v", e)
	}
	// A closed one is too.
	go func() { w.Close() }()
	_, err := w.Next(Context(t))
	wantErr(t, "next of a closed watch", err, store.ErrClosed)
}

func watchResumes(t *testing.T, s store.Store) {
	var revisions []store.Revision
	for i := range 10 {
		revisions = append(revisions, Put(t, s, "/r/k", fmt.Sprint(i)))
		Put(t, s, "/other", "")
	}
	for i, after := range append([]store.Revision{0}, revisions...) {
		w, err := s.Watch(Context(t), "/r/", after)
		if err != nil {
			t.Fatal(err)
		}
		for n := i; n < len(revisions); n++ {
			if e := Next(t, w); e.Revision != revisions[n] || string(e.Value) != fmt.Sprint(n) {
				t.Errorf("after %d: %+v, want %d at %d", after, e, n, revisions[n])
			}
		}
		revisions = append(revisions, Put(t, s, "/r/k", fmt.Sprint(len(revisions))))
		if e := Next(t, w); e.Revision != revisions[len(revisions)-1] {
			t.Errorf("after %d: %+v, not the new one", after, e)
		}
		w.Close()
	}
	// A revision that this store has not had yet is of another one, whose changes it can't tell.
	w, err := s.Watch(Context(t), "/r/", revisions[len(revisions)-1]+1000000)
	if err == nil {
		_, err = w.Next(Context(t))
		w.Close()
	}
	wantErr(t, "watch from another store's revision", err, store.ErrCompacted)
}

func watchManyWriters(t *testing.T, s store.Store) {
	const workers, each = 5, 40
	w, err := s.Watch(Context(t), "/m/", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var mu sync.Mutex
	var want, got []store.Event
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range workers * each {
			e, err := w.Next(Context(t))
			if err != nil {
				t.Errorf("next: %v", err)
				return
			}
			got = append(got, e)
		}
	}()
	together(workers, func(i int) {
		for n := range each {
			key, value := fmt.Sprintf("/m/%d", n%3), fmt.Appendf(nil, "%d of %d", n, i)
			r, err := s.Update(Context(t), key, value, 0)
			if err != nil {
				t.Errorf("put: %v", err)
			}
			mu.Lock()
			want = append(want, store.Event{KV: store.KV{Key: key, Value: value, Revision: r}})
			mu.Unlock()
		}
	})
	<-done
	slices.SortFunc(want, func(a, b store.Event) int { return int(a.Revision - b.Revision) })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

func cancelled(t *testing.T, s store.Store) {
	Put(t, s, "/k", "1")
	ctx, cancel := context.WithCancel(Context(t))
	cancel()
	_, err := s.Get(ctx, "/k")
	wantErr(t, "get", err, context.Canceled)
	_, _, err = s.List(ctx, "")
	wantErr(t, "list", err, context.Canceled)
	_, err = s.Create(ctx, "/new", nil)
	wantErr(t, "create", err, context.Canceled)
	_, err = s.Update(ctx, "/k", []byte("2"), 0)
	wantErr(t, "update", err, context.Canceled)
	wantErr(t, "delete", s.Delete(ctx, "/k", 0), context.Canceled)
	_, err = s.Watch(ctx, "", 0)
	wantErr(t, "watch", err, context.Canceled)
	if kvs, _ := list(t, s, ""); keys(kvs) != "/k" || string(kvs[0].Value) != "1" {
		t.Errorf("changed: %v", kvs)
	}

	// The context of the beginning is not that of the watch, and a Next that is given up loses nothing.
	begin, cancel := context.WithCancel(Context(t))
	w, err := s.Watch(begin, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	cancel()
	if e := Next(t, w); e.Key != "/k" {
		t.Errorf("first event %+v", e)
	}
	short, cancel := context.WithTimeout(Context(t), 20*time.Millisecond)
	defer cancel()
	_, err = w.Next(short)
	wantErr(t, "next", err, context.DeadlineExceeded)
	Quiet(t, s, w, "/")
}

func closed(t *testing.T, s store.Store) {
	ctx := Context(t)
	Put(t, s, "/k", "1")
	_, at := list(t, s, "")
	w, err := s.Watch(ctx, "", at)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error)
	go func() {
		_, err := w.Next(ctx)
		waiting <- err
	}()
	if err := s.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	wantErr(t, "a watch that waits", <-waiting, store.ErrClosed)
	_, err = s.Get(ctx, "/k")
	wantErr(t, "get", err, store.ErrClosed)
	_, _, err = s.List(ctx, "")
	wantErr(t, "list", err, store.ErrClosed)
	_, err = s.Create(ctx, "/new", nil)
	wantErr(t, "create", err, store.ErrClosed)
	wantErr(t, "delete", s.Delete(ctx, "/k", 0), store.ErrClosed)
	_, err = s.Watch(ctx, "", 0)
	wantErr(t, "watch", err, store.ErrClosed)
	if err := s.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
	w.Close()
}

func copies(t *testing.T, s store.Store) {
	ctx := Context(t)
	from := Fake(map[string]string{"/a": "1", "/b": "2", "/b/c": "\xff\x00", "/d": ""})
	if n, err := store.Copy(ctx, from, s, "/b", store.WriteOptions{}); n != 2 || err != nil {
		t.Errorf("copied %d keys of 2: %v", n, err)
	}
	if n, err := store.Copy(ctx, from, s, "", store.WriteOptions{}); n != 2 || err != nil {
		t.Errorf("copied %d keys of the 2 others: %v", n, err)
	}
	from.Put("/b", "new")
	from.Put("/e", "")
	n, err := store.Copy(ctx, from, s, "", store.WriteOptions{})
	if n != 0 || !errors.Is(err, store.ErrExists) || !strings.Contains(err.Error(), "/b") {
		t.Errorf("copied %d keys over others: %v", n, err)
	}
	if kvs, _ := list(t, s, ""); keys(kvs) != "/a /b /b/c /d" || string(kvs[1].Value) != "2" {
		t.Errorf("something was written: %v", kvs)
	}
	if n, err := store.Copy(ctx, from, s, "", store.WriteOptions{Overwrite: true}); n != 2 || err != nil {
		t.Errorf("copied %d keys of the 2 that differ: %v", n, err)
	}
	kvs, _ := list(t, s, "")
	if keys(kvs) != "/a /b /b/c /d /e" || string(kvs[1].Value) != "new" || string(kvs[2].Value) != "\xff\x00" {
		t.Errorf("copied %v", kvs)
	}
}

func exportImport(t *testing.T, s store.Store) {
	ctx := Context(t)
	Put(t, s, "/a", `{"x": "<ä>"}`)
	Put(t, s, "/b", "\xff\x00")
	Put(t, s, "/c", "")
	var out bytes.Buffer
	if n, err := store.Export(ctx, s, &out); n != 3 || err != nil {
		t.Fatalf("exported %d: %v", n, err)
	}
	_, want, _ := strings.Cut(out.String(), "\n")
	before, _ := list(t, s, "")
	for _, kv := range before {
		if err := s.Delete(ctx, kv.Key, kv.Revision); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := store.Import(ctx, s, bytes.NewReader(out.Bytes()), store.WriteOptions{}); n != 3 || err != nil {
		t.Fatalf("imported %d: %v", n, err)
	}
	var again bytes.Buffer
	if _, err := store.Export(ctx, s, &again); err != nil {
		t.Fatal(err)
	}
	if _, got, _ := strings.Cut(again.String(), "\n"); got != want {
		t.Errorf("exported again:\n%s\nwant:\n%s", got, want)
	}
}
