// Package manifest reads resources from YAML or JSON.
package manifest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/api"
)

// Parse reads resources: YAML documents between lines of "---", JSON objects, and lists ("kind: List", or "items" of any
// kind). All are read and validated before any is returned. The error says which document, and on which line it begins.
func Parse(data []byte) ([]api.Resource, error) {
	var all []api.Resource
	for i, doc := range split(data) {
		found, err := parse(doc.text)
		if err != nil {
			return nil, fmt.Errorf("document %d, from line %d: %w", i+1, doc.line, err)
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
	if json.Unmarshal(raw, &list) != nil || list.Items == nil {
		list.Items = []json.RawMessage{raw}
	}
	var all []api.Resource
	for _, item := range list.Items {
		var r api.Resource
		if err := json.Unmarshal(item, &r); err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}
