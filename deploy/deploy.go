// Package deploy is what Caracal is run with: the unit for systemd, and the recipe of the container image.
package deploy

import _ "embed"

// Unit is caracald.service.
//
//go:embed caracald.service
var Unit []byte
