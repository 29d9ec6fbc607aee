package api

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
)

// FieldError says which field of a resource is wrong: Path is "spec.ingress[0].source.nets[1]".
type FieldError struct {
	Path string
	Err  error // ErrInvalid or ErrUnsupported
}

func (e *FieldError) Error() string { return e.Path + ": " + e.Err.Error() }

func (e *FieldError) Unwrap() error { return e.Err }

// at says below which field an error is.
func at(path string, err error) error {
	var inner *FieldError
	switch {
	case err == nil || path == "":
		return err
	case !errors.As(err, &inner):
		return &FieldError{path, err}
	case strings.HasPrefix(inner.Path, "["):
		return &FieldError{path + inner.Path, inner.Err}
	default:
		return &FieldError{path + "." + inner.Path, inner.Err}
	}
}

func invalid(path, format string, args ...any) error {
	return at(path, fmt.Errorf("%w: %w", ErrInvalid, fmt.Errorf(format, args...)))
}

func unsupported(path, wayOut string) error {
	return at(path, fmt.Errorf("%w; %s", ErrUnsupported, wayOut))
}

func index(list string, i int) string { return fmt.Sprintf("%s[%d]", list, i) }

// Strict decodes JSON in which every key must be known: a misspelt one would change nothing, silently. The error is
// ErrInvalid, and a *FieldError where it is one field's.
func Strict(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	var value json.RawMessage
	err := d.Decode(&value)
	if err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("something follows its end")
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return decode(value, reflect.ValueOf(into).Elem())
}

// decode is json.Unmarshal, but for unknown keys, keys that are there twice, and errors that know their place. It goes into
// structs, lists, maps by strings, and pointers.
func decode(data []byte, v reflect.Value) error {
	into := v.Addr().Interface()
	_, own := into.(json.Unmarshaler)
	_, text := into.(encoding.TextUnmarshaler)
	switch {
	case own || text:
	case string(data) == "null":
		return nil
	case v.Kind() == reflect.Pointer:
		n := reflect.New(v.Type().Elem())
		v.Set(n)
		return decode(data, n.Elem())
	case v.Kind() == reflect.Struct:
		return decodeStruct(data, v)
	case v.Kind() == reflect.Slice:
		var items []json.RawMessage
		if json.Unmarshal(data, &items) != nil {
			return wanted("a list", data)
		}
		v.Set(reflect.MakeSlice(v.Type(), len(items), len(items)))
		for i, item := range items {
			if string(item) == "null" { // a rule that says nothing would match everything
				return invalid(index("", i), "nothing is written there")
			}
			if err := decode(item, v.Index(i)); err != nil {
				return at(index("", i), err)
			}
		}
		return nil
	case v.Kind() == reflect.Map:
		var values map[string]json.RawMessage
		if json.Unmarshal(data, &values) != nil {
			return wanted("keys with values", data)
		}
		v.Set(reflect.MakeMap(v.Type()))
		for _, key := range slices.Sorted(maps.Keys(values)) {
			value := reflect.New(v.Type().Elem()).Elem()
			if err := decode(values[key], value); err != nil {
				return at(printableKey(key), err)
			}
			v.SetMapIndex(reflect.ValueOf(key).Convert(v.Type().Key()), value)
		}
		return nil
	}
	err := json.Unmarshal(data, into)
	var mismatch *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case text && !own && data[0] != '"':
		return wanted(typeNames[reflect.String], data)
	case errors.As(err, &mismatch) && !own:
		return wanted(typeNames[mismatch.Type.Kind()], data)
	case errors.Is(err, ErrInvalid):
		return err
	}
	return fmt.Errorf("%w: %s", ErrInvalid, strings.TrimPrefix(err.Error(), "json: "))
}

func decodeStruct(data []byte, v reflect.Value) error {
	d := json.NewDecoder(bytes.NewReader(data))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return wanted("keys with values", data)
	}
	fields, seen := fieldsOf(v.Type()), make(map[string]bool)
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		key, _ := t.(string) // as every key
		f, known := fields[strings.ToLower(key)]
		switch {
		case !known:
			return invalid(printableKey(key), "unknown field %q", key)
		case seen[f.name]:
			return invalid(f.name, "it is there twice")
		}
		seen[f.name] = true
		if err := decode(value, v.FieldByIndex(f.index)); err != nil {
			return at(f.name, err)
		}
	}
	return nil
}

// printableKey is a key as it stands in a path.
func printableKey(key string) string {
	if len(key) > 80 || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' }) {
		return fmt.Sprintf("%.80q", key)
	}
	return key
}

var typeNames = map[reflect.Kind]string{
	reflect.Bool: "true or false", reflect.String: "a string in quotes",
	reflect.Int: "a whole number", reflect.Int64: "a whole number", reflect.Float64: "a number", reflect.Uint16: "a number between 0 and 65535",
	reflect.Uint8: "a number between 0 and 255",
}

func wanted(what string, data []byte) error {
	return fmt.Errorf("%w: %.80s where %s is wanted", ErrInvalid, data, what)
}

type field struct {
	name  string
	index []int
}

var structs sync.Map // of reflect.Type, its fields by their lower-case names

// fieldsOf finds a struct's fields by their names in JSON, which encoding/json reads in any case.
func fieldsOf(t reflect.Type) map[string]field {
	if known, ok := structs.Load(t); ok {
		return known.(map[string]field)
	}
	fields := make(map[string]field)
	for _, f := range reflect.VisibleFields(t) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" && name != "-" {
			fields[strings.ToLower(name)] = field{name, f.Index}
		}
	}
	structs.Store(t, fields)
	return fields
}
