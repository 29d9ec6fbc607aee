package kube_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/tests/kube/apiserver"
)

const waitLimit = time.Minute

// cluster is an API with our kinds, and what a test does as its controllers and kubelets.
type cluster struct {
	*apiserver.Server
	t    testing.TB
	http *http.Client
}

func startAPI(t testing.TB, o apiserver.Options) *cluster {
	t.Helper()
	c := &cluster{Server: apiserver.Start(t, o), t: t}
	var err error
	c.http, err = rest.HTTPClientFor(c.Config())
	must(t, err)
	define(t, c.Server)
	return c
}

// kubectl is Kubectl without input.
func (c *cluster) kubectl(arg ...string) string { return c.Kubectl("", arg...) }

// request asks the API for something, and fails the test unless it does it.
func (c *cluster) request(t testing.TB, method, path, contentType string, body any) map[string]any {
	t.Helper()
	text, err := json.Marshal(body)
	must(t, err)
	return c.send(t, method, path, contentType, text)
}

func (c *cluster) send(t testing.TB, method, path, contentType string, text []byte) map[string]any {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, c.URL+path, bytes.NewReader(text))
	must(t, err)
	r.Header.Set("Content-Type", contentType)
	answer, err := c.http.Do(r)
	must(t, err)
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	must(t, err)
	if answer.StatusCode >= 300 {
		t.Fatalf("%s %s: %s", method, path, said)
	}
	var o map[string]any
	must(t, json.Unmarshal(said, &o))
	return o
}

func (c *cluster) create(t testing.TB, path string, body any) map[string]any {
	t.Helper()
	return c.request(t, "POST", path, "application/json", body)
}

// patch merges something into an object.
func (c *cluster) patch(t testing.TB, path string, body any) {
	t.Helper()
	c.request(t, "PATCH", path, "application/merge-patch+json", body)
}

type m = map[string]any

// pod makes a pod that is scheduled to a node, and returns its uid.
func (c *cluster) pod(t testing.TB, namespace, name, node string, labels map[string]string) string {
	t.Helper()
	o := c.create(t, "/api/v1/namespaces/"+namespace+"/pods", m{
		"metadata": m{"name": name, "labels": labels},
		"spec":     m{"nodeName": node, "containers": []any{m{"name": "c", "image": "none"}}},
	})
	return o["metadata"].(m)["uid"].(string)
}

// deletePod deletes a pod as its kubelet does, when its containers are gone.
func (c *cluster) deletePod(t testing.TB, namespace, name string) {
	t.Helper()
	c.request(t, "DELETE", "/api/v1/namespaces/"+namespace+"/pods/"+name, "application/json", m{"gracePeriodSeconds": 0})
}

// get reads an object.
func (c *cluster) get(t testing.TB, path string) m {
	t.Helper()
	return c.request(t, "GET", path, "application/json", nil)
}

// annotation is one of an object's; "": it has none.
func (c *cluster) annotation(t testing.TB, path, name string) string {
	t.Helper()
	all, _ := c.get(t, path)["metadata"].(m)["annotations"].(m)
	text, _ := all[name].(string)
	return text
}

// accepted is what a resource's condition says: "False Invalid 1 h1: it is wrong"; "": it has none.
func (c *cluster) accepted(t testing.TB, path string) string {
	t.Helper()
	status, _ := c.get(t, path)["status"].(m)
	all, _ := status["conditions"].([]any)
	for _, o := range all {
		if o := o.(m); o["type"] == "Accepted" {
			return fmt.Sprint(o["status"], " ", o["reason"], " ", o["observedGeneration"], " ", o["message"])
		}
	}
	return ""
}

// events are those on an object, by its uid: "Warning NetworkDenied 5 h1 all pools are exhausted".
func (c *cluster) events(t testing.TB, uid string) (all []string) {
	t.Helper()
	list := c.get(t, "/api/v1/namespaces/default/events?fieldSelector=involvedObject.uid%3D"+uid)
	for _, o := range list["items"].([]any) {
		o := o.(m)
		all = append(all, fmt.Sprint(o["type"], " ", o["reason"], " ", o["count"], " ", o["source"].(m)["host"], " ", o["message"]))
	}
	return all
}

// apply writes YAML documents as kubectl does on the server's side, and returns the objects' paths.
func (c *cluster) apply(t testing.TB, text string) (paths []string) {
	t.Helper()
	for doc := range strings.SplitSeq(text, "---\n") {
		var o struct {
			APIVersion, Kind string
			Metadata         struct{ Name, Namespace string }
		}
		must(t, yaml.Unmarshal([]byte(doc), &o))
		path := "/apis/" + o.APIVersion
		if o.Metadata.Namespace != "" {
			path += "/namespaces/" + o.Metadata.Namespace
		}
		path += "/" + strings.ToLower(strings.TrimSuffix(o.Kind, "y")) + "ies/" + o.Metadata.Name
		c.send(t, "PATCH", path+"?fieldManager=test&force=true", "application/apply-patch+yaml", []byte(doc))
		paths = append(paths, path)
	}
	return paths
}

// remove deletes an object, if it is there.
func (c *cluster) remove(path string) {
	r, err := http.NewRequest("DELETE", c.URL+path, nil)
	if err == nil {
		if answer, err := c.http.Do(r); err == nil {
			answer.Body.Close()
		}
	}
}
