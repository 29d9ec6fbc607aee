package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/storetest"
)

const head = `{"kind":"caracal-export","version":1,"revision":3,"keys":%d}` + "\n"

func export(lines ...string) string {
	return fmt.Sprintf(head, len(lines)) + strings.Join(lines, "\n") + "\n"
}

func TestExport(t *testing.T) {
	var out bytes.Buffer
	n, err := store.Export(context.Background(), storetest.Fake(map[string]string{"/b": "\xff", "/a": `{"<": "ä"}`, "/c": ""}), &out)
	want := export(`{"key":"/a","text":"{\"<\": \"ä\"}"}`, `{"key":"/b","base64":"/w=="}`, `{"key":"/c","text":""}`)
	if n != 3 || err != nil || out.String() != want {
		t.Errorf("exported %d keys, %v:\n%swant:\n%s", n, err, out.String(), want)
	}
}

// A line that is wrong changes nothing, and is named.
func TestImportRefuses(t *testing.T) {
	good := `{"key":"/a","text":"1"}`
	for name, test := range map[string]struct{ in, want string }{
		"nothing":       {"", "empty"},
		"no head":       {good + "\n", "line 1: not the head"},
		"other head":    {`{"kind":"other","version":1}` + "\n", "line 1: not the head"},
		"later version": {`{"kind":"caracal-export","version":2,"revision":1,"keys":0}` + "\n", "version 2"},
		"text":          {export(good, "hello"), "line 3"},
		"empty line":    {export(good, ""), "line 3"},
		"unknown field": {export(good, `{"key":"/b","text":"","x":1}`), `line 3: json: unknown field "x"`},
		"two objects":   {export(good, `{"key":"/b","text":""}{}`), "line 3: something follows"},
		"no value":      {export(good, `{"key":"/b"}`), "line 3: one of text and base64"},
		"two values":    {export(good, `{"key":"/b","text":"1","base64":"/w=="}`), "line 3: one of text and base64"},
		"bad base64":    {export(good, `{"key":"/b","base64":"!"}`), "line 3"},
		"bad key":       {export(good, `{"key":"b","text":""}`), "line 3"},
		"large":         {export(good, `{"key":"/b","text":"`+strings.Repeat("x", store.MaxValue+1)+`"}`), "line 3"},
		"very large":    {export(good, `{"key":"/b","text":"`+strings.Repeat("x", 9<<20)+`"}`), "line 3: longer"},
		"twice":         {export(good, good), "line 3: key /a is on line 2 already"},
		"not UTF-8":     {export(good, "{\"key\":\"/b\",\"text\":\"\xff\"}"), "line 3: not UTF-8"},
		"half":          {fmt.Sprintf(head, 2) + good + "\n", "part of the export is missing"},
		"half a line":   {fmt.Sprintf(head, 2) + good + "\n" + good[:9], "line 3"},
	} {
		s := storetest.Fake(nil)
		n, err := store.Import(context.Background(), s, strings.NewReader(test.in), store.WriteOptions{Overwrite: true})
		if n != 0 || !errors.Is(err, store.ErrInvalid) || !strings.Contains(fmt.Sprint(err), test.want) {
			t.Errorf("%s: %d keys, error %v, want %q", name, n, err, test.want)
		}
		if kvs, _, _ := s.List(context.Background(), ""); len(kvs) != 0 {
			t.Errorf("%s: wrote %v", name, kvs)
		}
	}
}

// What was interrupted says how far it came, and is finished by doing it again.
func TestCopyInterrupted(t *testing.T) {
	from, to := storetest.Fake(map[string]string{"/a": "1", "/b": "2", "/c": "3"}), storetest.Fake(nil)
	to.Refuse = func(key string) error {
		if key == "/b" {
			return store.ErrUnavailable
		}
		return nil
	}
	n, err := store.Copy(context.Background(), from, to, "", store.WriteOptions{})
	if n != 1 || !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "after 1 of 3") {
		t.Errorf("copied %d: %v", n, err)
	}
	to.Refuse = nil
	if n, err := store.Copy(context.Background(), from, to, "", store.WriteOptions{}); n != 2 || err != nil {
		t.Errorf("copied the other %d: %v", n, err)
	}
}

func FuzzImport(f *testing.F) {
	f.Add([]byte(export(`{"key":"/a","text":"1"}`, `{"key":"/b","base64":"/w=="}`)))
	f.Add([]byte(export(`{"key":"/a"}`)))
	f.Fuzz(func(t *testing.T, in []byte) {
		s := storetest.Fake(nil)
		n, err := store.Import(context.Background(), s, bytes.NewReader(in), store.WriteOptions{})
		kvs, _, _ := s.List(context.Background(), "")
		if len(kvs) != n || err != nil && n != 0 {
			t.Fatalf("%d keys, said to be %d: %v", len(kvs), n, err)
		}
		var out bytes.Buffer
		if _, err := store.Export(context.Background(), s, &out); err != nil {
			t.Fatal(err)
		}
		if again, err := store.Import(context.Background(), storetest.Fake(nil), &out, store.WriteOptions{}); again != n || err != nil {
			t.Fatalf("imported %d of %d again: %v", again, n, err)
		}
	})
}
