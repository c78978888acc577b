package plan

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// Traffic is written as it is read; nothing is said of what is absent.
func TestTrafficJSON(t *testing.T) {
	text := `{"balancer":"maglev","slowStart":"1m30s","outlier":{"ejection":"2s"},"breaker":{"connections":7},"retry":{"perTry":"500ms"}}`
	var tr Traffic
	if err := json.Unmarshal([]byte(text), &tr); err != nil {
		t.Fatal(err)
	}
	if tr.SlowStart != Duration(90*time.Second) || tr.Outlier.Ejection != Duration(2*time.Second) || tr.Retry.PerTry != Duration(time.Second/2) {
		t.Errorf("%+v", tr)
	}
	if got, err := json.Marshal(tr); err != nil || string(got) != text {
		t.Errorf("%s, %v", got, err)
	}
	if got, err := json.Marshal(Service{}); err != nil || strings.Contains(string(got), "traffic") {
		t.Errorf("%s, %v", got, err)
	}
	for _, bad := range []string{`{"timeout":"-1s"}`, `{"timeout":"soon"}`, `{"timeout":5}`, `{"timeout":""}`} {
		if err := json.Unmarshal([]byte(bad), &tr); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
}
