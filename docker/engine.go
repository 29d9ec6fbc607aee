package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

// engine asks Docker's API (https://docs.docker.com/engine/api/).
type engine struct{ client *http.Client }

func newEngine(path string) *engine {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	return &engine{&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: engineTakes}}
}

const (
	engineTakes = 10 * time.Second
	maxAnswer   = 16 << 20 // bytes of an answer
)

// errNoSuch says that Docker has no such thing.
var errNoSuch = errors.New("docker knows none of that name")

func (g *engine) get(ctx context.Context, path string, into any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return err
	}
	answer, err := g.client.Do(r)
	if err != nil {
		return fmt.Errorf("ask docker: %w", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusNotFound {
		return fmt.Errorf("%s: %w", path, errNoSuch)
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("ask docker for %s: %s", path, answer.Status)
	}
	if err := json.NewDecoder(io.LimitReader(answer.Body, maxAnswer)).Decode(into); err != nil {
		return fmt.Errorf("docker's answer to %s: %w", path, err)
	}
	return nil
}

// engineNetwork is a network as Docker describes it.
type engineNetwork struct {
	Name       string
	ID         string `json:"Id"`
	Scope      string
	Driver     string
	Containers map[string]struct { // by container's id, or of another host's "ep-" and the endpoint's id
		Name       string
		EndpointID string
	}
}

// network asks for a network. errNoSuch.
func (g *engine) network(ctx context.Context, id string) (engineNetwork, error) {
	var n engineNetwork
	err := g.get(ctx, "/networks/"+url.PathEscape(id), &n)
	return n, err
}

// labels asks for a container's.
func (g *engine) labels(ctx context.Context, container string) (map[string]string, error) {
	var c struct {
		Config struct{ Labels map[string]string }
	}
	err := g.get(ctx, "/containers/"+url.PathEscape(container)+"/json", &c)
	return c.Config.Labels, err
}
