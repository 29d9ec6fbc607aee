package enforce

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/internal/boltfile"
	"github.com/caracal-net/caracal/internal/turn"
	"github.com/caracal-net/caracal/policy"
)

// Files in the state directory.
const (
	fileName   = "policy.db"
	brokenName = "policy.broken" // one that could not be read
	lockName   = "policy.lock"   // who compiles holds it
)

const schemaVersion = "1"

// Buckets of policy.db.
var (
	bucketMeta      = []byte("meta")      // version, node: plain text; numbers: policy.Numbers
	bucketResources = []byte("resources") // api.Resource's key -> its JSON
)

var (
	// ErrNoDatabase says that nothing was ever known of policy on this node.
	ErrNoDatabase = errors.New("no policy is known on this node")
	// ErrCorrupt says that policy.db can't be read.
	ErrCorrupt = errors.New("policy database is corrupt")
)

const patience = 10 * time.Second // for another process to close the file

// saved is what is in policy.db.
type saved struct {
	node      string
	numbers   policy.Numbers
	resources []api.Resource // by key
}

// Resources reads the last known resources about policy of the node with that state directory, by key, and the ids that they
// were given. It changes nothing, and works with an agent and without. ErrNoDatabase, ErrCorrupt.
func Resources(ctx context.Context, dir string) ([]api.Resource, policy.Numbers, error) {
	s, err := read(ctx, dir)
	return s.resources, s.numbers, err
}

// Exists tells whether anything was ever known of policy on the node with that state directory: policy.db is there, or one was
// that could not be read.
func Exists(dir string) bool {
	for _, name := range []string{fileName, brokenName} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}

// NodeName is the name of the node that policy.db is of. ErrNoDatabase, ErrCorrupt.
func NodeName(ctx context.Context, dir string) (name string, err error) {
	err = run(ctx, dir, reading, func(tx *bbolt.Tx) error {
		name = string(tx.Bucket(bucketMeta).Get([]byte("node")))
		return nil
	})
	return name, err
}

func read(ctx context.Context, dir string) (saved, error) {
	var s saved
	var values [][]byte
	err := run(ctx, dir, reading, func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		s.node = string(meta.Get([]byte("node")))
		if text := meta.Get([]byte("numbers")); text != nil {
			if err := json.Unmarshal(text, &s.numbers); err != nil {
				return boltfile.Invalid("numbers: %w", err)
			}
		}
		return tx.Bucket(bucketResources).ForEach(func(_, v []byte) error {
			values = append(values, append([]byte(nil), v...))
			return nil
		})
	})
	if err != nil {
		return saved{}, err
	}
	var errs []error
	if s.resources, errs = Decode(values); errors.Join(errs...) != nil { // not while others wait for the file
		return saved{}, fmt.Errorf("%s: %w: %w", filepath.Join(dir, fileName), ErrCorrupt, errors.Join(errs...))
	}
	return s, nil
}

// Decode reads resources from their JSON, many at a time. Both results have as many elements as texts.
func Decode(texts [][]byte) ([]api.Resource, []error) {
	resources, errs := make([]api.Resource, len(texts)), make([]error, len(texts))
	var wg sync.WaitGroup
	each := max(100, len(texts)/runtime.GOMAXPROCS(0)+1)
	for from := 0; from < len(texts); from += each {
		wg.Go(func() {
			for i := from; i < min(from+each, len(texts)); i++ {
				errs[i] = json.Unmarshal(texts[i], &resources[i])
			}
		})
	}
	wg.Wait()
	return resources, errs
}

// save changes policy.db in one transaction, and makes it if it is not there. A value of nil deletes.
func save(ctx context.Context, dir, nodeName string, resources map[string][]byte, numbers *policy.Numbers, how mode) error {
	path := filepath.Join(dir, fileName)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := create(path); err != nil {
			return fmt.Errorf("make %s: %w", path, err)
		}
	}
	return run(ctx, dir, how, func(tx *bbolt.Tx) error {
		meta, all := tx.Bucket(bucketMeta), tx.Bucket(bucketResources)
		if err := meta.Put([]byte("node"), []byte(nodeName)); err != nil {
			return err
		}
		for _, key := range slices.Sorted(maps.Keys(resources)) { // in the order in which the file has them
			value := resources[key]
			var err error
			if value == nil {
				err = all.Delete([]byte(key))
			} else {
				err = all.Put([]byte(key), value)
			}
			if err != nil {
				return err
			}
		}
		if numbers == nil {
			return nil
		}
		text, err := json.Marshal(numbers)
		if err != nil {
			return err
		}
		return meta.Put([]byte("numbers"), text)
	})
}

func create(path string) error {
	return boltfile.Create(path, func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{bucketMeta, bucketResources} {
			if _, err := tx.CreateBucket(b); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMeta).Put([]byte("version"), []byte(schemaVersion))
	}, nil)
}

// mode is how policy.db is opened.
type mode int

const (
	reading mode = iota
	writing      // outlives this process, and is lost if the machine goes down
	syncing      // waited for to reach the disk
)

// run runs fn in a transaction on policy.db, when it is this process's turn.
func run(ctx context.Context, dir string, how mode, fn func(*bbolt.Tx) error) error {
	path := filepath.Join(dir, fileName)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", path, ErrNoDatabase)
	}
	mine, err := turn.Wait(ctx, path+".lock", how != reading, patience)
	if errors.Is(err, fs.ErrNotExist) && how == reading {
		mine, err = turn.Wait(ctx, path, false, patience) // a copy that nobody writes
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer mine.Close()
	f, err := boltfile.Open(path, boltfile.Options{Timeout: patience, ReadOnly: how == reading, NoSync: how != syncing, Check: checkFile})
	if err != nil {
		return classify(path, err)
	}
	own, err := f.Run(how != reading, func(tx *bbolt.Tx) error {
		if err := checkTx(f, tx); err != nil {
			return err
		}
		return fn(tx)
	})
	return classify(path, errors.Join(own, err, f.Close()))
}

func checkFile(f *os.File) error {
	st, err := f.Stat()
	switch {
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return boltfile.Invalid("not a file but %s", st.Mode().Type())
	case st.Size() < int64(2*os.Getpagesize()): // its two heads
		return boltfile.Invalid("%d bytes long", st.Size())
	}
	return nil
}

func checkTx(f *boltfile.File, tx *bbolt.Tx) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	if size < tx.Size() {
		return boltfile.Invalid("%d bytes long, not %d", size, tx.Size())
	}
	meta := tx.Bucket(bucketMeta)
	if meta == nil || tx.Bucket(bucketResources) == nil {
		return boltfile.Invalid("it is no policy database")
	}
	if v := string(meta.Get([]byte("version"))); v != schemaVersion {
		return fmt.Errorf("version %.20q of a policy database, this program knows %s; use the program that wrote it", v, schemaVersion)
	}
	return nil
}

func classify(path string, err error) error {
	switch {
	case err == nil:
		return nil
	case boltfile.IsCorrupt(err):
		return fmt.Errorf("%s: %w (%w)", path, ErrCorrupt, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}
