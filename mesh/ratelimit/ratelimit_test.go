package ratelimit_test

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rl "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	service "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"hauberk.dev/mesh/ratelimit"
)

// TestRequest has the generated code read what is written.
func TestRequest(t *testing.T) {
	raw := ratelimit.AppendRequest(nil, "shop", [][]ratelimit.Entry{{{Key: "client", Value: "10.0.0.1"}, {Key: "path", Value: "/a"}}, {{Key: "user", Value: "u"}}})
	got := &service.RateLimitRequest{}
	if err := proto.Unmarshal(raw, got); err != nil {
		t.Fatal(err)
	}
	entry := func(k, v string) *rl.RateLimitDescriptor_Entry {
		return &rl.RateLimitDescriptor_Entry{Key: k, Value: v}
	}
	want := &service.RateLimitRequest{Domain: "shop", Descriptors: []*rl.RateLimitDescriptor{
		{Entries: []*rl.RateLimitDescriptor_Entry{entry("client", "10.0.0.1"), entry("path", "/a")}},
		{Entries: []*rl.RateLimitDescriptor_Entry{entry("user", "u")}}}}
	if !proto.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if service.RateLimitService_ShouldRateLimit_FullMethodName != ratelimit.Path {
		t.Errorf("path is %s", service.RateLimitService_ShouldRateLimit_FullMethodName)
	}
}

func limited(code service.RateLimitResponse_Code, per, left uint32, reset time.Duration) *service.RateLimitResponse_DescriptorStatus {
	return &service.RateLimitResponse_DescriptorStatus{Code: code, LimitRemaining: left, DurationUntilReset: durationpb.New(reset),
		CurrentLimit: &service.RateLimitResponse_RateLimit{RequestsPerUnit: per, Unit: service.RateLimitResponse_RateLimit_MINUTE}}
}

const (
	yes = service.RateLimitResponse_OK
	no  = service.RateLimitResponse_OVER_LIMIT
)

var answers = map[string]struct {
	message *service.RateLimitResponse
	want    ratelimit.Answer
}{
	"yes": {&service.RateLimitResponse{OverallCode: yes}, ratelimit.Answer{}},
	"the least left": {&service.RateLimitResponse{OverallCode: yes, Statuses: []*service.RateLimitResponse_DescriptorStatus{
		limited(yes, 10, 5, time.Minute), limited(yes, 3, 2, time.Second), {Code: yes}}},
		ratelimit.Answer{Limit: 3, Remaining: 2, Reset: time.Second, Known: true}},
	"no, and by which": {&service.RateLimitResponse{OverallCode: no, Statuses: []*service.RateLimitResponse_DescriptorStatus{
		limited(yes, 9, 0, time.Hour), limited(no, 4, 0, 7*time.Second)},
		ResponseHeadersToAdd: []*core.HeaderValue{{Key: "x-a", Value: "1"}, {Key: "x-b", RawValue: []byte("2")}}, RawBody: []byte("b")},
		ratelimit.Answer{Over: true, Limit: 4, Reset: 7 * time.Second, Known: true, Headers: []ratelimit.Entry{{Key: "x-a", Value: "1"}, {Key: "x-b", Value: "2"}}}},
}

func TestParse(t *testing.T) {
	for name, c := range answers {
		raw, err := proto.Marshal(c.message)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ratelimit.Parse(raw); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, c.want)
		}
	}
	for want, raw := range map[string][]byte{
		"says neither":     nil,
		"code 3":           {8, 3},
		"over 64 statuses": append([]byte{8, 1}, bytes.Repeat([]byte{18, 0}, 65)...),
		"over 16 header":   append([]byte{8, 1}, bytes.Repeat([]byte{26, 0}, 17)...),
		"at most 65536":    make([]byte, ratelimit.MaxAnswer+1),
		"broken":           {18, 9, 1},
	} {
		if _, err := ratelimit.Parse(raw); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %s", raw[:min(len(raw), 9)], err, want)
		}
	}
	if _, err := ratelimit.Parse(nil); !errors.Is(err, ratelimit.ErrUnknown) {
		t.Error(err)
	}
}

// FuzzParse wants of every answer what the generated code reads of it.
func FuzzParse(f *testing.F) {
	for _, c := range answers {
		raw, err := proto.Marshal(c.message)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte{8, 2, 18, 4, 34, 2, 8, 255})
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, err := ratelimit.Parse(raw)
		want := &service.RateLimitResponse{}
		if err != nil || proto.Unmarshal(raw, want) != nil {
			return
		}
		if a.Over != (want.OverallCode == no) {
			t.Errorf("over is %v, and the code %v", a.Over, want.OverallCode)
		}
		if len(a.Headers) != len(want.ResponseHeadersToAdd) {
			t.Errorf("%d header fields, want %d", len(a.Headers), len(want.ResponseHeadersToAdd))
		}
	})
}
