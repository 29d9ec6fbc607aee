package ctl

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/policy"
)

// explainDocker says in Docker's words why a container's network lets nobody else in.
func (c *whyCase) explainDocker() {
	if c.Verdict != verdictDenied || c.Ingress == nil || c.Ingress.Action != policy.Deny.String() || !strings.Contains(c.Ingress.By.Policy, "Profile ") {
		return
	}
	theirs := c.dockerNetworks(c.Source)
	on := c.dockerNetworks(c.Destination)
	for _, profile := range slices.Sorted(maps.Keys(on)) {
		if _, both := theirs[profile]; both {
			return
		}
		c.Why += fmt.Sprintf(". %s is on the Docker network %s, which lets in its own containers alone, and %s is not on it; a policy can let in others", c.Destination, on[profile], c.Source)
	}
}

// dockerNetworks are the names of the Docker networks that an end is on, by their profiles.
func (c *whyCase) dockerNetworks(end whyEnd) map[string]string {
	names := make(map[string]string)
	e := c.model.At(end.Address)
	if e == nil {
		return names
	}
	for _, r := range c.resources {
		if r.Kind.Name == "Profile" && slices.Contains(e.Profiles, r.Metadata.Name) {
			if network, is := r.Metadata.Annotations[api.DockerNetworkAnnotation]; is || strings.HasPrefix(r.Metadata.Name, "docker.") {
				names[r.Metadata.Name] = cmp.Or(network, strings.TrimPrefix(r.Metadata.Name, "docker."))
			}
		}
	}
	return names
}
