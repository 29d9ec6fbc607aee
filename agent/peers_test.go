package agent

import (
	"net/netip"
	"testing"
)

func TestPassiveAsCalico(t *testing.T) {
	nine, ten := netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("10.0.0.10")
	if (link{ours: nine, theirs: ten}).passive() || !(link{ours: ten, theirs: nine}).passive() {
		t.Error("10.0.0.10 waits for 10.0.0.9 in Calico's mesh, not here")
	}
}
