package h2frame

//lint:file-ignore SA1019 the independent reader here is x/net's own

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What is appended is what x/net's framer reads.
func TestFrames(t *testing.T) {
	var b []byte
	b = Append(b, Settings, 0, 0, AppendSetting(AppendSetting(nil, SettingWindow, 7), SettingMaxFrame, 1<<20))
	b = AppendWord(b, Window, 5, 1<<31-1)
	b = AppendWord(b, Reset, 3, uint32(CodeCancel))
	b = AppendGoAway(b, 9, CodeCalm)
	b = Append(b, Data, FlagEndStream, 1<<31-1, []byte("bytes"))
	r := http2.NewFramer(nil, bytes.NewReader(b))
	var got []string
	for f, err := r.ReadFrame(); err == nil; f, err = r.ReadFrame() {
		s := f.Header().String()
		switch f := f.(type) {
		case *http2.WindowUpdateFrame:
			s += fmt.Sprint(f.Increment)
		case *http2.RSTStreamFrame:
			s += fmt.Sprint(uint32(f.ErrCode))
		case *http2.GoAwayFrame:
			s += fmt.Sprint(f.LastStreamID, uint32(f.ErrCode))
		case *http2.SettingsFrame:
			f.ForeachSetting(func(v http2.Setting) error { s += v.String(); return nil })
		case *http2.DataFrame:
			s += string(f.Data())
		}
		got = append(got, s)
	}
	want := []string{
		"[FrameHeader SETTINGS len=12][INITIAL_WINDOW_SIZE = 7][MAX_FRAME_SIZE = 1048576]",
		"[FrameHeader WINDOW_UPDATE stream=5 len=4]2147483647",
		"[FrameHeader RST_STREAM stream=3 len=4]8",
		"[FrameHeader GOAWAY len=8]9 11",
		"[FrameHeader DATA flags=END_STREAM stream=2147483647 len=5]bytes",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("read\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	var put [HeaderLen]byte
	Put(put[:], 0x123456, Headers, FlagEndHeaders|FlagPadded, 1<<30+1)
	if h := Parse(put[:]); h != (Header{0x123456, Headers, FlagEndHeaders | FlagPadded, 1<<30 + 1}) || !h.Has(FlagPadded) || h.Has(FlagPriority) {
		t.Errorf("%+v", h)
	}
	if !bytes.Equal(put[:], AppendHeader(nil, 0x123456, Headers, FlagEndHeaders|FlagPadded, 1<<30+1)) {
		t.Errorf("%x", put)
	}
}

func TestUnpad(t *testing.T) {
	for name, c := range map[string]struct {
		kind, flags byte
		in, want    string
		self        bool
		code        Code // of the fault; 0 for none
	}{
		"plain":                 {Data, 0, "abc", "abc", false, 0},
		"padded":                {Data, FlagPadded, "\x02abc\x00\x00", "abc", false, 0},
		"all padding":           {Data, FlagPadded, "\x02\x00\x00", "", false, 0},
		"no pad length":         {Data, FlagPadded, "", "", false, CodeFrameSize},
		"too much padding":      {Headers, FlagPadded, "\x03ab", "", false, CodeProtocol},
		"priority":              {Headers, FlagPriority, "\x00\x00\x00\x03\x10x", "x", false, 0},
		"priority on itself":    {Headers, FlagPriority, "\x80\x00\x00\x05\x10x", "x", true, 0},
		"priority cut":          {Headers, FlagPriority, "\x00\x00\x00\x03", "", false, CodeFrameSize},
		"priority is no DATA's": {Data, FlagPriority, "x", "x", false, 0},
		"both":                  {Headers, FlagPriority | FlagPadded, "\x01\x00\x00\x00\x03\x10x\x00", "x", false, 0},
	} {
		got, self, err := Unpad(Header{Kind: c.kind, Flags: c.flags, Stream: 5}, []byte(c.in))
		var e *Error
		switch {
		case c.code != 0 && (!errors.As(err, &e) || e.Code != c.code):
			t.Errorf("%s: %v, want code %d", name, err, c.code)
		case c.code == 0 && (err != nil || string(got) != c.want || self != c.self):
			t.Errorf("%s: %q, %v, %v", name, got, self, err)
		}
	}
}

// A table that is read out and set again stays in step with the encoder's, also
// one that the encoder has made smaller.
func TestTable(t *testing.T) {
	for _, most := range []uint32{TableSize, 200, 33, 0} {
		var block bytes.Buffer
		e := hpack.NewEncoder(&block)
		e.SetMaxDynamicTableSize(most)
		d := hpack.NewDecoder(TableSize, nil)
		said := 0
		say := func() {
			t.Helper()
			var want []hpack.HeaderField
			for range 20 {
				f := hpack.HeaderField{Name: fmt.Sprintf("name-%d", said%7), Value: strings.Repeat(string(rune(0xe9)), said%50)}
				want = append(want, f)
				e.WriteField(f)
				said++
			}
			if got, err := d.DecodeFull(block.Bytes()); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("table of %d: %v, %v", most, got, err)
			}
			block.Reset()
		}
		for range 30 {
			say()
			table, size := Table(d)
			if size != most {
				t.Fatalf("table of %d is said to be one of %d", most, size)
			}
			d = hpack.NewDecoder(TableSize, nil)
			if err := SetTable(d, table, size); err != nil {
				t.Fatal(err)
			}
		}
	}
	d := hpack.NewDecoder(TableSize, nil)
	for name, err := range map[string]error{
		"one field":  SetTable(d, []Field{{Name: make([]byte, TableSize)}}, TableSize),
		"many":       SetTable(d, make([]Field, TableSize/overhead+1), TableSize),
		"its bounds": SetTable(d, nil, TableSize+1),
	} {
		if err == nil {
			t.Errorf("%s: a table that is too large is taken", name)
		}
	}
}
