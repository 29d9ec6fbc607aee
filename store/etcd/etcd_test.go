package etcd

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/store"
)

func TestEndpoints(t *testing.T) {
	for text, want := range map[string]string{
		"http://10.0.0.1:2379":                   "plain",
		"http://[2001:db8::1]:2379,http://h:1":   "plain",
		"https://h:2379/":                        "secure",
		"https://h1:2379,https://h2:2379":        "secure",
		"":                                       "refused",
		"h:2379":                                 "refused",
		"http://h":                               "refused",
		"http://:2379":                           "refused",
		"ftp://h:2379":                           "refused",
		"http://u:p@h:2379":                      "refused",
		"http://h:2379/x":                        "refused",
		"http://h:2379?x":                        "refused",
		"http://h1:2379,https://h2:2379":         "refused",
		"http://h1:2379,h2:2379":                 "refused",
		"https://h1:2379,https://h2:2379,http:/": "refused",
	} {
		var endpoints []string
		if text != "" {
			endpoints = strings.Split(text, ",")
		}
		secure, err := checkEndpoints(endpoints)
		got := map[bool]string{true: "secure", false: "plain"}[secure]
		if err != nil {
			got = "refused"
			if !errors.Is(err, store.ErrInvalid) {
				t.Errorf("%q: %v", text, err)
			}
		}
		if got != want {
			t.Errorf("%q: %s, want %s: %v", text, got, want, err)
		}
	}
}

// Who opens a store waits for nobody, and who uses it not longer than its deadline, with a login or without: where nobody
// listens, and where somebody does but never answers.
func TestNobodyThere(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	absent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	absent.Close()
	const timeout = 300 * time.Millisecond
	for _, addr := range []string{silent.Addr().String(), absent.Addr().String()} {
		for _, user := range []string{"", "node"} {
			s, err := Open(Config{Endpoints: []string{"http://" + addr}, Username: user, Password: user, Timeout: timeout})
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			_, err = s.Get(context.Background(), "/k")
			_, write := s.Create(context.Background(), "/k", nil)
			_, watch := s.Watch(context.Background(), "", 0)
			for what, err := range map[string]error{"get": err, "create": write, "watch": watch} {
				if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), addr) {
					t.Errorf("%s, user %q, %s: %v", addr, user, what, err)
				}
			}
			if took := time.Since(begin); took > 3*timeout+3*time.Second {
				t.Errorf("%s, user %q took %s", addr, user, took)
			}
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(20*time.Millisecond, cancel)
			if _, err := s.Get(ctx, "/k"); !errors.Is(err, context.Canceled) || errors.Is(err, store.ErrUnavailable) {
				t.Errorf("%s, user %q, given up: %v", addr, user, err)
			}
			if err := s.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
	}
}

// What the library says of its retries is for who asks for it.
func TestLogger(t *testing.T) {
	for level, want := range map[slog.Level]bool{slog.LevelDebug: true, slog.LevelInfo: false} {
		var out bytes.Buffer
		log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level}))
		s, err := Open(Config{Endpoints: []string{"http://127.0.0.1:1"}, Timeout: 200 * time.Millisecond, Logger: log})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(context.Background(), "/k"); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("get: %v", err)
		}
		s.Close()
		if got := strings.Contains(out.String(), `msg="etcd client: `); got != want {
			t.Errorf("at %s:\n%s", level, out.String())
		}
	}
}
