package main

import (
	"bytes"
	"os"
	"testing"
)

// The file in deploy is what the types of package api say.
func TestGenerated(t *testing.T) {
	want, err := definitions()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../deploy/kubernetes/crds.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("deploy/kubernetes/crds.yaml is not what the types of package api say: run make generate and commit it")
	}
}
