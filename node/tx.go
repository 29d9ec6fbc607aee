package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Tx is one transaction. It is valid only inside the function it was given to.
type Tx struct {
	bolt *bbolt.Tx
}

// version returns the schema's version, 0 for a database that was just made.
func (tx *Tx) version() (int, error) {
	b := tx.bolt.Bucket(bucketMeta)
	if b == nil {
		return 0, nil
	}
	v, err := strconv.Atoi(string(b.Get([]byte("version"))))
	if err != nil {
		return 0, fmt.Errorf("schema version: %w", bolterrors.ErrInvalid)
	}
	if v > SchemaVersion {
		return v, fmt.Errorf("%w: %d, this program knows %d; use the program that wrote it", ErrVersion, v, SchemaVersion)
	}
	return v, nil
}

// Boot is the boot id that the endpoints belong to.
func (tx *Tx) Boot() string {
	if b := tx.bolt.Bucket(bucketMeta); b != nil {
		return string(b.Get([]byte("boot")))
	}
	return ""
}

// Setting reads a setting, "" when it was never set.
func (tx *Tx) Setting(name string) string {
	if b := tx.bolt.Bucket(bucketSettings); b != nil {
		return string(b.Get([]byte(name)))
	}
	return ""
}

// PutSetting writes a setting; "" removes it.
func (tx *Tx) PutSetting(name, value string) error {
	b := tx.bolt.Bucket(bucketSettings)
	if value == "" {
		return b.Delete([]byte(name))
	}
	return b.Put([]byte(name), []byte(value))
}

// Settings calls fn for every setting whose name begins with prefix, sorted.
func (tx *Tx) Settings(prefix string, fn func(name, value string) error) error {
	return each(tx, bucketSettings, func(k, v []byte) error {
		if !strings.HasPrefix(string(k), prefix) {
			return nil
		}
		return fn(string(k), string(v))
	})
}

// each walks a bucket; one that does not exist is empty.
func each(tx *Tx, bucket []byte, fn func(k, v []byte) error) error {
	b := tx.bolt.Bucket(bucket)
	if b == nil {
		return nil
	}
	return b.ForEach(fn)
}

func get(tx *Tx, bucket []byte, key string, into any) error {
	b := tx.bolt.Bucket(bucket)
	if b == nil {
		return ErrNotFound
	}
	v := b.Get([]byte(key))
	if v == nil {
		return ErrNotFound
	}
	return decode(v, into)
}

func decode(v []byte, into any) error {
	if err := json.Unmarshal(v, into); err != nil {
		return errors.Join(bolterrors.ErrInvalid, err)
	}
	return nil
}

func put(tx *Tx, bucket []byte, key string, value any) error {
	v, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return tx.bolt.Bucket(bucket).Put([]byte(key), v)
}

// releaseAll releases all endpoints and all addresses.
func (tx *Tx) releaseAll() error {
	var keys []Key
	err := tx.Holdings(func(k Key, _ []Holding) error {
		keys = append(keys, k)
		return nil
	})
	if err != nil {
		return err
	}
	for _, k := range keys {
		if _, err := tx.Release(k); err != nil {
			return err
		}
	}
	for _, b := range [][]byte{bucketEndpoints, bucketHostIfs} {
		if err := tx.bolt.DeleteBucket(b); err != nil {
			return err
		}
		if _, err := tx.bolt.CreateBucket(b); err != nil {
			return err
		}
	}
	return nil
}
