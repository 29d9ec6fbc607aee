package docker

import (
	"fmt"
	"net"
	"sync/atomic"
)

// maxRequest is how long a request may be, in bytes. Docker's have some hundred.
const maxRequest = 1 << 20

// limited accepts connections on which no request can be longer than maxRequest: who reads them reads them whole.
type limited struct{ net.Listener }

func (l limited) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &limitedConn{Conn: c}, nil
}

// limitedConn counts what is read between two answers.
type limitedConn struct {
	net.Conn
	read atomic.Int64
}

func (c *limitedConn) Read(b []byte) (int, error) {
	if c.read.Load() > maxRequest {
		return 0, fmt.Errorf("a request has at most %d bytes", maxRequest)
	}
	n, err := c.Conn.Read(b)
	c.read.Add(int64(n))
	return n, err
}

func (c *limitedConn) Write(b []byte) (int, error) {
	c.read.Store(0)
	return c.Conn.Write(b)
}
