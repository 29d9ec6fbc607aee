// Netprobe asks many servers at once who they are, as tests of policy want it: for each argument, TCP/ADDRESS:PORT (HTTP, /hostname) or
// UDP/ADDRESS:PORT (the word "hostname"), it prints a line: what answers, "-" for nothing in time.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

// patience is more than a second, after which TCP repeats its first packet.
const patience = 1800 * time.Millisecond

func main() {
	answers := make([]string, len(os.Args)-1)
	var all sync.WaitGroup
	for i, target := range os.Args[1:] {
		all.Go(func() {
			protocol, at, _ := strings.Cut(target, "/")
			ask := overTCP
			if protocol == "UDP" {
				ask = overUDP
			}
			answers[i] = "-"
			if who, err := ask(at); err == nil && who != "" {
				answers[i] = strings.Join(strings.Fields(who), "_")
			}
		})
	}
	all.Wait()
	fmt.Println(strings.Join(answers, "\n"))
}

func overTCP(at string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at+"/hostname", nil)
	if err != nil {
		return "", err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	who, err := io.ReadAll(io.LimitReader(answer.Body, 256))
	return string(who), err
}

// overUDP asks three times.
func overUDP(at string) (string, error) {
	c, err := net.Dial("udp", at)
	if err != nil {
		return "", err
	}
	defer c.Close()
	buffer := make([]byte, 256)
	for range 3 {
		if _, err := c.Write([]byte("hostname")); err != nil {
			return "", err
		}
		if err := c.SetReadDeadline(time.Now().Add(patience / 3)); err != nil {
			return "", err
		}
		if n, err := c.Read(buffer); err == nil {
			return string(buffer[:n]), nil
		}
	}
	return "", os.ErrDeadlineExceeded
}
