// Package image makes container images for tests, with no registry and nothing of the network: archives (docker-archive) that
// docker, podman, ctr and nerdctl load.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

// Busybox writes an image into the directory dir and returns the archive's path. In it is Debian's statically linked busybox,
// with a link for each of its applets; its command is a shell. ref is its name, such as "localhost/busybox:test".
func Busybox(t testing.TB, dir, ref string) (archive string) {
	t.Helper()
	return write(t, dir, ref, []string{"/bin/sh"})
}

// Pause writes an image like Busybox's whose command does nothing until it is told to end (SIGTERM): what a pod's sandbox is.
func Pause(t testing.TB, dir, ref string) (archive string) {
	t.Helper()
	return write(t, dir, ref, []string{"/bin/sh", "-c", `trap "exit 0" TERM INT; while :; do sleep 3600 & wait $!; done`})
}

func write(t testing.TB, dir, ref string, command []string) string {
	t.Helper()
	program := testenv.NeedProgram(t, "busybox", "busybox-static")
	path := filepath.Join(dir, strings.NewReplacer("/", "-", ":", "-").Replace(ref)+".tar")
	layer, err := makeLayer(program)
	if err == nil {
		err = writeArchive(path, ref, layer, command)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// writeArchive writes an archive of one layer.
func writeArchive(path, ref string, layer []byte, command []string) error {
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"created":      "1970-01-01T00:00:00Z",
		"config":       map[string]any{"Cmd": command, "Env": []string{"PATH=/bin"}},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
		"history":      []map[string]any{{"created": "1970-01-01T00:00:00Z"}},
	})
	if err != nil {
		return fmt.Errorf("encode image config: %w", err)
	}
	configName := digest(config) + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{ref}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return fmt.Errorf("encode image manifest: %w", err)
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, f := range []struct {
		name string
		data []byte
	}{{"manifest.json", manifest}, {configName, config}, {"layer.tar", layer}} {
		if err := addFile(w, f.name, 0o644, f.data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	if err := os.WriteFile(path, archive.Bytes(), 0o644); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// makeLayer makes the root file system.
func makeLayer(busybox string) ([]byte, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, fmt.Errorf("read busybox: %w", err)
	}
	if err := checkStatic(program); err != nil {
		return nil, fmt.Errorf("%s: %w", busybox, err)
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list applets of busybox: %w", err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, d := range []string{"bin", "etc", "tmp", "proc", "sys", "dev", "srv"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}); err != nil {
			return nil, fmt.Errorf("write layer: %w", err)
		}
	}
	if err := addFile(w, "bin/busybox", 0o755, program); err != nil {
		return nil, err
	}
	if err := addFile(w, "etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/sh\n")); err != nil {
		return nil, err
	}
	for _, a := range strings.Fields(string(applets)) {
		if a == "busybox" {
			continue
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: filepath.Join("bin", a), Linkname: "busybox", Mode: 0o777}); err != nil {
			return nil, fmt.Errorf("write layer: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return layer.Bytes(), nil
}

// checkStatic refuses a program that needs an interpreter: there is none in the image.
func checkStatic(program []byte) error {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is not statically linked (apt-get install busybox-static)")
		}
	}
	return nil
}

func addFile(w *tar.Writer, name string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}
