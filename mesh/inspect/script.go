package inspect

// otherWords are those of templates that run what is in them, of scripts for a
// browser, and of classes that run when they are read.
func otherWords() []signature {
	all := words(Template, nil, "${jndi:", "%{(#", "__subclasses__", "class.module.classloader", "t(java.lang.", "freemarker.template.utility.execute")
	all = append(all, words(Template, (*value).nested, "${lower:", "${upper:", "${::-", "${env:", "${sys:", "${date:", "${base64:")...)
	all = append(all, words(Template, (*value).evaluates, "${", "#{", "{{", "<%=", "*{")...)
	all = append(all, words(Template, (*value).pollutes, "__proto__", "constructor[prototype]", "constructor.prototype")...)
	all = append(all, words(Script, (*value).tag, "<script", "<iframe", "<object ", "<embed ")...)
	all = append(all, words(Script, (*value).handler, "onerror=", "onload=", "onmouseover=", "onclick=", "onfocus=", "ontoggle=", "onpageshow=", "onbegin=", "onerror =", "onload =")...)
	all = append(all, words(Script, (*value).scheme, "javascript:", "vbscript:", "data:text/html")...)
	all = append(all, words(Gadget, (*value).stream, "ro0ab", "\xac\xed\x00\x05")...)
	return append(all, words(Gadget, (*value).class, gadgets...)...)
}

// gadgets are beginnings of the names of classes by which reading an object
// becomes running a program. The list is of what ysoserial, marshalsec and the
// advisories of Hessian, Dubbo, SOFA and Fastjson name; no service sends them.
var gadgets = []string{
	"org.apache.commons.collections.functors.", "org.apache.commons.collections4.functors.", "org.apache.commons.collections.keyvalue.tiedmapentry",
	"org.apache.commons.collections.map.lazymap", "org.apache.commons.beanutils.beancomparator", "org.apache.commons.fileupload.disk.",
	"com.sun.org.apache.xalan.internal.xsltc.trax.", "org.apache.xalan.xsltc.trax.", "com.sun.rowset.jdbcrowsetimpl", "com.sun.jndi.",
	"com.sun.org.apache.bcel.internal.util.classloader", "org.apache.bcel.util.classloader", "com.rometools.rome.feed.impl.", "com.sun.syndication.feed.impl.",
	"com.caucho.naming.qname", "com.caucho.config.types.resourceref", "javax.naming.", "java.rmi.", "sun.rmi.", "sun.print.unixprintservice",
	"javax.script.scriptenginemanager", "java.lang.processbuilder", "java.lang.runtime", "java.lang.processimpl", "java.net.urlclassloader",
	"javax.swing.uidefaults$", "sun.swing.swinglazyvalue", "javax.management.badattributevalueexpexception", "org.codehaus.groovy.runtime.",
	"org.springframework.aop.", "org.springframework.beans.factory.", "org.springframework.context.support.classpathxmlapplicationcontext",
	"org.springframework.jndi.", "com.mchange.v2.c3p0.", "com.mchange.v2.naming.", "ch.qos.logback.core.db.", "ch.qos.logback.core.jndi",
	"org.apache.xbean.naming.", "org.apache.naming.", "org.eclipse.jetty.plus.naming.", "bsh.interpreter", "bsh.xthis", "clojure.core$",
	"org.mozilla.javascript.native", "org.hibernate.engine.spi.typedvalue", "org.jboss.weld.interceptor.", "com.ibatis.sqlmap.engine.transaction.jta.",
	"org.apache.shiro.jndi.", "org.apache.openjpa.ee.", "org.apache.dbcp.dbcp.basicdatasource", "org.apache.tomcat.dbcp.dbcp",
	"org.apache.ibatis.datasource.jndi.", "com.alibaba.citrus.springext.", "com.zaxxer.hikari.hikari", "net.sf.ehcache.transaction.manager.",
	"oracle.jdbc.rowset.", "org.python.core.pymethod", "org.apache.wicket.util.upload.", "com.vaadin.data.util.", "org.aspectj.weaver.tools.cache.",
	"com.feilong.lib.", "com.alipay.custrelation.service.model.redress.", "jdk.nashorn.internal.objects.nativestring",
}

// nested: a lookup inside a lookup, which spells a word that nobody shall see.
func (v *value) nested(from, _ int) bool {
	open := 0
	for i := max(0, from-128); i < from; i++ {
		switch {
		case v.has(i, "${"):
			open++
		case v.text[i] == '}' && open > 0:
			open--
		}
	}
	return open > 0
}

// evaluates: arithmetic, or the way from an object to its program.
func (v *value) evaluates(_, to int) bool {
	i := v.skip(to)
	n := i
	for isDigit(v.at(n)) {
		n++
	}
	if m := v.skip(n); n > i && n-i <= 6 && v.at(m) == '*' {
		if m = v.skip(m + 1); isDigit(v.at(m)) || isQuote(v.at(m)) {
			return true
		}
	}
	end := i
	for end < len(v.text) && end-i < 256 && v.text[end] != '}' && !v.has(end, "%>") {
		end++
	}
	for _, w := range [...]string{"__class__", "__globals__", "__import__", "__init__", "getruntime(", "processbuilder", "getclass(", ".constructor.constructor", "classloader", "t(java.", "system(", "popen("} {
		if v.within(i, end-i, w) {
			return true
		}
	}
	return false
}

// pollutes: the name of what all objects share, used as a key.
func (v *value) pollutes(from, to int) bool {
	if v.place == inBytes {
		return false
	}
	c := v.at(to)
	return from == 0 && to == len(v.text) || c == '[' || c == ']' && v.at(from-1) == '[' || v.place == inQuery && (c == '.' || v.at(from) == 'c')
}

// tag: an element that runs, with an attribute or an end.
func (v *value) tag(from, to int) bool {
	if v.place == inBytes {
		return false // a page, an e-mail
	}
	c := v.at(to - 1)
	if c == ' ' {
		return v.within(to, 64, "data=") || v.within(to, 64, "src=")
	}
	c = v.at(to)
	return v.at(from+1) == 's' && (c == '>' || c == ' ' || c == '/' || c == '\n') || c == ' ' && (v.within(to, 64, "src=") || v.within(to, 64, "srcdoc="))
}

// handler: an attribute that runs, inside an element.
func (v *value) handler(from, _ int) bool {
	if p := v.at(from - 1); v.place == inBytes || isLetter(p) {
		return false
	}
	for i := from - 1; i >= 0 && from-i < 512; i-- {
		switch v.text[i] {
		case '<':
			return isLetter(v.at(i + 1))
		case '>':
			return false
		}
	}
	p := v.before(from)
	return isQuote(p) && v.place != inBody // breaks out of an attribute
}

// scheme: a link that runs, where a link begins.
func (v *value) scheme(from, to int) bool {
	if v.place == inBytes || v.place == inHeader {
		return false
	}
	p := v.at(from - 1)
	if v.at(from) == 'd' {
		return (from == 0 || isQuote(p)) && v.within(to, 256, "script")
	}
	return (from == 0 || isQuote(p) || p == '=' || p == '(') && v.within(to, 128, "(")
}

// stream: objects in Java's own form, plain or in base64.
func (v *value) stream(from, _ int) bool {
	if v.at(from) == 'r' {
		return v.place != inBytes && (from == 0 || v.at(from-1) == '=') && len(v.text)-from > 16 && v.place != inPath
	}
	return from == 0 && (v.place == inBytes || v.place == inBody)
}

// class: the name of a class where something names classes, which a text about
// it does not.
func (v *value) class(from, to int) bool {
	end := to
	for isWord(v.at(end)) || v.at(end) == '.' || v.at(end) == '$' {
		end++
	}
	if v.place != inBytes {
		lead := from == 0 || from <= 2 && (v.at(0) == '[' || v.at(0) == 'l')
		return lead && v.skip(end) >= len(v.text)-1
	}
	return v.namesClass(from, end-from)
}

// namesClass tells whether the n bytes at from are a name as Hessian, in both
// dialects, and Java's serialization write those of classes: after their length,
// after what says that a class follows.
func (v *value) namesClass(from, n int) bool {
	one, two, three := v.at(from-1), v.at(from-2), v.at(from-3)
	if from < 2 {
		return false
	}
	isTag := func(b byte) bool { return b == 'c' || b == 'm' || b == 'v' || b == 'o' || b >= 0x70 && b <= 0x77 }
	short := int(one) == n && n < 0x20 || int(one) == 0x90+n && n < 0x30
	long := two >= 0xc0 && two <= 0xcf && (int(two)-0xc8)<<8+int(one) == n || two&0xfc == 0x30 && int(two&3)<<8|int(one) == n
	java := int(two)<<8|int(one) == n && (three == 't' || three == 'r' || three == 's' && isTag(v.at(from-4)))
	return short && isTag(two) || long && isTag(three) || java
}
