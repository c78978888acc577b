package inspect

// shellWords are those of commands given to a shell.
func shellWords() []signature {
	all := words(Shell, (*value).command, ";", "|", "&&", "$(", "`")
	all = append(all, words(Shell, (*value).opensSocket, "/dev/tcp/", "/dev/udp/")...)
	all = append(all, words(Shell, nil, "${ifs}", "$ifs$", "$ifs/")...)
	all = append(all, words(Shell, (*value).shell, "/bin/sh ", "/bin/bash ", "bash -i ", "cmd.exe", "cmd /c ", "powershell")...)
	return all
}

// command: what separates two commands, a command, and an argument that fits.
func (v *value) command(from, to int) bool {
	sep := v.at(from)
	i := v.skip(to)
	if v.has(i, "/bin/") {
		i += 5
	} else if v.has(i, "/usr/bin/") {
		i += 9
	}
	end := i
	for isLetter(v.at(end)) || v.at(end) == '3' {
		if end++; end-i > 10 {
			return false
		}
	}
	word, next := string(v.text[i:end]), v.at(end)
	arg := v.skip(end)
	a := v.at(arg)
	bare := arg >= len(v.text) || a == ';' || a == '|' || a == '&' || a == ')' || a == '#' || a == '`'
	if next != ' ' && !bare && next != '<' && next != '$' && next != '{' {
		return false
	}
	path := a == '/' || a == '.' && (v.at(arg+1) == '/' || v.at(arg+1) == '.') || a == '~' || a == '$' && v.at(arg+1) == '{' || v.has(arg, "c:")
	option := a == '-' && isLetter(v.at(arg+1))
	switch word {
	case "id", "whoami", "uname", "ifconfig", "ls", "env", "pwd", "dir", "netstat", "hostname":
		if sep == '`' { // so is a word set in a text
			return option && word != "dir" && v.at(arg+2) <= ' '
		}
		return (bare || option || path && (word == "ls" || word == "dir")) && (v.place != inHeader || from > 0 && option)
	case "cat", "head", "tail", "more", "type", "less", "chmod", "source":
		return path
	case "wget", "curl":
		return v.within(arg, 80, "://") || option
	case "nc", "ncat", "netcat", "telnet", "ping", "nslookup", "dig":
		return option || isDigit(a) || (word == "nslookup" || word == "dig") && sep != '`' && isLetter(a) && v.within(arg, 64, ".")
	case "sh", "bash", "zsh", "ksh":
		return option || path || bare && sep == '|'
	case "python", "perl", "ruby", "php", "node":
		return option && (v.at(arg+1) == 'c' || v.at(arg+1) == 'e' || v.at(arg+1) == 'r')
	case "sleep":
		return isDigit(a)
	case "rm", "mv", "cp":
		return option || path
	case "echo":
		return sep != '|' && v.within(arg, 200, "|")
	}
	return false
}

// opensSocket: bash's own way to connect.
func (v *value) opensSocket(_, to int) bool {
	for i := to; i < len(v.text) && i-to < 64; i++ {
		if v.text[i] == '/' {
			return i > to && isDigit(v.at(i+1))
		}
		if !isWord(v.text[i]) && v.text[i] != '.' && v.text[i] != '-' {
			return false
		}
	}
	return false
}

// shell: the name of a shell with something to run, where a value begins or
// after what ends a command.
func (v *value) shell(from, to int) bool {
	i := v.skip(to)
	runs := false
	for _, w := range [...]string{"-c", "-i", "/c", "-e", "-nop", "-w ", "iex", ">&", "?/c"} {
		runs = runs || v.has(i, w)
	}
	b := v.before(from)
	return runs && (b == 0 || isQuote(b) || b == ';' || b == '|' || b == '&' || b == '(' || b == '=' || b == '/' || b == '\\' || b == '\n')
}
