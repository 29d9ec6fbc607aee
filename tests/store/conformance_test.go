package store_test

import (
	"fmt"
	"testing"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/etcd"
	"github.com/caracal-net/caracal/store/storetest"
)

func TestEtcd(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	n := 0
	storetest.Run(t, func(t *testing.T) store.Store {
		n++ // every test has a part of the cluster for itself
		return open(t, etcd.Config{Endpoints: c.endpoints(), Prefix: fmt.Sprintf("/test/%d", n)})
	})
}
