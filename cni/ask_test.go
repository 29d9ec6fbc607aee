package cni

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAsk: a server's consent, its objection, its end and its silence.
func TestAsk(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	say := func(value any, wait time.Duration) error {
		return ask(context.Background(), socket, "/say", nil, value, wait)
	}
	if err := say(1, time.Minute); !errors.Is(err, errNoAgent) {
		t.Errorf("without a socket: %v", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := say(1, 50*time.Millisecond); !errors.Is(err, errSilent) { // connected, but never accepted
		t.Errorf("of a silent one: %v", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /say", func(w http.ResponseWriter, r *http.Request) {
		switch b, _ := io.ReadAll(r.Body); string(b) {
		case `"yes"`:
		case `"much"`:
			_, _ = w.Write(make([]byte, 1<<20))
		case `"die"`:
			panic(http.ErrAbortHandler)
		case `"sleep"`:
			<-r.Context().Done()
		default:
			http.Error(w, "not "+string(b)+"\nnor anything else", http.StatusConflict)
		}
	})
	s := &http.Server{Handler: mux}
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	for value, want := range map[string]error{"yes": nil, "much": nil, "die": errNoAgent} {
		if err := say(value, time.Minute); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", value, err, want)
		}
	}
	if err := say("sleep", 50*time.Millisecond); !errors.Is(err, errSilent) {
		t.Errorf("of one that sleeps: %v", err)
	}
	if err := say("no", time.Minute); !errors.Is(err, errRefused) || err.Error() != `the agent refuses: not "no"` {
		t.Errorf("%v", err)
	}
	if err := ask(context.Background(), socket, "/other", nil, 1, time.Minute); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("at a place that is not there: %v", err)
	}
	s.Close()
	<-served
	if err := say(1, time.Minute); !errors.Is(err, errNoAgent) {
		t.Errorf("after the end: %v", err)
	}
}

// FuzzAnswer: whatever a socket says is consent, or an error in one line.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 204 No Content\r\nDate: x\r\n\r\n", "HTTP/1.0 409 Conflict\r\nContent-Type: text/plain\r\n\r\nno\r\n",
		"HTTP/1.0 500", "HTTP/1.0 500 \n", "HTTP/2 200\r\n", "HTTP/1.0 0x1\r\n", "200 OK\r\n", "\x00\xff\n", "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := readAnswer(b)
		if err == nil && !strings.HasPrefix(string(b), "HTTP/1.") {
			t.Fatalf("%q is consent", b)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Fatalf("%q: %q", b, err)
		}
	})
}
