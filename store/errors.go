package store

import "errors"

var (
	// ErrNotFound says that there is no such key.
	ErrNotFound = errors.New("no such key")
	// ErrExists says that the key is there already.
	ErrExists = errors.New("key exists already")
	// ErrConflict says that somebody else changed the key: read it again and decide again.
	ErrConflict = errors.New("key was changed by somebody else; read it again")
	// ErrCompacted says that the changes from a revision on are forgotten: list again, then watch from there.
	ErrCompacted = errors.New("changes of that revision are forgotten; list again")
	// ErrUnavailable says that no store answered in time. Nobody knows whether a change happened then.
	ErrUnavailable = errors.New("store is unavailable; running pods keep running")
	// ErrDenied says that the store does not know us, or does not allow it.
	ErrDenied = errors.New("store denies access")
	// ErrTLS says that a certificate, ours or the store's, can't be used.
	ErrTLS = errors.New("unusable certificate")
	// ErrInvalid says that a key, a value or a line can't be stored. Nothing was changed.
	ErrInvalid = errors.New("invalid")
	// ErrNoSpace says that the store is full. Nothing was changed.
	ErrNoSpace = errors.New("no space left in the store")
	// ErrCorrupt says that a store's file can't be read. It is never overwritten.
	ErrCorrupt = errors.New("store is corrupt; move it away and restore an export of it")
	// ErrClosed says that the store or the watch is closed.
	ErrClosed = errors.New("store is closed")
)
