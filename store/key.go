package store

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of what is stored, in bytes.
const (
	MaxKey   = 1024
	MaxValue = 1 << 20
)

// DefaultPrefix is what a store puts before its keys: other programs and later versions may use the same store.
const DefaultPrefix = "/caracal/v1"

// CheckKey says what is wrong with a key: it must be of printable characters and begin with "/". ErrInvalid.
func CheckKey(key string) error {
	if key == "" {
		return fmt.Errorf("%w: an empty key", ErrInvalid)
	}
	return CheckPrefix(key)
}

// CheckPrefix says what is wrong with what keys are to begin with. ErrInvalid.
func CheckPrefix(prefix string) error {
	switch {
	case prefix == "":
		return nil
	case prefix[0] != '/':
		return fmt.Errorf("%w: key %.80q does not begin with /", ErrInvalid, prefix)
	case len(prefix) > MaxKey:
		return fmt.Errorf("%w: key %.80q... of %d bytes is longer than %d", ErrInvalid, prefix, len(prefix), MaxKey)
	case !utf8.ValidString(prefix) || strings.ContainsFunc(prefix, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("%w: key %.80q has characters that can't be printed", ErrInvalid, prefix)
	}
	return nil
}

// CheckWrite says what is wrong with a key and its value. ErrInvalid.
func CheckWrite(key string, value []byte) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if len(value) > MaxValue {
		return fmt.Errorf("%w: the value of %s has %d bytes, more than %d; write it as several smaller ones", ErrInvalid, key, len(value), MaxValue)
	}
	return nil
}

// CheckRevision says whether a revision can be one. ErrInvalid.
func CheckRevision(r Revision) error {
	if r < 0 {
		return fmt.Errorf("%w: revision %d", ErrInvalid, r)
	}
	return nil
}

// Space is the part of a store whose keys begin with it and a "/". The zero value is DefaultPrefix.
type Space string

// NewSpace makes a space of a prefix as a user writes it; "/" is the whole store. ErrInvalid.
func NewSpace(prefix string) (Space, error) {
	if prefix != "/" {
		prefix = strings.TrimRight(prefix, "/")
	}
	return Space(prefix), CheckPrefix(prefix)
}

func (s Space) prefix() string {
	switch s {
	case "":
		return DefaultPrefix
	case "/":
		return ""
	}
	return string(s)
}

// Full is what the store calls a key.
func (s Space) Full(key string) string { return s.prefix() + key }

// Covers is what the store calls a prefix: that of everything in the space when it is "".
func (s Space) Covers(prefix string) string {
	if prefix == "" {
		prefix = "/"
	}
	return s.prefix() + prefix
}

// Key is what we call a key of the store that is in the space.
func (s Space) Key(full string) string { return strings.TrimPrefix(full, s.prefix()) }
