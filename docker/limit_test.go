package docker

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// A request that is too long is not read on, and the one after it on a connection counts anew.
func TestLimited(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan int64, 1)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		read <- n
	})}
	go server.Serve(limited{l})
	defer server.Close()
	dials := 0
	client := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		dials++
		return net.Dial("unix", path)
	}}}
	for range 4 {
		r, err := client.Post("http://x/", "", strings.NewReader(strings.Repeat("a", maxRequest/2)))
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if n := <-read; n != maxRequest/2 {
			t.Errorf("%d bytes came", n)
		}
	}
	if dials != 1 {
		t.Errorf("%d connections", dials)
	}
	if r, err := client.Post("http://x/", "", strings.NewReader(strings.Repeat("a", 16*maxRequest))); err == nil {
		r.Body.Close()
	}
	if n := <-read; n > 2*maxRequest {
		t.Errorf("%d bytes came", n)
	}
}
