package policy

// Spoil changes one row of tables, the n-th of all in some order, and says which; false: there are not so many. It is put back by undo.
func (t *Tables) Spoil(n int, change func(*Row)) (key Key, undo func(), ok bool) {
	for _, table := range t.policies {
		for identity, b := range table.blocks {
			if n >= len(b.rows) {
				n -= len(b.rows)
				continue
			}
			r := &b.rows[n]
			was := r.Row
			change(&r.Row)
			return Key{r.bits, table.number, identity, r.protocol, r.port}, func() { r.Row = was }, true
		}
	}
	return Key{}, nil, false
}
