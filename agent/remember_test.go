package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/tests/testenv"
)

// What is kept of the store is read again as it was; nothing kept is no error, and what can't be read is one that names the file.
func TestRecall(t *testing.T) {
	a := &Agent{Config: Config{Node: "h1", StateDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}, problems: make(map[string]Problem)}
	c := newCluster(a)
	if v, err := c.recall(); v != nil || err != nil {
		t.Errorf("nothing kept: %+v, %v", v, err)
	}
	for key, value := range map[string]string{
		"/blocks/10.244.0.0-26": `{"cidr":"10.244.0.0/26","pool":"10.244.0.0/16","node":"h1"}`,
		"/entries/secret":       `{}`,
		"/nodes/h1":             `not JSON`,
	} {
		c.kvs[key] = store.KV{Key: key, Value: []byte(value)}
	}
	signal(c.keep)
	go c.remember(t.Context())
	path := filepath.Join(a.StateDir, Picture)
	testenv.Eventually(t, 5*time.Second, "it is kept", func() error {
		_, err := os.Stat(path)
		return err
	})
	v, err := c.recall()
	if err != nil || len(v.claims("h1")) != 1 {
		t.Fatalf("recalled %+v, %v", v, err)
	}
	if text, _ := os.ReadFile(path); strings.Contains(string(text), "secret") {
		t.Errorf("kept: %s", text)
	}
	if err := os.WriteFile(path, []byte(`{"/nodes/h1": `), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.recall(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a damaged file: %v", err)
	}
}

// Whatever is in the file, it is read or refused.
func FuzzRecall(f *testing.F) {
	f.Add([]byte(`{"/blocks/10.244.0.0-26": {"cidr":"10.244.0.0/26","pool":"10.244.0.0/16","node":"h1"}, "/nodes/h1": null}`))
	f.Add([]byte(`{"/ippools/a": {"kind":"IPPool","apiVersion":"projectcalico.org/v3","metadata":{"name":"a"},"spec":{"cidr":"10.244.0.0/16"}}}`))
	a := &Agent{Config: Config{Node: "h1", StateDir: f.TempDir(), Log: slog.New(slog.DiscardHandler)}, problems: make(map[string]Problem)}
	c := newCluster(a)
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := c.put(text); err != nil {
			t.Fatal(err)
		}
		if v, err := c.recall(); (v == nil) != (err != nil) {
			t.Errorf("%+v, %v", v, err)
		}
	})
}
