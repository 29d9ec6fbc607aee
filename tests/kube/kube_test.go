// Package kube_test runs the store in the Kubernetes API against a real kube-apiserver and etcd.
package kube_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/storetest"
	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// TestStore has one API for all that does not harm it.
func TestStore(t *testing.T) {
	s := apiserver.Start(t, apiserver.Options{})
	t.Run("no definitions", func(t *testing.T) { undefined(t, s) })
	define(t, s)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *apiserver.Server)
	}{
		{"kinds", everyKind},
		{"columns", columns},
		{"refused by the API", refused},
		{"pods", pods},
		{"owners", owners},
		{"one snapshot", snapshot},
		{"a narrow role", narrow},
		{"a kind that comes later", later},
		{"a definition of another version", otherVersion},
		{"faults", faults},
		{"credentials", credentials},
		{"away", away},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, s) })
	}
	n := 0
	storetest.Run(t, func(t *testing.T) store.Store {
		n++ // every test has a part of the API for itself
		return open(t, s, kube.Config{Prefix: fmt.Sprintf("/test/%d", n)})
	})
}

// define gives an API our definitions, and waits until they are served.
func define(t testing.TB, s *apiserver.Server) {
	t.Helper()
	s.Kubectl("", "apply", "-f", crds(t))
	s.Kubectl("", "wait", "--for=condition=Established", "--timeout=60s", "-f", crds(t))
}

func crds(t testing.TB) string {
	t.Helper()
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "deploy/kubernetes/crds.yaml")
}

// open opens a store, as an administrator if cfg says nobody else.
func open(t testing.TB, s *apiserver.Server, cfg kube.Config) *kube.Store {
	t.Helper()
	if cfg.Kubeconfig == "" {
		cfg.Kubeconfig = s.Kubeconfig("")
	}
	if cfg.QPS == 0 {
		cfg.QPS = -1
	}
	k, err := kube.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}
