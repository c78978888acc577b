// Package static answers requests for files below a directory.
//
// Nothing outside the directory is reached, whatever the path and wherever links
// lead: every open goes through os.Root. Hidden files are not served, and only
// regular ones are. The package decides what to send; it writes nothing.
package static

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/mesh/http1"
)

// TimeFormat is how HTTP writes a time, which is in UTC.
const TimeFormat = "Mon, 02 Jan 2006 15:04:05 GMT"

// Dir is a directory whose files are served.
type Dir struct {
	root  *os.Root
	index []string
	try   string
}

// Open opens a directory. index are the files that stand for a directory; try is
// the file that stands for what is not there.
func Open(root string, index []string, try string) (*Dir, error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, fmt.Errorf("serve files: %w", err)
	}
	return &Dir{r, index, strings.TrimPrefix(try, "/")}, nil
}

// Close closes the directory. Files under way are sent to their end.
func (d *Dir) Close() error { return d.root.Close() }

// Answer is what to send.
type Answer struct {
	Status   int
	Location string // of a redirect, not encoded
	Type     string
	ETag     string
	Modified time.Time
	Size     int64 // of the whole file
	From, N  int64 // what of it to send
	File     *os.File
}

// Close closes the file.
func (a *Answer) Close() {
	if a.File != nil {
		a.File.Close()
	}
}

// Answer decides what a request for a path gets. p is a decoded path; m the rest
// of the request. The caller closes it.
func (d *Dir) Answer(p string, m *http1.Message) Answer {
	if method := string(m.Method); method != "GET" && method != "HEAD" {
		return Answer{Status: 405}
	}
	f, fi, name, status := d.find(p)
	if status != 0 {
		return Answer{Status: status, Location: p + "/"}
	}
	a := Answer{Status: 200, File: f, Type: kind(name), Size: fi.Size(), N: fi.Size(), Modified: fi.ModTime()}
	a.ETag = fmt.Sprintf(`"%x-%x"`, fi.ModTime().UnixNano(), fi.Size())
	a.conditions(m)
	return a
}

// find opens the file for a path.
func (d *Dir) find(p string) (f *os.File, fi fs.FileInfo, name string, status int) {
	name = path.Clean("/" + p)[1:]
	if name == "" {
		name = "."
	}
	if !hidden(name) {
		f, fi, status = d.open(name)
		if status == 0 && fi.IsDir() {
			f.Close()
			if !strings.HasSuffix(p, "/") {
				return nil, nil, "", 301
			}
			status = 404
			for _, index := range d.index {
				if f, fi, status = d.file(path.Join(name, index)); status == 0 {
					return f, fi, index, 0
				}
			}
		} else if status == 0 && (!fi.Mode().IsRegular() || strings.HasSuffix(p, "/")) {
			f.Close()
			status = 404
		}
	} else {
		status = 404
	}
	if status == 404 && d.try != "" {
		name = d.try
		f, fi, status = d.file(name)
	}
	return f, fi, name, status
}

// hidden names are those below a name that begins with a dot; what is well known
// is not.
func hidden(name string) bool {
	for segment := range strings.SplitSeq(name, "/") {
		if strings.HasPrefix(segment, ".") && segment != "." && segment != ".well-known" {
			return true
		}
	}
	return false
}

// open opens a file or a directory. Not to wait for the writer of a pipe, it
// does not block.
func (d *Dir) open(name string) (*os.File, fs.FileInfo, int) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, nil, 403
	case err != nil:
		return nil, nil, 404 // not there, or not below
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, 404
	}
	return f, fi, 0
}

func (d *Dir) file(name string) (*os.File, fs.FileInfo, int) {
	f, fi, status := d.open(name)
	if status == 0 && !fi.Mode().IsRegular() {
		f.Close()
		return nil, nil, 404
	}
	return f, fi, status
}

// kinds are the types of contents by extension; the system's list differs from
// machine to machine.
var kinds = map[string]string{
	".html": "text/html; charset=utf-8", ".htm": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
	".js": "text/javascript; charset=utf-8", ".mjs": "text/javascript; charset=utf-8", ".json": "application/json",
	".txt": "text/plain; charset=utf-8", ".md": "text/markdown; charset=utf-8", ".xml": "text/xml; charset=utf-8",
	".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif",
	".webp": "image/webp", ".avif": "image/avif", ".ico": "image/x-icon", ".pdf": "application/pdf", ".wasm": "application/wasm",
	".woff": "font/woff", ".woff2": "font/woff2", ".ttf": "font/ttf", ".mp4": "video/mp4", ".webm": "video/webm", ".mp3": "audio/mpeg",
	".zip": "application/zip", ".gz": "application/gzip", ".csv": "text/csv; charset=utf-8",
}

func kind(name string) string {
	ext := strings.ToLower(path.Ext(name))
	if k := kinds[ext]; k != "" {
		return k
	}
	return "application/octet-stream"
}

// conditions applies the conditional fields and the range, in the order of RFC
// 9110, section 13.2.2.
func (a *Answer) conditions(m *http1.Message) {
	if tags, ok := m.Field("If-Match"); ok {
		if !matches(string(tags), a.ETag, false) {
			a.Status, a.N = 412, 0
			return
		}
	} else if t, ok := moment(m, "If-Unmodified-Since"); ok && a.Modified.Truncate(time.Second).After(t) {
		a.Status, a.N = 412, 0
		return
	}
	if tags, ok := m.Field("If-None-Match"); ok {
		if matches(string(tags), a.ETag, true) {
			a.Status, a.N = 304, 0
			return
		}
	} else if t, ok := moment(m, "If-Modified-Since"); ok && !a.Modified.Truncate(time.Second).After(t) {
		a.Status, a.N = 304, 0
		return
	}
	if r, ok := m.Field("Range"); ok && string(m.Method) == "GET" && a.ifRange(m) {
		a.cut(string(r))
	}
}

func moment(m *http1.Message, name string) (time.Time, bool) {
	v, ok := m.Field(name)
	if !ok {
		return time.Time{}, false
	}
	t, err := time.Parse(TimeFormat, string(v))
	return t, err == nil
}

// matches compares a list of entity tags, weakly or strongly.
func matches(list, tag string, weak bool) bool {
	if strings.TrimSpace(list) == "*" {
		return true
	}
	for t := range strings.SplitSeq(list, ",") {
		t = strings.TrimSpace(t)
		if weak {
			t = strings.TrimPrefix(t, "W/")
		}
		if t == tag {
			return true
		}
	}
	return false
}

func (a *Answer) ifRange(m *http1.Message) bool {
	v, ok := m.Field("If-Range")
	if !ok {
		return true
	}
	if t, err := time.Parse(TimeFormat, string(v)); err == nil {
		return a.Modified.Truncate(time.Second).Equal(t)
	}
	return string(v) == a.ETag
}

// cut applies a Range field. Several ranges, and what is no range, get the whole.
func (a *Answer) cut(field string) {
	spec, ok := strings.CutPrefix(field, "bytes=")
	first, last, dash := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok || !dash || strings.Contains(spec, ",") {
		return
	}
	from, err1 := parse(first)
	to, err2 := parse(last)
	switch {
	case first == "" && err2 == nil: // the last bytes
		from, to = max(a.Size-to, 0), a.Size-1
		if last == "0" || a.Size == 0 {
			a.Status, a.N = 416, 0
			return
		}
	case err1 != nil || last != "" && err2 != nil:
		return
	case last == "":
		to = a.Size - 1
	case to < from:
		return
	}
	if from >= a.Size {
		a.Status, a.N = 416, 0
		return
	}
	a.Status, a.From, a.N = 206, from, min(to, a.Size-1)-from+1
}

func parse(s string) (int64, error) {
	for _, c := range s {
		if c < '0' || c > '9' {
			return 0, strconv.ErrSyntax
		}
	}
	return strconv.ParseInt(s, 10, 64)
}
