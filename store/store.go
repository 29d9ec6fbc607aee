// Package store is where resources live that all nodes share: keys with values, revisions, and a watch of their changes.
// store/bolt keeps them in a file of one machine, store/etcd in an etcd cluster; store/config says which it is.
// What both must do is in store/storetest.
package store

import (
	"context"
)

// Revision orders the changes of a store. 0 is before the first.
type Revision int64

// KV is a key with its value, which is never nil.
type KV struct {
	Key      string
	Value    []byte
	Revision Revision // of its last change
}

// Event is one change of a key. When it was deleted, Value is nil and Revision that of the deletion.
type Event struct {
	KV
	Deleted bool
}

// Store holds keys such as "/nodes/h1" (see CheckKey) with values of at most MaxValue bytes. It is safe for concurrent
// use. What it can't take is ErrInvalid and changes nothing.
//
// An operation that reaches no store ends within the store's own deadline with ErrUnavailable. Of a change, that error
// says not more than that nobody knows whether it happened: read before trying again.
type Store interface {
	// Get returns a key. ErrNotFound.
	Get(ctx context.Context, key string) (KV, error)
	// List returns all keys that begin with prefix, sorted, as they were at the revision it returns. The prefix is a
	// string, not a path: "/nodes/h1" covers "/nodes/h10", and "" everything.
	List(ctx context.Context, prefix string) ([]KV, Revision, error)
	// Create writes a key that is not there. ErrExists.
	Create(ctx context.Context, key string, value []byte) (Revision, error)
	// Update writes a key whose revision is was: ErrConflict when it is another, ErrNotFound when the key is not there.
	// With was 0 it writes whatever is there or nothing.
	Update(ctx context.Context, key string, value []byte, was Revision) (Revision, error)
	// Delete removes a key whose revision is was; with was 0, whatever is there. ErrNotFound, ErrConflict.
	Delete(ctx context.Context, key string, was Revision) error
	// Watch tells every change after a revision of the keys that begin with prefix. ctx is for the beginning only: the
	// watch goes on until it or the store is closed. After a List, watch from the revision that it returned.
	Watch(ctx context.Context, prefix string, after Revision) (Watch, error)
	// Close ends the store's watches and lets go of all it holds. ErrClosed afterwards.
	Close() error
}

// Watch is a sequence of changes. Next is for one goroutine at a time; Close may be called at any time and wakes it.
type Watch interface {
	// Next blocks until there is a change. Every change comes once, in the order of revisions. Its error is that of
	// ctx; ErrUnavailable when the store can't be heard for the length of its deadline (call Next again: the watch goes on, and loses
	// nothing); ErrCompacted when changes were forgotten before they could be told (list again, then watch from
	// there); ErrDenied; ErrClosed.
	Next(ctx context.Context) (Event, error)
	Close()
}
