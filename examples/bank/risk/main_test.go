package main

import (
	"strings"
	"testing"

	"example.com/bank/dubbo"
)

func TestJudge(t *testing.T) {
	r := rules{limit: 100, blocked: map[string]bool{"mallory": true}}
	for _, test := range []struct {
		args []any
		want string // empty: an error
	}{
		{[]any{"alice", "bob", int64(100)}, "allow"},
		{[]any{"alice", "bob", int64(101)}, "deny: more than"},
		{[]any{"mallory", "bob", int64(1)}, "deny: account"},
		{[]any{"alice", "mallory", int64(1)}, "deny: account"},
		{[]any{"alice", "bob"}, ""},
		{[]any{"alice", "bob", "1"}, ""},
	} {
		got, err := r.answer(t.Context(), dubbo.Request{Service: service, Method: "judge", Args: test.args})
		if (err != nil) != (test.want == "") || !strings.HasPrefix(got, test.want) {
			t.Errorf("%v: got %q, %v", test.args, got, err)
		}
	}
	if _, err := r.answer(t.Context(), dubbo.Request{Service: "other", Method: "judge"}); err == nil {
		t.Error("another service was answered for")
	}
}
