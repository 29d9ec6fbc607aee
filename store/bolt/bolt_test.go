package bolt

import (
	"testing"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/storetest"
)

func newStore(t *testing.T, dir string, opts Options) *Store {
	t.Helper()
	s, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return newStore(t, t.TempDir(), Options{History: 5000}) })
}
