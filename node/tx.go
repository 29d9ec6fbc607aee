package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Tx is one transaction. It is valid only inside the function it was given to.
type Tx struct {
	bolt *bbolt.Tx
}

// check makes sure that this is a node database of a version that this program knows.
func (tx *Tx) check() error {
	meta := tx.bolt.Bucket(bucketMeta)
	if meta == nil {
		return invalid("it is no node database")
	}
	v, err := strconv.Atoi(string(meta.Get([]byte("version"))))
	if err != nil || v < 1 {
		return invalid("schema version %q", meta.Get([]byte("version")))
	}
	if v > SchemaVersion {
		return fmt.Errorf("%w: %d, this program knows %d; use the program that wrote it", ErrVersion, v, SchemaVersion)
	}
	for _, b := range buckets {
		if tx.bolt.Bucket(b) == nil {
			return invalid("bucket %s is missing", b)
		}
	}
	return nil
}

// stamp records the schema's version and the boot that the endpoints belong to.
func (tx *Tx) stamp(boot string) error {
	meta := tx.bolt.Bucket(bucketMeta)
	if err := meta.Put([]byte("version"), []byte(strconv.Itoa(SchemaVersion))); err != nil {
		return err
	}
	return meta.Put([]byte("boot"), []byte(boot))
}

// Boot is the boot id that the endpoints belong to.
func (tx *Tx) Boot() string {
	if b := tx.bolt.Bucket(bucketMeta); b != nil {
		return string(b.Get([]byte("boot")))
	}
	return "" // asked before check
}

// Setting reads a setting, "" when it was never set.
func (tx *Tx) Setting(name string) string {
	return string(tx.bolt.Bucket(bucketSettings).Get([]byte(name)))
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

func each(tx *Tx, bucket []byte, fn func(k, v []byte) error) error {
	return tx.bolt.Bucket(bucket).ForEach(fn)
}

func get(tx *Tx, bucket []byte, key string, into any) error {
	v := tx.bolt.Bucket(bucket).Get([]byte(key))
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
	if err := tx.disown(); err != nil {
		return err
	}
	for _, b := range [][]byte{bucketEndpoints, bucketHostIfs, bucketOwners} {
		if err := tx.bolt.DeleteBucket(b); err != nil {
			return err
		}
		if _, err := tx.bolt.CreateBucket(b); err != nil {
			return err
		}
	}
	return nil
}

// disown frees what is still said to be held when all is released: nobody is left to release it.
func (tx *Tx) disown() error {
	blocks, err := tx.Blocks()
	if err != nil {
		return err
	}
	for _, b := range blocks {
		if b.Used != 0 {
			b.Used = 0
			if err := tx.PutBlock(b); err != nil {
				return err
			}
		}
	}
	var lost []netip.Addr
	err = each(tx, bucketOwners, func(k, _ []byte) error {
		a, err := netip.ParseAddr(string(k))
		if err == nil && slices.ContainsFunc(blocks, func(b Block) bool { return b.CIDR.Contains(a) }) {
			lost = append(lost, a)
		}
		return nil
	})
	if err != nil || len(lost) == 0 {
		return err
	}
	err = tx.Freed(func(a netip.Addr) error {
		lost = slices.DeleteFunc(lost, func(l netip.Addr) bool { return l == a })
		return nil
	})
	for _, a := range lost {
		err = errors.Join(err, tx.Free(a))
	}
	return err
}
