package cni

import (
	"testing"

	"github.com/containernetworking/cni/pkg/utils"
)

// FuzzNames compares our validation with libcni's, whose regular expressions would take a tenth of a millisecond of every
// ADD to compile.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"", "a", "A.b_c-9", "-a", "a b", "a\n", "é", "eth0", ".", "..", "a/b", "a:b", "a\u00a0b", "\xff", "0123456789abcde", "0123456789abcdef"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if want := utils.ValidateContainerID(s) == nil; validName(s) != want {
			t.Errorf("validName(%q): %t", s, !want)
		}
		if want := utils.ValidateNetworkName(s) == nil; validName(s) != want {
			t.Errorf("validName(%q), a network's: %t", s, !want)
		}
		if want := utils.ValidateInterfaceName(s) == nil; validIfName(s) != want {
			t.Errorf("validIfName(%q): %t", s, !want)
		}
	})
}
