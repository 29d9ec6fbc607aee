package kube_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/storetest"
	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
)

// proxy is before a real API and does it wrong.
type proxy struct {
	url string

	mu    sync.Mutex
	fault func(w http.ResponseWriter, r *http.Request) bool // nil: none. It tells whether it has answered
	seen  map[string]int                                    // how many requests there were, by method; those of watches are "WATCH"
}

func newProxy(t *testing.T, s *apiserver.Server) *proxy {
	t.Helper()
	transport, err := rest.TransportFor(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	api, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{seen: make(map[string]int)}
	forward := httputil.NewSingleHostReverseProxy(api)
	forward.Transport, forward.FlushInterval = transport, -1
	forward.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		method := r.Method
		if r.URL.Query().Get("watch") != "" {
			method = "WATCH"
		}
		p.mu.Lock()
		p.seen[method]++
		fault := p.fault
		p.mu.Unlock()
		if fault == nil || !fault(w, r) {
			forward.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	p.url = server.URL
	return p
}

// set sets a fault, and begins to count anew.
func (p *proxy) set(fault func(w http.ResponseWriter, r *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault, p.seen = fault, make(map[string]int)
}

func (p *proxy) count(method string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen[method]
}

// first is a fault of the first n requests.
func first(n int, fault http.HandlerFunc) func(w http.ResponseWriter, r *http.Request) bool {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if n--; n < 0 {
			return false
		}
		fault(w, r)
		return true
	}
}

func tooMany(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) }

func later1s(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusTooManyRequests)
}

func failing(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }

// faults is what an API does wrong that is busy, slow or cut off.
func faults(t *testing.T, s *apiserver.Server) {
	p := newProxy(t, s)
	k := open(t, s, kube.Config{Kubeconfig: "/dev/null", Endpoint: p.url, Prefix: "/faults"})
	const timeout = 300 * time.Millisecond
	hasty := open(t, s, kube.Config{Kubeconfig: "/dev/null", Endpoint: p.url, Prefix: "/faults", Timeout: timeout})
	ctx := storetest.Context(t)
	write := func(n int) (store.Revision, error) { return k.Update(ctx, "/k", fmt.Append(nil, n), 0) }
	if _, err := write(0); err != nil {
		t.Fatal(err)
	}

	// Busy: as long as it says, or a little.
	for name, fault := range map[string]http.HandlerFunc{"429": tooMany, "429 for a second": later1s} {
		p.set(first(2, fault))
		begin := time.Now()
		_, err := write(1)
		if fault := p.count(http.MethodPost); err != nil || fault < 3 {
			t.Errorf("%s: %v after %d requests in %s", name, err, fault, time.Since(begin))
		}
		if name != "429" && time.Since(begin) < 2*time.Second {
			t.Errorf("%s twice, and written in %s", name, time.Since(begin))
		}
	}
	for name, fault := range map[string]http.HandlerFunc{
		"429 always": tooMany,
		"silent":     func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"cut off":    func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"failing":    failing,
		"not JSON":   func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"not ours": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, `{"kind":"Pod"}`)
		},
	} {
		p.set(func(w http.ResponseWriter, r *http.Request) bool { fault(w, r); return true })
		begin := time.Now()
		_, err := hasty.Get(ctx, "/k")
		_, _, list := hasty.List(ctx, "/")
		for what, err := range map[string]error{"get": err, "list": list} {
			if !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		if took := time.Since(begin); took > 2*timeout+3*time.Second {
			t.Errorf("%s took %s", name, took)
		}
	}
	p.set(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
	cancelled, cancel := context.WithCancel(ctx)
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := k.Get(cancelled, "/k"); !errors.Is(err, context.Canceled) || errors.Is(err, store.ErrUnavailable) {
		t.Errorf("given up: %v", err)
	}

	// What reads may be tried again; what may have been written not.
	p.set(first(2, failing))
	if kv, err := k.Get(ctx, "/k"); err != nil || string(kv.Value) != "1" {
		t.Errorf("failing twice: %s, %v", kv.Value, err)
	}
	p.set(first(1, failing))
	if _, err := k.Create(ctx, "/new", nil); !errors.Is(err, store.ErrUnavailable) || p.count(http.MethodPost) != 1 {
		t.Errorf("a create that may have happened: %v, tried %d times", err, p.count(http.MethodPost))
	}

	// A watch that is cut again and again, refused and silent in between, tells everything once, and lists nothing.
	p.set(nil)
	w := storetest.Follow(ctx, t, k, "/")
	n := 0
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("watch") == "" {
			return false
		}
		p.mu.Lock()
		n++
		turn := n
		p.mu.Unlock()
		switch turn % 4 {
		case 0:
			later1s(w, r)
			return true
		case 1:
			failing(w, r)
			return true
		}
		// What comes through is cut after a moment.
		cut, cancel := context.WithCancel(r.Context())
		time.AfterFunc(150*time.Millisecond, cancel)
		*r = *r.WithContext(cut)
		return false
	})
	const changes = 60
	written := make(chan struct{})
	defer func() { <-written }()
	go func() {
		defer close(written)
		for i := range changes {
			if _, err := write(100 + i); err != nil {
				t.Errorf("write: %v", err)
			}
			time.Sleep(20 * time.Millisecond) // changes over some cuts
		}
	}()
	for i := range changes {
		e, err := w.Next(ctx)
		if err != nil || string(e.Value) != fmt.Sprint(100+i) {
			t.Fatalf("change %d: %s, %v", i, e.Value, err)
		}
	}
	if watches, lists := p.count("WATCH"), p.count(http.MethodGet); watches < 3 || lists > 0 {
		t.Errorf("watched %d times, listed %d times", watches, lists)
	}

	// What is forgotten between two parts of a list is listed anew.
	p.set(nil)
	fill(t, k, 501)
	gone := 0
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("continue") == "" || gone > 0 {
			return false
		}
		gone++
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusGone)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410,"message":"the provided continue parameter is too old"}`)
		return true
	})
	if kvs, _, err := k.List(ctx, "/many/"); len(kvs) != 501 || err != nil || gone != 1 {
		t.Errorf("%d keys: %v", len(kvs), err)
	}
}

// fill creates keys, some at once.
func fill(t *testing.T, k *kube.Store, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := worker; i < n; i += 8 {
				if _, err := k.Create(storetest.Context(t), fmt.Sprintf("/many/%d", i), nil); err != nil {
					t.Errorf("create: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// credentials go bad and are put right, as a kubelet does with those of a pod: who has them goes on.
func credentials(t *testing.T, s *apiserver.Server) {
	ctx := t.Context()
	s.Kubectl("", "apply", "-f", filepath.Join(filepath.Dir(crds(t)), "rbac.yaml"))
	dir := t.TempDir()
	token, ca := filepath.Join(dir, "token"), filepath.Join(dir, "ca.crt")
	write := func(file string, text []byte) {
		t.Helper()
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	copyTo := func(file, from string) {
		t.Helper()
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		write(file, text)
	}
	copyTo(ca, filepath.Join(s.Dir, "ca.crt"))
	write(token, []byte("wrong"))
	k := open(t, s, kube.Config{Timeout: 5 * time.Second, Inline: fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: c}}],
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}], users: [{name: c, user: {tokenFile: %q}}]}`, s.URL, ca, token)})
	works := func(what string) {
		t.Helper()
		testenv.Eventually(t, storetest.Deadline, what, func() error {
			if _, err := k.Get(ctx, "/ippools/x"); !errors.Is(err, store.ErrNotFound) {
				return err
			}
			return nil
		})
	}
	if _, err := k.Get(ctx, "/ippools/x"); !errors.Is(err, store.ErrDenied) || !strings.Contains(err.Error(), "is the token or the certificate expired") {
		t.Errorf("a token that is wrong: %v", err)
	}
	write(token, []byte(strings.TrimSpace(s.Kubectl("", "-n", "kube-system", "create", "token", "caracal-node"))))
	works("a token that is right")

	other := s.Reissue("other")
	s.Stop()
	s.Restart()
	for _, what := range []string{"get", "again"} {
		if _, err := k.Get(ctx, "/ippools/x"); !errors.Is(err, store.ErrTLS) || !strings.Contains(err.Error(), "unknown authority") {
			t.Errorf("a certificate of another authority: %s: %v", what, err)
		}
	}
	copyTo(ca, other)
	works("the other authority's file")
	s.Reissue("ca")
	s.Stop()
	s.Restart()
	copyTo(ca, filepath.Join(s.Dir, "ca.crt"))
	works("the first authority's file")
}

// away takes the API away: a watch says so, and goes on when it is back, or says that it can't.
func away(t *testing.T, s *apiserver.Server) {
	hasty, patient := open(t, s, kube.Config{Timeout: 3 * time.Second}), open(t, s, kube.Config{})
	ctx, cancel := context.WithTimeout(t.Context(), 4*storetest.Deadline)
	defer cancel()
	storetest.Put(t, patient, "/tiers/away", `{"apiVersion":"projectcalico.org/v3","kind":"Tier","metadata":{"name":"away"},"spec":{}}`)
	w := storetest.Follow(ctx, t, hasty, "/tiers/")
	// It hangs.
	resume := s.Pause()
	_, err := hasty.Get(ctx, "/tiers/x")
	resume()
	if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "did not answer within 3s") {
		t.Errorf("get while it hangs: %v", err)
	}
	if _, err = patient.Get(ctx, "/tiers/away"); err != nil {
		t.Errorf("get when it goes on: %v", err)
	}
	// It is gone.
	s.Kubectl("", "label", "namespace", "default", "later=x") // what its new process has not in memory, when it is back
	s.Stop()
	if _, err := hasty.Get(ctx, "/tiers/away"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("get while it is away: %v", err)
	}
	if e, err := w.Next(ctx); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("watch while it is away: %+v, %v", e, err)
	}
	s.Restart()
	for err = nil; err == nil || errors.Is(err, store.ErrUnavailable); _, err = w.Next(ctx) {
	}
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("a watch from before a restart: %v", err)
	}
	if _, err := w.Next(ctx); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("and again: %v", err)
	}
	w2 := storetest.Follow(ctx, t, patient, "/")
	s.Kubectl("", "label", "namespace", "default", "later=y", "--overwrite")
	if e := storetest.Next(t, w2); e.Key != "/namespaces/default" || !strings.Contains(string(e.Value), `"later":"y"`) {
		t.Errorf("after a restart: %+v", e)
	}
}
