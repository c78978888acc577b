package inspect

// pathWords are those that lead out of a directory, or to a machine nobody
// outside should ask: the one that tells a cloud's secrets.
func pathWords() []signature {
	all := words(Traversal, (*value).climbs, "../", "..\\")
	all = append(all, words(Traversal, nil, "..;/")...)
	all = append(all, words(Traversal, (*value).secretFile, "/etc/passwd", "/etc/shadow", "/proc/self/", "\\win.ini", "/win.ini", "boot.ini", "/.ssh/id_", "/.aws/credentials")...)
	all = append(all, words(Traversal, (*value).begins, "php://filter", "php://input")...)
	all = append(all, words(SSRF, (*value).begins, "file:///", "gopher://", "dict://")...)
	return append(all, words(SSRF, (*value).host, "169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192", "2852039166",
		"0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376", "[fd00:ec2::254]", "[::ffff:a9fe:a9fe]", "[::ffff:169.254.169.254]",
		"metadata.google.internal", "metadata.tencentyun.com")...)
}

// sensitive are files nobody reads by climbing to them with good intent.
var sensitive = [...]string{"etc/", "etc\\", "proc/", "windows/", "windows\\", "win.ini", "web-inf", "meta-inf", ".env", ".git/", ".ssh/", ".aws/", "boot.ini", "var/log"}

// climbs: one step suffices in a path, and where somebody hid it; two in a query;
// elsewhere it is what is climbed to.
func (v *value) climbs(from, to int) bool {
	if p := v.at(from - 1); isWord(p) || p == '.' {
		return false
	}
	if v.place == inPath || v.masked && v.place != inBytes {
		return true
	}
	steps, i := 1, to
	for v.has(i, "../") || v.has(i, "..\\") {
		steps++
		i += 3
	}
	if v.place == inQuery && steps >= 2 {
		return true
	}
	if v.place == inBytes || !v.blankless() {
		return false
	}
	for _, s := range sensitive {
		if v.has(i, s) {
			return true
		}
	}
	return false
}

// secretFile: a file by its full name, as a value of its own.
func (v *value) secretFile(from, to int) bool {
	switch v.place {
	case inPath:
		return true
	case inBytes:
		return false
	}
	return v.blankless() && (from == 0 || v.at(0) == '.' || v.at(0) == '/' || v.at(0) == '\\' || v.has(0, "file:") || v.has(1, ":\\") || v.has(1, ":/"))
}

// begins: where a value begins.
func (v *value) begins(from, _ int) bool {
	return from == 0 && v.place != inBytes && v.place != inHeader
}

// host: an address where a URL has its host, or alone.
func (v *value) host(from, to int) bool {
	if b := v.at(to); isWord(b) || b == '.' && isWord(v.at(to+1)) || b == '-' {
		return false
	}
	if v.has(from-2, "//") || v.at(from-1) == '@' && v.within(0, from, "//") {
		return true
	}
	return from == 0 && v.place != inBytes && v.blankless() && v.text[0] != '2' // a bare number is one
}
