package resp

import "bytes"

// Effect is what a command does to the order of what its server says.
type Effect int

const (
	OneAnswer Effect = iota
	Opens            // one answer; commands are queued after it
	Closes           // one answer; they no longer are
	Disorders        // any number of answers, now or at any time
	Foreign          // what follows is not RESP
)

// Command is the beginning of a request: its first arguments, which tell what it
// asks for. Name and Sub lie in the bytes it was read from.
type Command struct {
	Size int // of the beginning
	Look int // bytes of it that must be there
	Rest int // arguments after it
	// Name is nil if it is longer than MaxName. Sub is that of a command that is
	// one of several under its name; Long tells that it is there, but too long.
	Name, Sub []byte
	Long      bool
}

// Begin reads the beginning of a request. Size is 0 if more of b is needed.
func Begin(b []byte) (c Command, err error) {
	if len(b) == 0 {
		return c, nil
	}
	if b[0] != '*' {
		return c, malformed("a request that begins with %q: inline commands are not passed on", b[:1])
	}
	count, at, err := number(b, MaxArguments, false)
	if err != nil || at == 0 {
		return c, err
	}
	if count == 0 {
		return c, malformed("a request of no arguments")
	}
	name, size, look, err := short(b[at:])
	if err != nil || size == 0 {
		return c, err
	}
	c = Command{Size: at + size, Look: at + look, Rest: count - 1, Name: name}
	if c.Rest == 0 || name == nil || !container(name) {
		return c, nil
	}
	sub, size, look, err := short(b[c.Size:])
	if err != nil || size == 0 {
		return Command{}, err
	}
	c.Look, c.Size = c.Size+look, c.Size+size
	c.Sub, c.Long, c.Rest = sub, sub == nil, c.Rest-1
	return c, nil
}

// short reads an argument if it is not long; if it is, look covers its head alone.
func short(b []byte) (text []byte, size, look int, err error) {
	size, look, err = Argument(b)
	if err != nil || size == 0 || size-look-2 > MaxName {
		return nil, size, look, err
	}
	if len(b) < size {
		return nil, 0, 0, nil
	}
	if b[size-2] != '\r' || b[size-1] != '\n' {
		return nil, 0, 0, malformed("%q after an argument, not the end of its line", b[size-2:size])
	}
	text = b[look : size-2]
	if bytes.IndexByte(text, 0) >= 0 {
		// Servers look a name up by all its bytes and compare it up to a zero byte.
		return nil, 0, 0, malformed("a zero byte in %q, where servers take a name to end", text)
	}
	return text, size, size, nil
}

// Argument reads the head of an argument: how long all of it is, and the head. Both
// are 0 if more of b is needed.
func Argument(b []byte) (size, head int, err error) {
	if len(b) == 0 {
		return 0, 0, nil
	}
	if b[0] != '$' {
		return 0, 0, malformed("an argument that begins with %q", b[:1])
	}
	n, head, err := number(b, MaxBulk, false)
	if err != nil || head == 0 {
		return 0, 0, err
	}
	return head + n + 2, head, nil
}

// Method appends the command in upper case, with its subcommand after a bar. It is
// false if that cannot be told.
func (c *Command) Method(dst []byte) ([]byte, bool) {
	if len(c.Name) == 0 || c.Long {
		return dst, false
	}
	dst = appendUpper(dst, c.Name)
	if c.Sub != nil {
		dst = appendUpper(append(dst, '|'), c.Sub)
	}
	return dst, true
}

func appendUpper(dst, b []byte) []byte {
	for _, c := range b {
		if c >= 'a' && c <= 'z' {
			c -= 'a' - 'A'
		}
		dst = append(dst, c)
	}
	return dst
}

// container tells whether a command is several under one name, as of Redis 7 and
// Valkey 8.
func container(name []byte) bool {
	var buf [MaxName]byte
	switch string(appendUpper(buf[:0], name)) {
	case "ACL", "CLIENT", "CLUSTER", "COMMAND", "COMMANDLOG", "CONFIG", "DEBUG", "FUNCTION", "LATENCY", "MEMORY", "MODULE", "OBJECT", "PUBSUB",
		"SCRIPT", "SENTINEL", "SLOWLOG", "XGROUP", "XINFO":
		return true
	}
	return false
}

// EffectOf tells what a command does, by its method and how many arguments there
// are after its beginning.
func EffectOf(method []byte, rest int) Effect {
	switch string(method) {
	case "MULTI":
		return Opens
	case "EXEC", "DISCARD", "RESET":
		if rest == 0 { // else it is refused by the server, which goes on queuing
			return Closes
		}
	case "SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE", "MONITOR", "CLIENT|REPLY", "REPLCONF":
		return Disorders
	case "SYNC", "PSYNC":
		return Foreign
	}
	return OneAnswer
}
