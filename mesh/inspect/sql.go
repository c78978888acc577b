package inspect

// sqlWords are those of SQL injection: text that ends a value of a statement
// and goes on as part of it.
func sqlWords() []signature {
	all := words(SQL, (*value).union, "union ", "union(", "union all")
	all = append(all, words(SQL, (*value).tautology, " or ", "'or", "\"or", ")or", "||", " and ", "'and", "\"and", "&&")...)
	all = append(all, words(SQL, (*value).delay, "sleep(", "benchmark(")...)
	all = append(all, words(SQL, (*value).waits, "pg_sleep(", "waitfor delay ", "dbms_pipe.receive_message", "dbms_lock.sleep(")...)
	all = append(all, words(SQL, (*value).leaks, "extractvalue(", "updatexml(", "load_file(", "into outfile ", "into dumpfile ", "xp_cmdshell", "information_schema.")...)
	all = append(all, words(SQL, (*value).stacked, "drop table ", "drop database ", "truncate table ", "insert into ", "delete from ", "shutdown", "alter table ", "exec ")...)
	return append(all, words(SQL, (*value).endsStatement, "'--", "' --", "\"--", "'#", "';--", "')--")...)
}

// union: after the end of a value, and before what looks like columns.
func (v *value) union(from, to int) bool {
	b := v.before(from)
	if !isDigit(b) && !isQuote(b) && b != ')' && b != '=' && b != ';' && b != '-' && b != 0 {
		return false
	}
	i := v.skip(to)
	for _, w := range [...]string{"all ", "distinct "} {
		if v.has(i, w) {
			i = v.skip(i + len(w))
		}
	}
	for v.at(i) == '(' || v.at(i) == '*' || v.at(i) == '/' || v.at(i) == '!' {
		i = v.skip(i + 1)
	}
	if !v.has(i, "select") || isLetter(v.at(i+6)) || v.at(i+6) == '_' {
		return false
	}
	i = v.skip(i + 6)
	c := v.at(i)
	return isDigit(c) || isQuote(c) || c == '*' || c == '@' || c == '(' || c == '-' || v.has(i, "null") || v.within(i, 200, ",") || v.within(i, 200, " from ")
}

// tautology: after the end of a value, a comparison of constants.
func (v *value) tautology(from, to int) bool {
	b := v.at(from)
	if !isQuote(b) && b != ')' {
		b = v.before(from)
	}
	quoted := isQuote(b) || b == ')'
	if !quoted && !isDigit(b) {
		return false
	}
	i := v.skip(to)
	for v.at(i) == '(' {
		i = v.skip(i + 1)
	}
	if v.has(i, "not ") {
		i = v.skip(i + 4)
	}
	left, i, ok := v.constant(i)
	if !ok {
		return quoted && v.has(i, "true") && v.endsAt(i+4)
	}
	i = v.skip(i)
	op := v.at(i)
	switch {
	case op == '=':
		i++
	case v.has(i, "like "):
		i += 5
	case quoted && (op == '<' || op == '>' || op == '!'):
		for op = v.at(i); op == '<' || op == '>' || op == '!' || op == '='; op = v.at(i) {
			i++
		}
	default:
		return quoted && isDigit(v.at(i-1)) && len(left) > 0 && v.comment(i)
	}
	right, _, ok := v.constant(v.skip(i))
	return ok && (string(left) == string(right) || quoted && (isDigit(b) || len(left) <= 32))
}

// constant reads a number, or a string that may lack its end.
func (v *value) constant(i int) (word []byte, end int, ok bool) {
	from := i
	if q := v.at(i); isQuote(q) {
		for i++; i < len(v.text) && v.text[i] != q; i++ {
			if i-from > 64 {
				return nil, i, false
			}
		}
		return v.text[from+1 : i], min(i+1, len(v.text)), true
	}
	for isDigit(v.at(i)) || i > from && (v.at(i) == '.' || v.at(i) == 'x') {
		i++
	}
	return v.text[from:i], i, i > from && !isLetter(v.at(i))
}

// comment: the rest of a statement is made one.
func (v *value) comment(i int) bool {
	i = v.skip(i)
	return v.has(i, "--") || v.at(i) == '#' || v.at(i) == ';'
}

func (v *value) endsAt(i int) bool { return v.skip(i) >= len(v.text) || v.comment(i) }

// delay: a function that takes time, as part of an expression.
func (v *value) delay(from, to int) bool {
	if p := v.at(from - 1); isWord(p) || p == '.' || !isDigit(v.at(v.skip(to))) {
		return false
	}
	i := from - 1
	for i >= 0 && (v.text[i] == ' ' || v.text[i] == '(' || v.text[i] == '+') {
		i--
	}
	if isQuote(v.at(i)) || v.at(i) == '|' || v.at(i) == '=' && v.place != inBody {
		return true
	}
	for _, w := range [...]string{"and", "or", "select", "when", "then", "xor", "where", "if"} {
		if n := i + 1 - len(w); n >= 0 && v.has(n, w) && !isWord(v.at(n-1)) {
			return w != "if" && w != "or" && w != "and" || isDigit(v.before(n)) || isQuote(v.before(n)) || v.before(n) == ')' || v.within(0, n, "select")
		}
	}
	return v.at(i) == ',' && v.within(0, i, "select")
}

// waits: functions that only a database has.
func (v *value) waits(_, to int) bool {
	c := v.at(v.skip(to))
	return isDigit(c) || isQuote(c) || c == '('
}

// leaks: functions by which data leaves a statement.
func (v *value) leaks(from, to int) bool {
	i := v.skip(to)
	switch c := v.at(from); {
	case c == 'e' || c == 'u': // extractvalue, updatexml
		return v.within(i, 60, "concat(") || v.within(i, 60, "0x") || v.within(i, 60, "select ")
	case c == 'l':
		return isQuote(v.at(i)) || v.has(i, "0x")
	case c == 'x':
		return v.within(max(0, from-24), min(from, 24), "exec") || isQuote(v.at(i))
	case v.at(from+2) == 'f': // information_schema
		return (v.has(to, "tables") || v.has(to, "columns") || v.has(to, "schemata")) && v.within(0, from, "select")
	}
	return isQuote(v.at(i))
}

// stacked: a second statement after the end of a value.
func (v *value) stacked(from, _ int) bool {
	i := from - 1
	for i >= 0 && v.text[i] == ' ' {
		i--
	}
	if v.at(i) != ';' {
		return false
	}
	b := v.before(i)
	return isQuote(b) || isDigit(b) || b == ')'
}

// endsStatement: a quote that ends a value, and the rest is a comment.
func (v *value) endsStatement(from, to int) bool {
	if v.place == inBytes || len(v.text)-to > 3 {
		return false
	}
	for i := to; i < len(v.text); i++ {
		if b := v.text[i]; b != ' ' && b != '-' && b != '+' {
			return false
		}
	}
	quotes := 0
	for _, b := range v.text[:from+1] {
		if b == v.text[from] {
			quotes++
		}
	}
	return quotes%2 == 1
}
