package commit

import (
	"cmp"
	"errors"
	"fmt"
	stdmaps "maps"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/maps"
)

// SetServices makes caracal_service equal to what is given, writing differences only, and tells how many entries came and went. Of
// two for one port the last counts. When some came the epoch is raised: flows that were judged by a Service's own address are judged
// behind the translation from then on. Flows to what went stay as they are, as they do in the host's stack. maps.ErrFull when they
// don't fit: then the last entries of those Services that have the most are left out, and maps.Others is there for them. Callers hold
// the node lock.
func SetServices(m *maps.Maps, all []maps.Service) (came, went int, err error) {
	type port struct{ maps.Service }
	of := func(s maps.Service) port {
		s.Name = ""
		return port{s}
	}
	room, err := m.ServiceRoom()
	if err != nil {
		return 0, 0, err
	}
	all, left := fit(all, room)
	wanted := make(map[port]maps.Service, len(all))
	for _, s := range all {
		s.Name = s.Name[:min(len(s.Name), maps.MaxServiceName)]
		wanted[of(s)] = s
	}
	present, err := m.Services()
	if err != nil {
		return 0, 0, err
	}
	var gone, renamed []maps.Service
	for _, s := range present {
		w, want := wanted[of(s)]
		switch {
		case !want:
			gone = append(gone, s)
		case w != s:
			renamed = append(renamed, w)
		}
		delete(wanted, of(s))
	}
	if err := m.RemoveServices(gone); err != nil {
		return 0, 0, err
	}
	fresh := make([]maps.Service, 0, len(wanted))
	for _, s := range wanted {
		fresh = append(fresh, s)
	}
	err = m.PutServices(append(renamed, fresh...))
	if len(fresh) > 0 {
		_, raised := m.RaiseEpoch()
		err = errors.Join(err, raised)
	}
	if err == nil {
		err = left
	}
	return len(fresh), len(gone), err
}

// fit takes as many entries as there is room for: of each Service its first ones.
func fit(all []maps.Service, room int) ([]maps.Service, error) {
	if len(all) <= room {
		return all, nil
	}
	place := make(map[string]int) // by Service: entries so far
	at := make([]int, len(all))   // the place of each in its Service
	order := make([]int, len(all))
	for i, s := range all {
		at[i], order[i] = place[s.Name], i
		place[s.Name]++
	}
	slices.SortStableFunc(order, func(x, y int) int { return cmp.Compare(at[x], at[y]) })
	kept := make([]maps.Service, 0, room)
	for _, i := range order[:room-1] {
		kept = append(kept, all[i])
		place[all[i].Name]--
	}
	var short []string
	for _, name := range slices.Sorted(stdmaps.Keys(place)) {
		if place[name] > 0 {
			short = append(short, fmt.Sprintf("%s (%d left out)", name, place[name]))
		}
	}
	err := fmt.Errorf("%w: Services have %d ports at their addresses, and there is room for %d: delete some, or have them name fewer: %s",
		maps.ErrFull, len(all), room, strings.Join(short[:min(len(short), 20)], ", "))
	return append(kept, maps.Others), err
}
