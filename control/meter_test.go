package control

import (
	"testing"
	"time"
)

func TestMeterCountsSinceAMoment(t *testing.T) {
	var m meter
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for range 5 {
		m.count("a", at)
	}
	began := at.Add(100 * time.Millisecond)
	if n := m.seen([]string{"a", "b"}, began, began); n != 0 {
		t.Errorf("what was before counts: %v", n)
	}
	m.count("a", began.Add(2*time.Second))
	m.count("b", began.Add(2*time.Second))
	if n := m.seen([]string{"a", "b"}, began, began.Add(time.Minute)); n != 2 {
		t.Errorf("%v since, want 2", n)
	}
	if r := m.rate([]string{"a"}, began.Add(time.Minute)); r != 0.6 {
		t.Errorf("%v a minute, want 0.6", r)
	}
	m.count("a", at.Add(meterSpan+time.Minute))
	if n := m.seen([]string{"a"}, at, at.Add(time.Hour)); n != 1 {
		t.Errorf("%v are remembered, want 1", n)
	}
}
