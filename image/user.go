package image

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
)

// resolve fills UID, GID and Groups from User: "", "user", "user:group", each
// a number or a name in the image's own files. A number needs no entry there.
func (c *Config) resolve(passwd, group string) error {
	user, grp, withGroup := strings.Cut(c.User, ":")
	if user == "" {
		user = "0"
	}
	uid, numeric, err := number(user)
	if err != nil {
		return fmt.Errorf("resolve user %q: %w", c.User, err)
	}
	name := ""
	found := false
	for f := range lines(passwd, 4) {
		if !(numeric && f[2] == user || !numeric && f[0] == user) {
			continue
		}
		id, ok1, _ := number(f[2])
		gid, ok2, _ := number(f[3])
		if !ok1 || !ok2 {
			continue
		}
		name, uid, c.GID, found = f[0], id, gid, true
		if len(f) > 5 && strings.HasPrefix(f[5], "/") {
			c.Home = f[5]
		}
		break
	}
	if !numeric && !found {
		return fmt.Errorf("resolve user %q: the image's /etc/passwd has no such name", c.User)
	}
	c.UID = uid
	if withGroup {
		c.GID, err = findGroup(grp, group)
		if err != nil {
			return fmt.Errorf("resolve user %q: %w", c.User, err)
		}
		return nil
	}
	c.Groups = memberships(name, group)
	return nil
}

// As gives the configuration with another user, in the words of an image: "",
// "user" or "user:group", each a number or a name.
func (i Image) As(user string) (Config, error) {
	raw, err := os.ReadFile(strings.TrimSuffix(i.Path, ".erofs") + ".json")
	if err != nil {
		return Config{}, fmt.Errorf("resolve user %q: %w", user, err)
	}
	var r record
	if err := json.Unmarshal(raw, &r); err != nil {
		return Config{}, fmt.Errorf("resolve user %q: %w", user, err)
	}
	if strings.ContainsRune(user, 0) {
		return Config{}, fmt.Errorf("resolve user %q: it holds a zero byte", user)
	}
	c := i.Config
	c.User, c.UID, c.GID, c.Groups, c.Home = user, 0, 0, nil, ""
	return c, c.resolve(r.Passwd, r.Group)
}

// number reads an identity; ok is false for a name.
func number(s string) (n uint32, ok bool, err error) {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, false, nil
	}
	if v >= math.MaxUint32 {
		return 0, false, fmt.Errorf("%s is out of range", s)
	}
	return uint32(v), true, nil
}

func findGroup(want, group string) (uint32, error) {
	gid, numeric, err := number(want)
	if numeric || err != nil {
		return gid, err
	}
	for f := range lines(group, 3) {
		if id, ok, _ := number(f[2]); ok && f[0] == want {
			return id, nil
		}
	}
	return 0, fmt.Errorf("the image's /etc/group has no %q", want)
}

// memberships lists the groups that name a user.
func memberships(user, group string) []uint32 {
	var out []uint32
	if user == "" {
		return nil
	}
	for f := range lines(group, 4) {
		id, ok, _ := number(f[2])
		if ok && len(out) < 256 && slices.Contains(strings.Split(f[3], ","), user) {
			out = append(out, id)
		}
	}
	return out
}

// lines yields the lines that have at least n fields.
func lines(file string, n int) func(func([]string) bool) {
	return func(yield func([]string) bool) {
		for l := range strings.SplitSeq(file, "\n") {
			if f := strings.Split(l, ":"); len(f) >= n && !yield(f) {
				return
			}
		}
	}
}
