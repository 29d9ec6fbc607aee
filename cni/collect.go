package cni

import (
	"context"
	"errors"
	"log/slog"

	"github.com/caracal-net/caracal/node"
)

// errAlive says that an attachment has its interface.
var errAlive = errors.New("its interface is there")

// Collect removes an attachment whose interface is gone as GC does, for the node of a configuration, of which StateDir and
// BPFFSDir must be set. One of its key that has an interface, made meanwhile maybe, stays.
func Collect(ctx context.Context, c Config, log *slog.Logger, key node.Key) error {
	p := &Plugin{Spawn: beside(log), log: log, spare: true}
	if err := p.teardown(ctx, &c, key); !errors.Is(err, errAlive) {
		return err
	}
	return nil
}
