package cni

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultSocket is where this node's agent answers unless the configuration says otherwise.
const DefaultSocket = "/run/caracal/agent.sock"

var (
	// errNoAgent says that nobody listens on the socket, or that whoever did ended before he answered.
	errNoAgent = errors.New("no agent answers")
	// errSilent says that an agent listens, but has not answered in time.
	errSilent = errors.New("the agent does not answer")
	// errNotFound says that the agent does not know what it was asked about, or no such question.
	errNotFound = errors.New("the agent does not know of it")
	// errRefused says that the agent can't do what it was asked to.
	errRefused = errors.New("the agent refuses")
)

const maxAnswer = 64 << 10 // bytes

// ask is query for the agent's consent alone.
func ask(ctx context.Context, socket, path string, headers map[string]string, value any, wait time.Duration) error {
	_, err := query(ctx, socket, path, headers, value, wait)
	return err
}

// query posts a value as JSON to the agent on a socket and waits for its answer. It speaks HTTP/1.0 itself (RFC 1945): net/http
// would make each start of the plugin longer.
//
// headers are more of the request's.
//
// Errors: errNoAgent, errSilent, errRefused (status 409), errNotFound (status 404), or what else the agent objects.
func query(ctx context.Context, socket, path string, headers map[string]string, value any, wait time.Duration) ([]byte, error) {
	body, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	request := fmt.Appendf(nil, "POST %s HTTP/1.0\r\nHost: agent\r\nContent-Type: application/json\r\nContent-Length: %d\r\n", path, len(body))
	for name, v := range headers {
		request = fmt.Appendf(request, "%s: %s\r\n", name, v)
	}
	answer, err := exchange(ctx, socket, append(append(request, "\r\n"...), body...))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("%s: %w", socket, errNoAgent)
	case errors.Is(err, os.ErrDeadlineExceeded), err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("%s: %w for %s", socket, errSilent, wait)
	case err != nil:
		return nil, fmt.Errorf("ask the agent: %w", err)
	}
	return readAnswer(answer)
}

// exchange sends a request and reads all of the answer, or the first maxAnswer bytes. io.ErrUnexpectedEOF: there was none.
func exchange(ctx context.Context, socket string, request []byte) ([]byte, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := c.Write(request); err != nil {
		return nil, err
	}
	answer, err := io.ReadAll(io.LimitReader(c, maxAnswer))
	if err == nil && len(answer) == 0 {
		err = io.ErrUnexpectedEOF
	}
	return answer, err
}

// readAnswer reads an answer: its body when its status is one of success, else an error with what it says.
func readAnswer(answer []byte) ([]byte, error) {
	r := bufio.NewReader(bytes.NewReader(answer))
	line, err := r.ReadString('\n')
	version, status, _ := strings.Cut(strings.TrimRight(line, "\r\n"), " ")
	number, _, _ := strings.Cut(status, " ")
	code, nerr := strconv.Atoi(number)
	if err != nil || nerr != nil || len(number) != 3 || !strings.HasPrefix(version, "HTTP/1.") {
		return nil, fmt.Errorf("ask the agent: %q is no answer of HTTP", shortened(string(answer)))
	}
	for { // the headers
		line, err := r.ReadString('\n')
		if strings.TrimRight(line, "\r\n") == "" || err != nil {
			break
		}
	}
	if code >= 200 && code < 300 {
		return io.ReadAll(r) // from memory
	}
	said, _ := r.ReadString('\n')
	switch code {
	case 404:
		return nil, fmt.Errorf("%w: %s: %s", errNotFound, status, strings.TrimSpace(said))
	case 409:
		return nil, fmt.Errorf("%w: %s", errRefused, strings.TrimSpace(said))
	}
	return nil, fmt.Errorf("the agent says: %s: %s", status, strings.TrimSpace(said))
}
