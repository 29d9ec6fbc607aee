package image

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// read returns the regular files of an archive, and the targets of its links.
func read(t *testing.T, r io.Reader) map[string]string {
	files := make(map[string]string)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(data) + h.Linkname
	}
}

// Runtimes load what is in here in their own tests; this one holds the archive against itself.
func TestArchives(t *testing.T) {
	dir := t.TempDir()
	for path, want := range map[string]string{
		Busybox(t, dir, "localhost/b:test"): "/bin/sh", Pause(t, dir, "localhost/p:test"): "/bin/sh -c trap",
	} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files := read(t, f)
		var manifest []struct {
			Config           string
			RepoTags, Layers []string
		}
		var config struct {
			Config struct{ Cmd []string }
			RootFS struct {
				DiffIDs []string `json:"diff_ids"`
			}
		}
		if err := json.Unmarshal([]byte(files["manifest.json"]), &manifest); err != nil || len(manifest) != 1 || len(manifest[0].Layers) != 1 {
			t.Fatalf("%s: manifest %s: %v", path, files["manifest.json"], err)
		}
		if err := json.Unmarshal([]byte(files[manifest[0].Config]), &config); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(strings.Join(config.Config.Cmd, " "), want) {
			t.Errorf("%s: command %q, want %q", path, config.Config.Cmd, want)
		}
		layer := files[manifest[0].Layers[0]]
		sum := sha256.Sum256([]byte(layer))
		if want := "sha256:" + hex.EncodeToString(sum[:]); len(config.RootFS.DiffIDs) != 1 || config.RootFS.DiffIDs[0] != want {
			t.Errorf("%s: layers %v, want %s", path, config.RootFS.DiffIDs, want)
		}
		root := read(t, strings.NewReader(layer))
		for _, applet := range []string{"sh", "httpd", "nc", "ping", "sleep"} {
			if root["bin/"+applet] != "busybox" {
				t.Errorf("%s: no %s in it", path, applet)
			}
		}
	}
}

func TestDynamicProgramIsRefused(t *testing.T) {
	for _, program := range []string{"/bin/ls", "/etc/passwd", filepath.Join(t.TempDir(), "none")} {
		if _, err := makeLayer(program, Image{}); err == nil || !strings.Contains(err.Error(), program) {
			t.Errorf("%s: %v", program, err)
		}
	}
}

// The image of the project's recipe has the plugin and the agent under all their names, and begins as the recipe says.
func TestRecipe(t *testing.T) {
	f, err := os.Open(Caracal(t, t.TempDir(), "caracal:test", filepath.Dir(testenv.Bin(t, "caracal"))))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := read(t, f)
	config := ""
	for name, text := range files {
		if strings.HasSuffix(name, ".json") && name != "manifest.json" {
			config = text
		}
	}
	for _, want := range []string{`"Cmd":["caracalctl","install"]`, `"PATH=/usr/bin"`, `"CARACAL_IMAGE=1"`} {
		if !strings.Contains(config, want) {
			t.Errorf("no %s in %s", want, config)
		}
	}
	root := read(t, strings.NewReader(files["layer.tar"]))
	for name, target := range map[string]string{"usr/bin/caracal-ipam": "caracal", "usr/bin/caracalctl": "caracald", "var/run": "/run", "run/": ""} {
		if got, ok := root[name]; !ok || got != target {
			t.Errorf("%s: %q, want %q", name, got, target)
		}
	}
	if len(root["usr/bin/caracal"]) == 0 || len(root["usr/bin/caracald"]) == 0 {
		t.Error("no programs")
	}
}
