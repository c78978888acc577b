package guard

import "testing"

func seedDomains() []byte {
	b := append64(append32(nil, 1), 7)
	return append(append16(b, 3), "moc"...)
}

func FuzzParseDomains(f *testing.F) {
	f.Add(seedDomains())
	f.Add([]byte{})
	f.Add([]byte{1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var p policy
		if err := p.parseDomains(b); err != nil {
			return
		}
		for _, d := range p.domains {
			if len(d.id) != 8 || len(d.text) == 0 || len(d.text) > domainSize {
				t.Errorf("%+v: not a name that fits the map", d)
			}
		}
	})
}

func TestParseDomains(t *testing.T) {
	var p policy
	if err := p.parseDomains(seedDomains()); err != nil || len(p.domains) != 1 || p.domains[0].text != "moc" {
		t.Errorf("%+v %v; want one name", p.domains, err)
	}
	for n := range len(seedDomains()) {
		if err := new(policy).parseDomains(seedDomains()[:n]); err == nil {
			t.Errorf("names cut after %d bytes were read", n)
		}
	}
}
