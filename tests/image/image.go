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
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

// Image says what is in an image.
type Image struct {
	Ref                      string            // its name, such as "localhost/busybox:test"
	Shell                    bool              // with busybox, a link for each of its applets, and the usual directories
	Dirs                     []string          // paths in the image
	Files                    map[string]string // programs: their paths in the image, and those of the files that they are copies of
	Links                    map[string]string // paths in the image, and where they lead
	Env, Entrypoint, Command []string
}

// Busybox writes an image into the directory dir and returns the archive's path. In it is Debian's statically linked busybox,
// with a link for each of its applets; its command is a shell. ref is its name, such as "localhost/busybox:test".
func Busybox(t testing.TB, dir, ref string) (archive string) {
	t.Helper()
	return Write(t, dir, Image{Ref: ref, Shell: true, Env: []string{"PATH=/bin"}, Command: []string{"/bin/sh"}})
}

// Pause writes an image like Busybox's whose command does nothing until it is told to end (SIGTERM): what a pod's sandbox is.
func Pause(t testing.TB, dir, ref string) (archive string) {
	t.Helper()
	return Write(t, dir, Image{Ref: ref, Shell: true, Env: []string{"PATH=/bin"},
		Command: []string{"/bin/sh", "-c", `trap "exit 0" TERM INT; while :; do sleep 3600 & wait $!; done`}})
}

// Caracal writes an image of the programs in the directory bin by the project's own recipe, deploy/image.sh and its Dockerfile, with
// a program in the engine's place that keeps what it is to build from.
func Caracal(t testing.TB, dir, ref, bin string) (archive string) {
	t.Helper()
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	engine, context := filepath.Join(dir, "engine"), filepath.Join(dir, "context")
	defer os.RemoveAll(context)
	defer os.Remove(engine)
	if err := os.WriteFile(engine, []byte("#!/bin/sh\ncp -a \"$5\" "+context+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(root, "deploy/image.sh"), bin, ref)
	cmd.Env = append(os.Environ(), "DOCKER="+engine)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("deploy/image.sh: %v: %s", err, out)
	}
	image, err := recipe(context)
	if err != nil {
		t.Fatal(err)
	}
	image.Ref = ref
	return Write(t, dir, image)
}

// recipe reads what a Dockerfile of the project's makes of its context: ENV, CMD, and the files below root.
func recipe(context string) (image Image, err error) {
	text, err := os.ReadFile(filepath.Join(context, "Dockerfile"))
	if err != nil {
		return image, fmt.Errorf("read recipe: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch word {
		case "ENV":
			image.Env = append(image.Env, strings.Fields(rest)...)
		case "CMD":
			err = json.Unmarshal([]byte(rest), &image.Command)
		case "COPY":
			if rest != "root/ /" {
				err = errors.New("another directory than root")
			}
		}
		if err != nil {
			return image, fmt.Errorf("read recipe: %s: %w", line, err)
		}
	}
	image.Files, image.Links = make(map[string]string), make(map[string]string)
	root := filepath.Join(context, "root")
	return image, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		name := strings.TrimPrefix(path, root)
		switch {
		case err != nil || name == "":
			return err
		case d.IsDir():
			image.Dirs = append(image.Dirs, name)
			return nil
		}
		if d.Type() == fs.ModeSymlink {
			image.Links[name], err = os.Readlink(path)
			return err
		}
		image.Files[name] = path
		return nil
	})
}

// Write writes an image into the directory dir and returns the archive's path.
func Write(t testing.TB, dir string, image Image) (archive string) {
	t.Helper()
	path := filepath.Join(dir, strings.NewReplacer("/", "-", ":", "-").Replace(image.Ref)+".tar")
	busybox := ""
	if image.Shell {
		busybox = testenv.NeedProgram(t, "busybox", "busybox-static")
	}
	layer, err := makeLayer(busybox, image)
	if err == nil {
		err = writeArchive(path, image, layer)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// writeArchive writes an archive of one layer.
func writeArchive(path string, image Image, layer []byte) error {
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"created":      "1970-01-01T00:00:00Z",
		"config":       map[string]any{"Entrypoint": image.Entrypoint, "Cmd": image.Command, "Env": image.Env},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
		"history":      []map[string]any{{"created": "1970-01-01T00:00:00Z"}},
	})
	if err != nil {
		return fmt.Errorf("encode image config: %w", err)
	}
	configName := digest(config) + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{image.Ref}, "Layers": []string{"layer.tar"}}})
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
func makeLayer(busybox string, image Image) ([]byte, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	dirs := image.Dirs
	if image.Shell {
		dirs = append([]string{"/bin", "/etc", "/tmp", "/proc", "/sys", "/dev", "/srv"}, dirs...)
	}
	for _, d := range dirs {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d[1:] + "/", Mode: 0o755}); err != nil {
			return nil, fmt.Errorf("write layer: %w", err)
		}
	}
	if busybox != "" {
		if err := addShell(w, busybox); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(image.Files)) {
		if err := addProgram(w, strings.TrimPrefix(name, "/"), image.Files[name]); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(image.Links)) {
		if err := addLink(w, strings.TrimPrefix(name, "/"), image.Links[name]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return layer.Bytes(), nil
}

// addShell adds busybox and its applets.
func addShell(w *tar.Writer, busybox string) error {
	if err := addProgram(w, "bin/busybox", busybox); err != nil {
		return err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("list applets of busybox: %w", err)
	}
	if err := addFile(w, "etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/sh\n")); err != nil {
		return err
	}
	for _, a := range strings.Fields(string(applets)) {
		if a == "busybox" {
			continue
		}
		if err := addLink(w, filepath.Join("bin", a), "busybox"); err != nil {
			return err
		}
	}
	return nil
}

// addProgram adds a program of the real machine, which must need nothing else.
func addProgram(w *tar.Writer, name, path string) error {
	program, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	if err := checkStatic(program); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return addFile(w, name, 0o755, program)
}

func addLink(w *tar.Writer, name, target string) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	return nil
}

// checkStatic refuses a program that needs an interpreter: there is none in the image.
func checkStatic(program []byte) error {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is not statically linked (of busybox: apt-get install busybox-static)")
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
