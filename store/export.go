package store

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// An export is JSON lines: a head, then the keys, sorted. A value that is text is written as text.
const (
	exportKind    = "caracal-export"
	exportVersion = 1
	maxLine       = 8 << 20 // a value of MaxValue bytes of which each is escaped
)

type exportHead struct {
	Kind     string   `json:"kind"`
	Version  int      `json:"version"`
	Revision Revision `json:"revision"` // of the store that was exported, for people
	Keys     int      `json:"keys"`     // how many follow, so that half an export is known to be half of one
}

type exportLine struct {
	Key    string  `json:"key"`
	Text   *string `json:"text,omitempty"`
	Base64 []byte  `json:"base64,omitempty"`
}

// Export writes all keys of a store, as they were at one revision, and returns how many. The same content is the same
// bytes after the first line.
func Export(ctx context.Context, s Store, w io.Writer) (int, error) {
	kvs, revision, err := s.List(ctx, "")
	if err != nil {
		return 0, err
	}
	out := bufio.NewWriter(w)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	err = enc.Encode(exportHead{Kind: exportKind, Version: exportVersion, Revision: revision, Keys: len(kvs)})
	for _, kv := range kvs {
		line := exportLine{Key: kv.Key}
		if utf8.Valid(kv.Value) {
			text := string(kv.Value)
			line.Text = &text
		} else {
			line.Base64 = kv.Value
		}
		err = errors.Join(err, enc.Encode(line))
	}
	if err := errors.Join(err, out.Flush()); err != nil {
		return 0, fmt.Errorf("write the export: %w", err)
	}
	return len(kvs), nil
}

// Import writes what Export wrote and returns how many keys it wrote; see Copy for what is there already. A line that can't
// be read or stored is ErrInvalid, with its number, and nothing is written.
func Import(ctx context.Context, s Store, r io.Reader, opts WriteOptions) (int, error) {
	kvs, err := parseExport(r)
	if err != nil {
		return 0, err
	}
	return write(ctx, s, kvs, opts)
}

func parseExport(r io.Reader) ([]KV, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	var head exportHead
	var kvs []KV
	seen := map[string]int{}
	n := 0
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: line %d: %w; nothing was written", ErrInvalid, n, fmt.Errorf(format, args...))
	}
	for lines.Scan() {
		n++
		if n == 1 {
			if err := decode(lines.Bytes(), &head); err != nil || head.Kind != exportKind {
				return nil, bad("not the head of an export")
			}
			if head.Version != exportVersion {
				return nil, bad("version %d of an export, this program knows %d", head.Version, exportVersion)
			}
			continue
		}
		var line exportLine
		if err := decode(lines.Bytes(), &line); err != nil {
			return nil, bad("%w", err)
		}
		if (line.Text == nil) == (line.Base64 == nil) {
			return nil, bad("one of text and base64 is needed")
		}
		kv := KV{Key: line.Key, Value: line.Base64}
		if line.Text != nil {
			kv.Value = []byte(*line.Text)
		}
		if err := CheckWrite(kv.Key, kv.Value); err != nil {
			return nil, bad("%w", err)
		}
		if first := seen[kv.Key]; first != 0 {
			return nil, bad("key %s is on line %d already", kv.Key, first)
		}
		seen[kv.Key] = n
		kvs = append(kvs, kv)
	}
	if err := lines.Err(); err != nil {
		n++
		if errors.Is(err, bufio.ErrTooLong) {
			return nil, bad("longer than %d bytes", maxLine)
		}
		return nil, fmt.Errorf("read the export: %w; nothing was written", err)
	}
	if n == 0 {
		return nil, fmt.Errorf("%w: an empty file is no export; nothing was written", ErrInvalid)
	}
	if len(kvs) != head.Keys {
		return nil, bad("%d keys are here, the head says %d: part of the export is missing", len(kvs), head.Keys)
	}
	slices.SortFunc(kvs, func(a, b KV) int { return strings.Compare(a.Key, b.Key) })
	return kvs, nil
}

// decode reads one JSON object and nothing else.
func decode(line []byte, into any) error {
	if !utf8.Valid(line) { // what the library would mend, and so change
		return errors.New("not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the object")
	}
	return nil
}
