package api

import (
	"net/netip"
	"strings"
)

// BlocksPrefix begins the keys in the store of claims of address blocks.
const BlocksPrefix = "/blocks/"

// BlockKey is where a block's claim lies in the store: "/blocks/10.244.0.0-26", "/blocks/2001.db8..-122".
func BlockKey(cidr netip.Prefix) string {
	return BlocksPrefix + strings.NewReplacer("/", "-", ":", ".").Replace(cidr.String())
}

// BlockOfKey is the block whose claim lies there. false: none does.
func BlockOfKey(key string) (netip.Prefix, bool) {
	word, _ := strings.CutPrefix(key, BlocksPrefix)
	return blockOf(word, ".", func(p netip.Prefix) bool { return BlockKey(p) == key })
}

// BlockOfObject is the block whose claim is called so in Kubernetes. false: none is.
func BlockOfObject(name string) (netip.Prefix, bool) {
	return blockOf(name, "-", func(p netip.Prefix) bool { return BlockObject(p) == name })
}

// blockOf reads a block of which one character stands for the colons.
func blockOf(word, colon string, is func(netip.Prefix) bool) (netip.Prefix, bool) {
	at := strings.LastIndexByte(word, '-')
	if at < 0 {
		return netip.Prefix{}, false
	}
	for _, text := range []string{word[:at], strings.ReplaceAll(word[:at], colon, ":")} {
		if p, err := netip.ParsePrefix(text + "/" + word[at+1:]); err == nil && is(p) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// BlockObject is what a block's claim is called in Kubernetes, whose names have no two dots together: "10.244.0.0-26", "2001-db8---122".
func BlockObject(cidr netip.Prefix) string {
	return strings.NewReplacer("/", "-", ":", "-").Replace(cidr.String())
}
