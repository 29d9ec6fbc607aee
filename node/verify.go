package node

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/boltfile"
)

// The library trusts its file: a broken page makes it panic, some on goroutines of its own, where nothing can recover.
// So verify walks every page that is in use before the library sees the file. The layout is that of bbolt's file
// format 2: pages of a power of two bytes, in the order of the machine that wrote them.
const (
	pageHeader    = 16 // id u64, flags u16, count u16, overflow u32
	element       = 16 // leaf: flags, pos, ksize, vsize u32; branch: pos, ksize u32, page u64
	bucketHeader  = 16 // root page u64, sequence u64
	metaSize      = 64 // behind the page's header
	metaSummed    = 56 // bytes of it that the checksum covers
	branchPage    = 0x01
	leafPage      = 0x02
	metaPage      = 0x04
	freelistPage  = 0x10
	bucketElement = 0x01
	fileMagic     = 0xED0CDAED
	fileFormat    = 2
	noFreelist    = ^uint64(0)
	minPageSize   = 1 << 10
	maxPageSize   = 1 << 16
)

// meta is what one of the two first pages says.
type meta struct {
	pageSize              uint32
	root, freelist, pages uint64
	txid                  uint64
}

// verifier walks one file.
type verifier struct {
	data []byte
	meta meta
	seen []bool // by page
}

// verify makes sure that the library can read a database without surprises. torn says that one of its two heads is
// broken, so that the last transaction may be missing. Errors are ErrInvalid of the library. It faults where the disk
// fails: the caller is guarded.
func verify(f *os.File) (torn bool, err error) {
	st, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !st.Mode().IsRegular() {
		return false, invalid("not a file but %s", st.Mode().Type())
	}
	m, torn, err := readMeta(f, st.Size())
	if err != nil {
		return false, err
	}
	if m.pages < 4 || m.pages > uint64(st.Size())/uint64(m.pageSize) {
		return false, invalid("%d bytes long, not made for %d pages of %d", st.Size(), m.pages, m.pageSize)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(m.pages)*int(m.pageSize), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return false, err
	}
	defer unix.Munmap(data)
	v := verifier{data: data, meta: m, seen: make([]bool, m.pages)}
	if err := v.tree(m.root, nil, nil, true); err != nil {
		return torn, err
	}
	return torn, v.freelist()
}

// readMeta reads the head that counts: of the two the later one that is whole. It must never be another one than the
// library takes: so a head that the library would take, but that can't be, spoils the file.
func readMeta(f *os.File, size int64) (m meta, torn bool, err error) {
	first, whole0, err := metaAt(f, 0)
	if err != nil {
		return meta{}, false, err
	}
	pageSize := first.pageSize
	for s := uint32(minPageSize); pageSize == 0 && s <= maxPageSize && int64(s) < size; s <<= 1 {
		other, _, err := metaAt(f, int64(s))
		if err != nil {
			return meta{}, false, err
		}
		pageSize = other.pageSize
	}
	if pageSize == 0 {
		return meta{}, false, invalid("not a database, or both of its heads are broken")
	}
	second, whole1, err := metaAt(f, int64(pageSize))
	switch {
	case err != nil:
		return meta{}, false, err
	case !whole0 && !whole1 || whole1 && second.pageSize != pageSize:
		return meta{}, false, invalid("a head for pages of another size than %d", pageSize)
	case whole1 && (!whole0 || second.txid > first.txid):
		return second, !whole0, nil
	}
	return first, !whole1, nil
}

// metaAt reads a head. One that the library does not take either, as a failing disk leaves it, is not whole and no error.
func metaAt(f *os.File, offset int64) (m meta, whole bool, err error) {
	var b [pageHeader + metaSize]byte
	if _, err := f.ReadAt(b[:], offset); err != nil {
		return meta{}, false, nil
	}
	raw, ne := b[pageHeader:], binary.NativeEndian
	sum := fnv.New64a()
	sum.Write(raw[:metaSummed])
	if ne.Uint32(raw) != fileMagic || ne.Uint32(raw[4:]) != fileFormat || ne.Uint64(raw[metaSummed:]) != sum.Sum64() {
		return meta{}, false, nil
	}
	m = meta{
		pageSize: ne.Uint32(raw[8:]),
		root:     ne.Uint64(raw[16:]),
		freelist: ne.Uint64(raw[32:]),
		pages:    ne.Uint64(raw[40:]),
		txid:     ne.Uint64(raw[48:]),
	}
	switch id := ne.Uint64(b[:]); {
	case m.pageSize < minPageSize || m.pageSize > maxPageSize || m.pageSize&(m.pageSize-1) != 0:
		return meta{}, false, invalid("page size %d", m.pageSize)
	case id > 1 || offset != int64(id)*int64(m.pageSize) || ne.Uint16(b[8:]) != metaPage:
		return meta{}, false, invalid("the head at %d says that it is page %d", offset, id)
	case m.txid >= 1<<62: // the next transactions would seem older than this one
		return meta{}, false, invalid("transaction number %d", m.txid)
	}
	return m, true, nil
}

// page is a page with all that overflows from it, which are marked as seen.
func (v *verifier) page(id uint64) ([]byte, error) {
	size := uint64(v.meta.pageSize)
	if id < 2 || id >= v.meta.pages {
		return nil, invalid("page %d of %d is referred to", id, v.meta.pages)
	}
	p := v.data[id*size:]
	if got := binary.NativeEndian.Uint64(p); got != id {
		return nil, invalid("page %d says that it is page %d", id, got)
	}
	more := uint64(binary.NativeEndian.Uint32(p[12:]))
	if more >= v.meta.pages-id {
		return nil, invalid("page %d goes on for %d pages", id, more)
	}
	for i := id; i <= id+more; i++ {
		if v.seen[i] {
			return nil, invalid("page %d is used twice", i)
		}
		v.seen[i] = true
	}
	return p[:(more+1)*size], nil
}

// freelist checks the list of free pages: in order, and none that is in use. A file without one is scanned for them by the
// library.
func (v *verifier) freelist() error {
	if v.meta.freelist == noFreelist {
		return nil
	}
	p, err := v.page(v.meta.freelist)
	if err != nil {
		return err
	}
	ne := binary.NativeEndian
	if flags := ne.Uint16(p[8:]); flags != freelistPage {
		return invalid("free list in a page of type %#x", flags)
	}
	count, ids := uint64(ne.Uint16(p[10:])), p[pageHeader:]
	if count == 0xffff { // too many for the header: the first number says how many
		count, ids = ne.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return invalid("a free list of %d pages", count)
	}
	last := uint64(0)
	for i := range count {
		id := ne.Uint64(ids[8*i:])
		if id < 2 || id >= v.meta.pages || id <= last || v.seen[id] {
			return invalid("page %d is free", id)
		}
		last = id
	}
	return nil
}

// tree walks the pages of one bucket. Its keys must lie in [low, high); nil is no bound.
func (v *verifier) tree(id uint64, low, high []byte, top bool) error {
	p, err := v.page(id)
	if err != nil {
		return err
	}
	switch flags := binary.NativeEndian.Uint16(p[8:]); flags {
	case leafPage:
		err = v.leaf(p, low, high, top, false)
	case branchPage:
		err = v.branch(p, low, high, top)
	default:
		err = invalid("page of type %#x", flags)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

func (v *verifier) branch(p, low, high []byte, top bool) error {
	ne := binary.NativeEndian
	count := int(ne.Uint16(p[10:]))
	if count == 0 {
		return invalid("no children")
	}
	keys, children := make([][]byte, count), make([]uint64, count)
	for i := range count {
		at := pageHeader + i*element
		if at+element > len(p) {
			return invalid("%d children", count)
		}
		e := p[at:]
		key, err := part(e, ne.Uint32(e), ne.Uint32(e[4:]), 0)
		if err != nil {
			return err
		}
		if len(key) == 0 {
			return invalid("a child without a key")
		}
		keys[i], children[i] = key, ne.Uint64(e[8:])
	}
	if err := ordered(keys, low, high); err != nil {
		return err
	}
	for i, child := range children {
		end := high
		if i+1 < count {
			end = keys[i+1]
		}
		if err := v.tree(child, keys[i], end, top); err != nil {
			return err
		}
	}
	return nil
}

// leaf checks a leaf page, or the one that a small bucket keeps inside its parent's page.
func (v *verifier) leaf(p, low, high []byte, top, inline bool) error {
	ne := binary.NativeEndian
	count := int(ne.Uint16(p[10:]))
	keys := make([][]byte, count)
	for i := range count {
		at := pageHeader + i*element
		if at+element > len(p) {
			return invalid("%d records", count)
		}
		e := p[at:]
		bucket, ksize, vsize := ne.Uint32(e), ne.Uint32(e[8:]), ne.Uint32(e[12:])
		both, err := part(e, ne.Uint32(e[4:]), ksize, vsize)
		if err != nil {
			return err
		}
		if ksize == 0 {
			return invalid("a record without a key")
		}
		keys[i] = both[:ksize]
		if bucket > bucketElement {
			return invalid("record %q of type %#x", keys[i], bucket)
		}
		if top != (bucket == bucketElement) { // all our buckets are on the top level, and nothing else is
			return invalid("bucket or record %q in a wrong place", keys[i])
		}
		if bucket == bucketElement {
			if err := v.bucket(both[ksize:], inline); err != nil {
				return fmt.Errorf("bucket %q: %w", keys[i], err)
			}
		}
	}
	return ordered(keys, low, high)
}

func (v *verifier) bucket(value []byte, inline bool) error {
	if len(value) < bucketHeader || inline {
		return invalid("no bucket")
	}
	if root := binary.NativeEndian.Uint64(value); root != 0 {
		return v.tree(root, nil, nil, false)
	}
	p := value[bucketHeader:]
	if len(p) < pageHeader || binary.NativeEndian.Uint16(p[8:]) != leafPage {
		return invalid("no page inside")
	}
	return v.leaf(p, nil, nil, false, true)
}

// part is what an element of a page points to, counted from the element itself.
func part(e []byte, pos, ksize, vsize uint32) ([]byte, error) {
	end := uint64(pos) + uint64(ksize) + uint64(vsize)
	if pos < element || end > uint64(len(e)) {
		return nil, invalid("a record behind the page's end")
	}
	return e[pos:end], nil
}

func ordered(keys [][]byte, low, high []byte) error {
	for i, k := range keys {
		if i > 0 && bytes.Compare(keys[i-1], k) >= 0 ||
			low != nil && bytes.Compare(k, low) < 0 || high != nil && bytes.Compare(k, high) >= 0 {
			return invalid("key %q is out of order", k)
		}
	}
	return nil
}

func invalid(format string, args ...any) error { return boltfile.Invalid(format, args...) }
