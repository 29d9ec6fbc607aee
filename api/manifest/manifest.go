// Package manifest reads resources from YAML or JSON.
package manifest

import (
	"fmt"

	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/api"
)

// ParseIPPool reads a pool from YAML or JSON and validates it. A key that it does not know is an error: a misspelt one
// would change nothing, silently.
func ParseIPPool(data []byte) (api.IPPool, error) {
	var p api.IPPool
	if err := yaml.UnmarshalStrict(data, &p); err != nil {
		return api.IPPool{}, fmt.Errorf("parse IPPool: %w: %w", api.ErrInvalid, err)
	}
	return p.Defaulted()
}
