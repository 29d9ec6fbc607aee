// Command nameserver stands in for a cluster's DNS: it answers for SERVICE.NAMESPACE.svc.cluster.local what the API server says of
// that Service, its own addresses or, of a headless one, those of its pods.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// account is where a pod finds how to ask the API server.
const account = "/var/run/secrets/kubernetes.io/serviceaccount/"

func main() {
	s, err := newServer()
	if err == nil {
		err = s.serve(":53")
	}
	log.Fatal(err)
}

type server struct {
	client *http.Client
	api    string
}

func newServer() (*server, error) {
	ca, err := os.ReadFile(account + "ca.crt")
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &server{
		client: &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}},
		api:    "https://" + net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")),
	}, nil
}

func (s *server) serve(address string) error {
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		if out := s.answer(buf[:n]); out != nil {
			_, _ = c.WriteTo(out, from)
		}
	}
}

// answer makes the answer to a question; nil: it is none.
func (s *server) answer(question []byte) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(question)
	if err != nil || h.Response {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	addrs, err := s.lookup(q.Name.String())
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: h.ID, Response: true, Authoritative: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	if err != nil {
		log.Printf("%s: %v", q.Name, err)
		m.RCode = dnsmessage.RCodeServerFailure
	} else if addrs == nil {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		rh := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 1}
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: rh, Body: &dnsmessage.AResource{A: a.As4()}})
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: rh, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}

// lookup finds the addresses that a name stands for; nil: there is no such name.
func (s *server) lookup(name string) ([]netip.Addr, error) {
	rest, ok := strings.CutSuffix(strings.ToLower(name), ".svc.cluster.local.")
	service, namespace, ok2 := strings.Cut(rest, ".")
	if !ok || !ok2 || strings.Contains(namespace, ".") {
		return nil, nil
	}
	var found struct {
		Spec struct{ ClusterIPs []string }
	}
	there, err := s.get("/api/v1/namespaces/"+namespace+"/services/"+service, &found)
	if err != nil || !there {
		return nil, err
	}
	texts := found.Spec.ClusterIPs
	if len(texts) > 0 && texts[0] == "None" {
		var slices struct {
			Items []struct {
				Endpoints []struct{ Addresses []string }
			}
		}
		if _, err := s.get("/apis/discovery.k8s.io/v1/namespaces/"+namespace+"/endpointslices?labelSelector=kubernetes.io/service-name="+service, &slices); err != nil {
			return nil, err
		}
		texts = nil
		for _, slice := range slices.Items {
			for _, e := range slice.Endpoints {
				texts = append(texts, e.Addresses...)
			}
		}
	}
	addrs := []netip.Addr{}
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, err
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

// get reads an object; false: there is none.
func (s *server) get(path string, into any) (bool, error) {
	token, err := os.ReadFile(account + "token")
	if err != nil {
		return false, err
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, s.api+path, nil)
	if err != nil {
		return false, err
	}
	req.Header.Set("Authorization", "Bearer "+string(token))
	r, err := s.client.Do(req)
	if err != nil {
		return false, err
	}
	defer r.Body.Close()
	switch r.StatusCode {
	case http.StatusOK:
		return true, json.NewDecoder(r.Body).Decode(into)
	case http.StatusNotFound:
		return false, nil
	}
	return false, fmt.Errorf("the API server answers %s", r.Status)
}
