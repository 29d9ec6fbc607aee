package bgp

import (
	"fmt"
	"strconv"
	"strings"
)

// parseCommunities sorts communities by their kind, each in the one way to write it. ErrInvalid names the first that is
// none.
func parseCommunities(all []string) (standard, large []string, err error) {
	for _, c := range all {
		parts := strings.Split(c, ":")
		size := 0
		switch len(parts) {
		case 2:
			size = 16
		case 3:
			size = 32
		default:
			return nil, nil, invalid("Communities: %q is none; write 65001:100, or 65001:1:2 for a large one", c)
		}
		var n [3]uint32
		for i, part := range parts {
			v, err := strconv.ParseUint(part, 10, size)
			if err != nil {
				return nil, nil, invalid("Communities: %q: %q is not a number of %d bits; write 65001:100, or 65001:1:2 for a large one", c, part, size)
			}
			n[i] = uint32(v)
		}
		if size == 16 {
			standard = append(standard, formatCommunity(n[0]<<16|n[1]))
		} else {
			large = append(large, formatLargeCommunity(n[0], n[1], n[2]))
		}
	}
	return standard, large, nil
}

func formatCommunity(c uint32) string { return fmt.Sprintf("%d:%d", c>>16, c&0xffff) }

func formatLargeCommunity(a, b, c uint32) string { return fmt.Sprintf("%d:%d:%d", a, b, c) }
