package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
)

// WriteOptions say how many keys are written at once.
type WriteOptions struct {
	Overwrite bool // keys that are there already with another value
}

// Copy writes all keys that begin with prefix from one store to another and returns how many it wrote: those that are there
// with the same value are left alone, so that an interrupted copy is finished by another. Keys that are there with
// another value are ErrExists before anything is written, unless they are to be overwritten. Keys that only the other
// store has stay.
func Copy(ctx context.Context, from, to Store, prefix string, opts WriteOptions) (int, error) {
	kvs, _, err := from.List(ctx, prefix)
	if err != nil {
		return 0, fmt.Errorf("read the source: %w", err)
	}
	return write(ctx, to, kvs, opts)
}

// write writes keys of which none is written when the store refuses any for what is there already.
func write(ctx context.Context, to Store, kvs []KV, opts WriteOptions) (int, error) {
	there, _, err := to.List(ctx, "")
	if err != nil {
		return 0, fmt.Errorf("read the destination: %w", err)
	}
	old := make(map[string]KV, len(there))
	for _, kv := range there {
		old[kv.Key] = kv
	}
	var todo []KV
	var taken []string
	for _, kv := range kvs {
		was, ok := old[kv.Key]
		if ok && bytes.Equal(was.Value, kv.Value) {
			continue
		}
		if ok && !opts.Overwrite {
			taken = append(taken, kv.Key)
		}
		todo = append(todo, KV{Key: kv.Key, Value: kv.Value, Revision: was.Revision})
	}
	if len(taken) > 0 {
		names := strings.Join(taken[:min(len(taken), 3)], ", ")
		if len(taken) > 3 {
			names += ", ..."
		}
		return 0, fmt.Errorf("%w with another value: %d (%s); nothing was written, say that they are to be overwritten", ErrExists, len(taken), names)
	}
	for n, kv := range todo {
		if kv.Revision == 0 {
			_, err = to.Create(ctx, kv.Key, kv.Value)
		} else {
			_, err = to.Update(ctx, kv.Key, kv.Value, kv.Revision)
		}
		if err != nil {
			return n, errors.Join(fmt.Errorf("after %d of %d keys: %w", n, len(todo), err), again(err))
		}
	}
	return len(todo), nil
}

// again says how to go on where part of the keys are written.
func again(err error) error {
	if errors.Is(err, ErrDenied) || errors.Is(err, ErrNoSpace) {
		return nil // the error has its own way out
	}
	return errors.New("do it again to write the rest")
}
