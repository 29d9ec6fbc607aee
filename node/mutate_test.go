package node

import (
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

// Changes numbers, flags and elements anywhere in the file, with the heads' checksums put right: what a fuzzer of bytes
// rarely comes to. The library must never be shown a file that makes it panic: some of its panics nothing can recover.
func TestMutatedFile(t *testing.T) {
	const files = 2500
	dir, data := good(t, 12)
	page := os.Getpagesize()
	pages := len(data) / page
	r := rand.New(rand.NewPCG(1, 1))
	for n := range files {
		bad := slices.Clone(data)
		for range 1 + r.IntN(6) {
			p := bad[r.IntN(pages)*page:]
			switch r.IntN(6) {
			case 0:
				p[r.IntN(300)] = byte(r.Uint32())
			case 1:
				p[r.IntN(160)] = []byte{0, 1, 2, 3, 4, 8, 16, 0x7f, 0x80, 0xff}[r.IntN(10)]
			case 2:
				binary.NativeEndian.PutUint64(p[8*r.IntN(20):], uint64(r.IntN(40)))
			case 3:
				binary.NativeEndian.PutUint32(p[4*r.IntN(40):], uint32(r.IntN(300)))
			case 4:
				copy(p[element*r.IntN(12):][:element], bad[r.IntN(pages)*page+element*r.IntN(12):])
			case 5:
				bad[r.IntN(len(bad))]++
			}
		}
		for _, head := range []int{0, page} {
			b := bad[head+pageHeader:]
			sum := fnv.New64a()
			sum.Write(b[:metaSummed])
			binary.NativeEndian.PutUint64(b[metaSummed:], sum.Sum64())
		}
		damaged(t, dir, bad)
		if t.Failed() {
			t.Fatalf("file %d", n)
		}
	}
}

// A head that is the other one's copy has the right checksum, and would hide the last transaction.
func TestCopiedHead(t *testing.T) {
	dir, data := good(t, 2)
	page := os.Getpagesize()
	for _, from := range []int{0, 1} {
		bad := slices.Clone(data)
		copy(bad[(1-from)*page:][:page], data[from*page:])
		if !damaged(t, dir, bad) {
			t.Errorf("head %d in both places was taken", from)
		}
	}
}
