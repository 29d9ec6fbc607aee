package storetest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/caracal-net/caracal/store"
)

// Memory is a store that has no watch and forgets: enough to copy from and to.
type Memory struct {
	mu  sync.Mutex
	at  store.Revision
	kvs map[string]store.KV

	// Refuse, if not nil, says why a key can't be written. For tests of what happens then.
	Refuse func(key string) error
}

var _ store.Store = (*Memory)(nil)

// Fake makes a store in memory of these keys and values.
func Fake(content map[string]string) *Memory {
	m := &Memory{kvs: map[string]store.KV{}}
	for k, v := range content {
		m.Put(k, v)
	}
	return m
}

// Put writes a key.
func (m *Memory) Put(key, value string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at++
	m.kvs[key] = store.KV{Key: key, Value: []byte(value), Revision: m.at}
}

// Get returns a key.
func (m *Memory) Get(_ context.Context, key string) (store.KV, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	kv, ok := m.kvs[key]
	if !ok {
		return store.KV{}, fmt.Errorf("%s: %w", key, store.ErrNotFound)
	}
	return kv, nil
}

// List returns the keys that begin with prefix.
func (m *Memory) List(_ context.Context, prefix string) ([]store.KV, store.Revision, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var kvs []store.KV
	for _, kv := range m.kvs {
		if strings.HasPrefix(kv.Key, prefix) {
			kvs = append(kvs, kv)
		}
	}
	slices.SortFunc(kvs, func(a, b store.KV) int { return strings.Compare(a.Key, b.Key) })
	return kvs, m.at, nil
}

// Create writes a key that is not there.
func (m *Memory) Create(ctx context.Context, key string, value []byte) (store.Revision, error) {
	if _, err := m.Get(ctx, key); err == nil {
		return 0, fmt.Errorf("%s: %w", key, store.ErrExists)
	}
	return m.Update(ctx, key, value, 0)
}

// Update writes a key that is at revision was.
func (m *Memory) Update(ctx context.Context, key string, value []byte, was store.Revision) (store.Revision, error) {
	if m.Refuse != nil {
		if err := m.Refuse(key); err != nil {
			return 0, err
		}
	}
	if kv, err := m.Get(ctx, key); was != 0 && (err != nil || kv.Revision != was) {
		return 0, fmt.Errorf("%s: %w", key, store.ErrConflict)
	}
	m.Put(key, string(value))
	return m.at, nil
}

// Delete removes a key.
func (m *Memory) Delete(_ context.Context, key string, _ store.Revision) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.kvs, key)
	return nil
}

// Watch is not there.
func (m *Memory) Watch(context.Context, string, store.Revision) (store.Watch, error) {
	return nil, fmt.Errorf("watch: %w", store.ErrUnavailable)
}

// Close does nothing.
func (m *Memory) Close() error { return nil }
