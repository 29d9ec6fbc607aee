// Package manifest reads resources from YAML or JSON.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	yaml3 "gopkg.in/yaml.v3"
	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/api"
)

// Parse reads resources: YAML documents between lines of "---", JSON objects, and lists ("kind: List", or "items" of any
// kind). All are read and validated before any is returned. The error says which document, and the line of the field that is
// wrong, or that the document begins on.
func Parse(data []byte) ([]api.Resource, error) {
	items, err := Items(data)
	if err != nil {
		return nil, err
	}
	all := make([]api.Resource, len(items))
	for i, item := range items {
		err := item.written()
		if err == nil {
			err = json.Unmarshal(item.JSON, &all[i])
		}
		if err != nil {
			return nil, fmt.Errorf("document %d, %s: %w", item.doc.number, item.where(err), err)
		}
	}
	return all, nil
}

// Item is one resource of a stream as it is written, not judged yet.
type Item struct {
	JSON json.RawMessage // an object
	doc  document
	path string // where in the document: "items[2]", "" when it is all of it
}

// written says what is wrong with an item of a kind that people do not write here.
func (i Item) written() error {
	var is struct {
		Kind string `json:"kind"`
	}
	if json.Unmarshal(i.JSON, &is) == nil && (is.Kind == "Pod" || is.Kind == "Service") {
		return &api.FieldError{Path: "kind", Err: fmt.Errorf("kind %q: %w: it is read from Kubernetes alone; write it there", is.Kind, api.ErrUnsupported)}
	}
	return nil
}

// Items reads what Parse reads, and what calicoctl exports beside: documents may also be parted by lines of "===", and be lists of
// resources. There is at least one, else the error is api.ErrInvalid.
func Items(data []byte) ([]Item, error) {
	var all []Item
	for _, doc := range split(data) {
		raw, err := yaml.YAMLToJSONStrict(doc.text)
		if err != nil {
			return nil, fmt.Errorf("document %d, from line %d: %w: %s", doc.number, doc.line, api.ErrInvalid, strings.TrimPrefix(err.Error(), "yaml: "))
		}
		if bytes.Equal(raw, []byte("null")) {
			continue // nothing but comments
		}
		if all, err = doc.items(all, raw, ""); err != nil {
			return nil, fmt.Errorf("document %d, from line %d: %w", doc.number, doc.line, err)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no resource: %w", api.ErrInvalid)
	}
	return all, nil
}

// items appends the items at a path of the document.
func (d document) items(all []Item, raw json.RawMessage, path string) ([]Item, error) {
	if raw[0] == '[' {
		var list []json.RawMessage
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, fmt.Errorf("%w: %w", api.ErrInvalid, err)
		}
		for i, item := range list {
			var err error
			if all, err = d.items(all, item, fmt.Sprintf("%s[%d]", path, i)); err != nil {
				return nil, err
			}
		}
		return all, nil
	}
	var list struct {
		APIVersion, Kind string
		Items            json.RawMessage
	}
	if json.Unmarshal(raw, &list) != nil || len(list.Items) == 0 || list.Items[0] != '[' {
		return append(all, Item{raw, d, path}), nil
	}
	begin := len(all)
	all, err := d.items(all, list.Items, strings.TrimPrefix(path+".items", "."))
	for i := range all[begin:] {
		all[begin+i].inherit(list.APIVersion, strings.TrimSuffix(list.Kind, "List"))
	}
	return all, err
}

// inherit gives an item that does not say what it is the kind of its list.
func (i *Item) inherit(apiVersion, kind string) {
	var fields map[string]json.RawMessage
	if kind == "" || json.Unmarshal(i.JSON, &fields) != nil || fields == nil || fields["kind"] != nil || fields["apiVersion"] != nil {
		return
	}
	fields["apiVersion"], _ = json.Marshal(apiVersion) // of strings
	fields["kind"], _ = json.Marshal(kind)
	i.JSON, _ = json.Marshal(fields) // of what was JSON
}

// document is one of a stream; line is that of its first line, and number its place, both from 1.
type document struct {
	text         []byte
	line, number int
	tree         func() *yaml3.Node // of its text, nil when it can't be read
}

// parsed reads the document's text for where its fields are, once.
func (d *document) parsed() {
	text := d.text
	d.tree = sync.OnceValue(func() *yaml3.Node {
		var root yaml3.Node
		if yaml3.Unmarshal(text, &root) != nil || root.Kind == 0 {
			return nil
		}
		return &root
	})
}

// split cuts at lines of "---" and "===".
func split(data []byte) []document {
	docs := []document{{line: 1, number: 1}}
	for i, l := range bytes.SplitAfter(data, []byte("\n")) {
		if end := string(bytes.TrimRight(l, " \t\r\n")); end == "---" || end == "===" {
			docs = append(docs, document{line: i + 2, number: len(docs) + 1})
			continue
		}
		last := &docs[len(docs)-1]
		last.text = append(last.text, l...)
	}
	for i := range docs {
		docs[i].parsed()
	}
	return docs
}

// where says the line that an error is on, counted in the whole stream.
func (i Item) where(err error) string {
	var field *api.FieldError
	if !errors.As(err, &field) {
		return fmt.Sprintf("from line %d", i.doc.line)
	}
	return fmt.Sprintf("line %d", i.Line(field.Path))
}

// Line is the line, in the whole stream, of a field of the item, as far as it is there; "" is the item itself.
func (i Item) Line(path string) int {
	root := i.doc.tree()
	if root == nil {
		return i.doc.line
	}
	if i.path != "" {
		path = strings.TrimSuffix(i.path+"."+path, ".")
	}
	return i.doc.line + line(root, path) - 1
}

// line follows a path as far as it is there.
func line(n *yaml3.Node, path string) int {
	at := n.Line
	for n != nil {
		switch n.Kind {
		case yaml3.DocumentNode:
			n = n.Content[0]
			continue
		case yaml3.AliasNode:
			n = n.Alias
			continue
		}
		key, value, rest := step(n, path)
		if key == nil {
			break
		}
		at, n, path = key.Line, value, rest
	}
	return at
}

// step takes the first word of a path, which may have dots in it: "matchLabels.kubernetes.io/name".
func step(n *yaml3.Node, path string) (key, value *yaml3.Node, rest string) {
	if word, after, ok := strings.Cut(path, "]"); ok && strings.HasPrefix(word, "[") && n.Kind == yaml3.SequenceNode {
		i, err := strconv.Atoi(word[1:])
		if err != nil || i >= len(n.Content) {
			return nil, nil, ""
		}
		return n.Content[i], n.Content[i], strings.TrimPrefix(after, ".")
	}
	if n.Kind != yaml3.MappingNode {
		return nil, nil, ""
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		word := n.Content[i].Value
		if len(path) < len(word) || !strings.EqualFold(path[:len(word)], word) || word == "" {
			continue
		}
		after := path[len(word):]
		if after == "" || after[0] == '.' || after[0] == '[' {
			return n.Content[i], n.Content[i+1], strings.TrimPrefix(after, ".")
		}
	}
	return nil, nil, ""
}
