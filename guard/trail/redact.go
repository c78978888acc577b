package trail

import (
	"path"
	"regexp"
	"strings"
)

// What looks like a secret, in the order in which it is looked for. What stands
// in a pattern's first group stays, and so does a second, after the secret.
var secrets = []struct {
	kind    string
	pattern *regexp.Regexp
}{
	{"url user", regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@]+(@)`)},
	{"key block", regexp.MustCompile(`(-----BEGIN [A-Z ]*PRIVATE KEY-----)[\s\S]*`)},
	{"authorization", regexp.MustCompile(`(?i)((?:proxy-)?authorization\s*[:=]\s*(?:[a-z]+\s+)?)\S+`)},
	{"cookie", regexp.MustCompile(`(?i)((?:set-)?cookie\s*:\s*)\S.*`)},
	{"bearer", regexp.MustCompile(`(?i)(\bbearer\s+)[a-z0-9._~+/=-]{8,}`)},
	{"named", regexp.MustCompile(`(?i)([a-z0-9_.-]*(?:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credentials?)[a-z0-9_.-]*["']?\s*[=:]\s*["']?)[^\s"'&;,]+`)},
	{"jwt", regexp.MustCompile(`()\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*`)},
	{"aws key", regexp.MustCompile(`()\b(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z0-9]{16}\b`)},
	{"token", regexp.MustCompile(`()\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|sk-[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{20,})`)},
	{"hex key", regexp.MustCompile(`()\b[0-9a-fA-F]{32,}\b`)},
}

// base64ish is text that may be a key: long, and of letters of both cases and
// digits, which a path or a word hardly is.
var base64ish = regexp.MustCompile(`[A-Za-z0-9+_-][A-Za-z0-9+/_-]{38,}={0,2}`)

// secretFlag is a flag whose next argument is a secret.
var secretFlag = regexp.MustCompile(`(?i)^--?[a-z0-9_-]*(?:password|passwd|passphrase|pwd|secret|token|api-?key|access-?key|private-?key|credentials?)$`)

// shortFlags are flags of one letter that take a secret, by program.
var shortFlags = map[string][]string{
	"mysql": {"-p"}, "mysqldump": {"-p"}, "mysqladmin": {"-p"}, "mariadb": {"-p"}, "mariadb-dump": {"-p"},
	"sshpass": {"-p"}, "redis-cli": {"-a"}, "curl": {"-u", "--user", "-U", "--proxy-user"}, "wget": {"--user"}, "ldapsearch": {"-w"}, "ldapmodify": {"-w"},
	"smbclient": {"-U"}, "docker": {"-p"}, "podman": {"-p"}, "helm": {"-p"}, "az": {"-p"}, "mongo": {"-p"}, "mongosh": {"-p"}, "sqlcmd": {"-P"},
	"openssl": {"-k", "-K", "-pass", "-passin", "-passout"}, "zip": {"-P"}, "unzip": {"-P"}, "7z": {"-p"},
}

func mark(kind string) string { return "[redacted: " + kind + "]" }

// Redact takes what looks like a secret out of a program's arguments, and says
// how many it took. Each leaves a mark in its place.
func Redact(args []string) (clean []string, taken int) {
	if len(args) == 0 {
		return args, 0
	}
	clean = make([]string, len(args))
	short := shortFlags[path.Base(args[0])]
	next := ""
	for i, a := range args {
		if next != "" && a != "" {
			clean[i], next = mark(next), ""
			taken++
			continue
		}
		next = ""
		if i > 0 {
			if secretFlag.MatchString(a) {
				clean[i], next = a, "flag"
				continue
			}
			if flag, attached := shortFlag(short, a); flag != "" {
				if clean[i] = a; attached {
					clean[i] = flag + mark("flag")
					taken++
				} else {
					next = "flag"
				}
				continue
			}
		}
		var n int
		clean[i], n = RedactText(a)
		taken += n
	}
	return clean, taken
}

// shortFlag says which flag an argument is, and whether its value is in it.
func shortFlag(flags []string, arg string) (flag string, attached bool) {
	for _, f := range flags {
		if arg == f {
			return f, false
		}
		if strings.HasPrefix(arg, f+"=") || len(f) == 2 && strings.HasPrefix(arg, f) {
			return f, true
		}
	}
	return "", false
}

// RedactText takes what looks like a secret out of one text.
func RedactText(s string) (clean string, taken int) {
	for _, p := range secrets {
		s = p.pattern.ReplaceAllStringFunc(s, func(found string) string {
			if strings.Contains(found, "[redacted: ") {
				return found
			}
			taken++
			m := p.pattern.FindStringSubmatch(found)
			out := m[1] + mark(p.kind)
			if len(m) > 2 {
				out += m[2]
			}
			return out
		})
	}
	s = base64ish.ReplaceAllStringFunc(s, func(found string) string {
		if !strings.ContainsAny(found, "0123456789") || strings.ToLower(found) == found || strings.ToUpper(found) == found || strings.Count(found, "/") > len(found)/12 {
			return found
		}
		taken++
		return mark("key")
	})
	return s, taken
}
