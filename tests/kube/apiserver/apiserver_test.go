package apiserver_test

import (
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// What a test builds on: the API is there, away and back with what it had, and knows who may do what.
func TestServer(t *testing.T) {
	s := apiserver.Start(t, apiserver.Options{})
	s.Kubectl("", "create", "namespace", "web")
	s.Stop()
	s.Restart()
	if out := s.Kubectl("", "get", "namespace", "web", "-o", "name"); out != "namespace/web\n" {
		t.Errorf("after a restart: %q", out)
	}
	c, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig("reader", "readers"))
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(c)
	if err != nil {
		t.Fatal(err)
	}
	r, err := client.Get(s.URL + "/api/v1/namespaces")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if body, err := io.ReadAll(r.Body); err != nil || r.StatusCode != http.StatusForbidden || !strings.Contains(string(body), `User \"reader\" cannot list`) {
		t.Errorf("a user without a role: %s: %s %v", r.Status, body, err)
	}
}
