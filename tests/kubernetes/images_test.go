//go:build cluster

package kubernetes

import (
	"os"
	"testing"

	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/testenv"
)

// The images that every node has. No registry is asked for any.
const (
	pause   = "localhost/pause:test"
	agnhost = "localhost/agnhost:test" // serves and connects; with busybox's shell
	caracal = "caracal:v1"
)

// makeImages writes the archives of all images into a new directory. bin has Caracal's programs.
func makeImages(t testing.TB, dir, agnhostProgram, bin string) error {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	image.Pause(t, dir, pause)
	image.Write(t, dir, image.Image{Ref: agnhost, Shell: true, Env: []string{"PATH=/bin"}, Entrypoint: []string{"/bin/agnhost"}, Command: []string{"pause"},
		Files: map[string]string{"/bin/agnhost": agnhostProgram, "/bin/nameserver": testenv.Build(t, "./tests/kubernetes/nameserver")}})
	image.Caracal(t, dir, caracal, bin)
	return nil
}
