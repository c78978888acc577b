package dubbo

import (
	"encoding/binary"

	"hauberk.dev/mesh/hessian"
)

// Attachments shows each attachment of the request f whose value is a string, and
// tells where in the body they end. All of the body must be there, and nothing may
// follow. inPlace says that value is a part of the body.
func (r *Reader) Attachments(f *Frame, each func(key, value []byte, inPlace bool)) (end int, err error) {
	if f.Serialization != hessian2 {
		return 0, unclear("serialization %d", f.Serialization)
	}
	r.body.Reset(f.Body, hessian.Final)
	if _, err := r.head(); err != nil {
		return 0, unclear("the body: %v", err)
	}
	if there, err := r.body.Map(); err != nil || !there {
		return 0, unclear("no attachments (%v)", err)
	}
	for {
		more, err := r.body.More()
		if err != nil {
			return 0, unclear("the attachments: %v", err)
		}
		if !more {
			break
		}
		if err := r.attachment(f.Body, each); err != nil {
			return 0, unclear("the attachments: %v", err)
		}
	}
	if end = r.body.Offset(); end != len(f.Body) {
		return 0, unclear("%d bytes after the attachments", len(f.Body)-end)
	}
	return end - 1, nil
}

func (r *Reader) attachment(body []byte, each func(key, value []byte, inPlace bool)) error {
	key, err := r.body.String()
	if err != nil {
		return err
	}
	if !r.body.IsString() {
		return r.body.Skip()
	}
	value, err := r.body.String()
	if err != nil {
		return err
	}
	at := r.body.Offset()
	each(key, value, len(value) > 0 && at >= len(value) && &body[at-len(value)] == &value[0])
	return nil
}

// Extend appends the whole frame, with attachments added at end, which Attachments
// has told. It fails if the frame would be too long.
func Extend(dst, frame []byte, end int, pairs [][2]string) ([]byte, error) {
	begin := len(dst)
	dst = append(dst, frame[:HeaderLen+end]...)
	for _, p := range pairs {
		dst = hessian.AppendString(hessian.AppendString(dst, p[0]), p[1])
	}
	dst = append(dst, frame[HeaderLen+end:]...)
	body := len(dst) - begin - HeaderLen
	if body > MaxBody {
		return dst[:begin], malformed("a body of %d bytes; at most %d", body, MaxBody)
	}
	binary.BigEndian.PutUint32(dst[begin+12:], uint32(body))
	return dst, nil
}
