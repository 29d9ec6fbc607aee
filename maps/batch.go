package maps

import (
	"errors"

	"github.com/cilium/ebpf"
)

// batch is how many entries are read by one system call.
const batch = 1024

// each calls fn for every entry. Those that come and go meanwhile may be seen twice or not at all.
func each[K, V any](m *ebpf.Map, fn func(*K, *V)) error {
	keys, values := make([]K, batch), make([]V, batch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			fn(&keys[i], &values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// removeAll deletes keys; missing ones are not an error.
func removeAll[K any](m *ebpf.Map, keys []K) error {
	for len(keys) > 0 {
		n, err := m.BatchDelete(keys, nil)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		keys = keys[min(n+1, len(keys)):] // behind the one that is missing
	}
	return nil
}
