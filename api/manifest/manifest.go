// Package manifest reads resources from YAML or JSON.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	yaml3 "gopkg.in/yaml.v3"
	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/api"
)

// Parse reads resources: YAML documents between lines of "---", JSON objects, and lists ("kind: List", or "items" of any
// kind). All are read and validated before any is returned. The error says which document, and the line of the field that is
// wrong, or that the document begins on.
func Parse(data []byte) ([]api.Resource, error) {
	var all []api.Resource
	for i, doc := range split(data) {
		found, err := parse(doc.text)
		if err != nil {
			return nil, fmt.Errorf("document %d, %s: %w", i+1, doc.where(err), err)
		}
		all = append(all, found...)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no resource: %w", api.ErrInvalid)
	}
	return all, nil
}

// document is one of a stream; line is that of its first line, from 1.
type document struct {
	text []byte
	line int
}

// split cuts at lines of "---".
func split(data []byte) []document {
	docs := []document{{line: 1}}
	for i, l := range bytes.SplitAfter(data, []byte("\n")) {
		if string(bytes.TrimRight(l, " \t\r\n")) == "---" {
			docs = append(docs, document{line: i + 2})
			continue
		}
		last := &docs[len(docs)-1]
		last.text = append(last.text, l...)
	}
	return docs
}

func parse(doc []byte) ([]api.Resource, error) {
	raw, err := yaml.YAMLToJSONStrict(doc)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", api.ErrInvalid, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if bytes.Equal(raw, []byte("null")) {
		return nil, nil // nothing but comments
	}
	var list struct {
		Items []json.RawMessage `json:"items"`
	}
	isList := json.Unmarshal(raw, &list) == nil && list.Items != nil
	if !isList {
		list.Items = []json.RawMessage{raw}
	}
	var all []api.Resource
	for i, item := range list.Items {
		var r api.Resource
		if err := json.Unmarshal(item, &r); err != nil {
			if isList {
				err = &itemError{i, err}
			}
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

// itemError is that of an item of a list.
type itemError struct {
	index int
	error
}

func (e *itemError) Unwrap() error { return e.error }

// where says the line that an error is on, counted in the whole stream.
func (d document) where(err error) string {
	var field *api.FieldError
	var root yaml3.Node
	if !errors.As(err, &field) || yaml3.Unmarshal(d.text, &root) != nil {
		return fmt.Sprintf("from line %d", d.line)
	}
	path := field.Path
	var item *itemError
	if errors.As(err, &item) {
		path = fmt.Sprintf("items[%d].%s", item.index, path)
	}
	return fmt.Sprintf("line %d", d.line+line(&root, path)-1)
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
