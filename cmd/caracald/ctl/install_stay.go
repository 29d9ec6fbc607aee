package ctl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	portholder "github.com/caracal-net/caracal/internal/holder"
)

// listen listens on the health address; nil: nowhere, because nobody wants it or an agent of this node answers there.
func (o *installOptions) listen(cmd *cobra.Command) (net.Listener, error) {
	if o.health == "" {
		return nil, nil
	}
	l, err := (&net.ListenConfig{}).Listen(cmd.Context(), "tcp", o.health)
	if errors.Is(err, unix.EADDRINUSE) {
		h, aerr := askHealth(cmd.Context(), o.health)
		if aerr == nil && h.server == agent.ServerName {
			return nil, nil
		}
		_, text, _ := net.SplitHostPort(o.health) // it was listened on, so it has a port
		port, _ := strconv.Atoi(text)
		who := "another program"
		if p := portholder.Port("tcp", port); p != "" {
			who = p
		}
		return nil, fmt.Errorf("--health %s: %s listens there (ss -ltnp 'sport = :%d' on the host names it); stop it, or choose another address, or none (--health '')", o.health, who, port)
	}
	if err != nil {
		return nil, fmt.Errorf("--health: %w", err)
	}
	return l, nil
}

// stay answers on the health address until the program is told to end.
func (o *installOptions) stay(cmd *cobra.Command, l net.Listener) error {
	where := "the agent's /health"
	if l != nil {
		where = "http://" + l.Addr().String() + "/health"
		s := &http.Server{Handler: o.healthHandler(), ReadHeaderTimeout: 5 * time.Second}
		defer s.Close()
		go func() { _ = s.Serve(l) }() // ends when it is closed
	}
	if o.health == "" {
		where = "nowhere"
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Caracal is installed; staying (SLEEP=true), health: %s\n", where)
	<-cmd.Context().Done()
	return nil
}

// healthHandler answers as the agent's does: 200 while everything is as it was installed.
func (o *installOptions) healthHandler() http.Handler {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, problems []string) {
		if len(problems) == 0 {
			fmt.Fprintln(w, "ok")
			return
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, strings.Join(problems, "\n"))
	}
	mux.HandleFunc("GET /liveness", func(w http.ResponseWriter, _ *http.Request) { answer(w, nil) })
	ready := func(w http.ResponseWriter, _ *http.Request) { answer(w, o.missing()) }
	mux.HandleFunc("GET /readiness", ready)
	mux.HandleFunc("GET /health", ready)
	return mux
}

// missing is what is no longer there as it should be.
func (o *installOptions) missing() []string {
	var problems []string
	for _, i := range o.items {
		if i.Done == doneSkipped || i.Kind == "pool" {
			continue
		}
		_, err := os.Stat(i.Name)
		if err == nil && i.Done != doneKept && !ours(i, o.binDir) {
			err = fmt.Errorf("%s is no longer Caracal's", i.Name)
		}
		if err != nil {
			problems = append(problems, err.Error())
		}
	}
	return problems
}

// health is what a health address answers.
type health struct {
	Healthy  bool     `json:"healthy"`
	Address  string   `json:"address"`
	Problems []string `json:"problems"`

	server string
}

func newHealthCommand(g *globals) *cobra.Command {
	var address string
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "health",
		Short: "Ask whether this node's agent, or its installation, is healthy",
		Long: `health asks what "curl -f http://127.0.0.1:9099/health" does: the agent, whether the node is as the store says; or the container
that has installed Caracal, whether all is still in place. It is the image's health check.

Exit code 1: it is not, or nobody answers.`,
		Example: `  caracalctl health
  caracalctl health --wait 30s
  caracalctl health --address 127.0.0.1:9099 -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h := awaitHealth(cmd.Context(), address, wait)
			t := newTable("HEALTHY", "PROBLEM")
			for _, p := range h.Problems {
				t.add(yesNo(false), p)
			}
			if h.Healthy {
				t.add(yesNo(true), "")
			}
			if err := g.print(cmd, h, t); err != nil || h.Healthy {
				return err
			}
			return errFound
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long it may take to become healthy")
	cmd.Flags().StringVar(&address, "address", defaultHealth, "`ADDRESS` to ask")
	return cmd
}

// awaitHealth asks a health address until it is healthy, or for as long as that may take.
func awaitHealth(ctx context.Context, address string, wait time.Duration) health {
	for end := time.Now().Add(wait); ; {
		h, err := askHealth(ctx, address)
		if err != nil {
			h.Problems = []string{err.Error()}
		}
		if h.Healthy || ctx.Err() != nil || time.Now().After(end) {
			return h
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// askHealth asks a health address.
func askHealth(ctx context.Context, address string) (health, error) {
	h := health{Address: address, Problems: []string{}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/health", nil)
	if err != nil {
		return h, err
	}
	client := http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	r, err := client.Do(req)
	if errors.Is(err, unix.ECONNREFUSED) {
		return h, fmt.Errorf("nobody answers on %s: neither an agent nor an installation runs here", address)
	}
	if err != nil {
		return h, err
	}
	defer r.Body.Close()
	body := make([]byte, 1<<16)
	n, _ := r.Body.Read(body) // the status says it, too
	h.server, h.Healthy = r.Header.Get("Server"), r.StatusCode == http.StatusOK || r.StatusCode == http.StatusNoContent
	if !h.Healthy {
		for line := range strings.Lines(string(body[:n])) {
			h.Problems = append(h.Problems, strings.TrimSpace(line))
		}
	}
	return h, nil
}
