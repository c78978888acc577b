package guard

import "hauberk.dev/api/spec"

// packages are Debian's that the acts need: of the slim ones, or of all.
func packages(all bool) []string {
	list := []string{
		"base-files", "base-passwd", "bash", "busybox-static", "coreutils", "dash", "debianutils", "diffutils", "findutils", "grep", "gzip", "libc-bin", "logrotate", "mawk",
		"nginx-light", "openssl", "perl-base", "procps", "python3", "sed", "sqlite3", "tar", "util-linux",
	}
	if !all {
		return list
	}
	return append(list,
		"apt", "apt-utils", "bsdutils", "bzip2", "cron", "curl", "dpkg", "dpkg-dev", "ed", "gcc", "git", "gnupg", "golang-go", "haproxy", "inotify-tools", "jq", "libc6-dev", "libjemalloc2",
		"librhino-java", "lua5.4", "luajit", "m4", "make", "mariadb-server", "memcached", "nodejs", "npm", "openjdk-17-jre-headless", "openssh-client", "openssh-server",
		"passwd", "perl", "php-cli", "postgresql-15", "python3-pip", "python3-venv", "redis-server", "rsync", "ruby", "screen", "vim-tiny", "wget", "xz-utils", "zip", "unzip", "zstd")
}

// jit lets programs make code in memory where the policy lets none.
func jit(programs ...string) func(*spec.GuardPolicy) {
	return func(p *spec.GuardPolicy) {
		e := *p.Exec
		e.JIT = programs
		p.Exec = &e
	}
}

// acts are what is tried. What is slim comes first.
func acts() []act {
	var list []act
	for _, more := range [][]act{shellActs, scriptActs, serverActs, databaseActs, jitActs, packageActs, toolActs} {
		list = append(list, more...)
	}
	return list
}

var shellActs = []act{
	{name: "dash", policy: "baseline", slim: true, run: `
x=$(printf '%s\n' c a b | sort | tr '\n' ' '); [ "$x" = "a b c " ]
i=0; while [ $i -lt 200 ]; do i=$((i+1)); done
cat <<E | wc -l | grep -q 2
one
two
E
sh -c 'trap "echo heard; exit 0" HUP; kill -HUP $$; sleep 5' | grep -q heard
mkfifo p; echo through >p & read l <p; [ "$l" = through ]; wait
sleep 60 & kill $!; wait $! || [ $? = 143 ]`},
	{name: "bash", policy: "baseline", slim: true, run: `bash -euc '
a=(1 2 3); declare -A m=([k]=v); [[ ${m[k]} == v && ${#a[@]} == 3 ]]
diff <(seq 3) <(printf "%s\n" "${a[@]}")
coproc cat; echo hi >&"${COPROC[1]}"; read -u "${COPROC[0]}" l; [[ $l == hi ]]
set -m; sleep 60 & kill %1; wait %1 || [ $? -gt 128 ]'`},
	{name: "pipelines", policy: "batch", run: `
seq 2000 | awk '{s+=$1} END {print s}' | grep -q '^2001000$'
mkdir d; for i in 1 2 3 4 5; do echo $i >d/$i; done
find d -type f -print0 | xargs -0 -n1 -P4 cat | sort -n | tail -n1 | grep -q 5
sed -i s/5/6/ d/5; grep -q 6 d/5
seq 5000 >all; split -l 1000 all part.; cat part.* | cmp - all
sha256sum part.* >sums; sha256sum -c --quiet sums; dd if=all bs=1k count=4 2>/dev/null | wc -c | grep -q 4096
seq 5000 | grep -cP '^(\d)\1+$' | grep -q '^22$'`},
	{name: "archives", policy: "batch", run: `
cp -r /etc tree; tar -czf t.tgz tree; mkdir out; tar -xzf t.tgz -C out; diff -r --no-dereference tree out/tree
tar -cf t.tar tree; gzip -k t.tar; gunzip -c t.tar.gz | cmp - t.tar`},
	{name: "busybox", policy: "baseline", run: `
busybox seq 10 | busybox awk '{s+=$1} END {print s}' | grep -q 55
echo hello >x; busybox httpd -p 127.0.0.1:8081 -h .; await busybox wget -q -O got http://127.0.0.1:8081/x; cmp got x
busybox ash -c 'busybox vi -h 2>&1 | head -n1; busybox tar c x | busybox tar t' | grep -q x`},
	{name: "run-parts", policy: "batch", slim: true, run: `
run-parts --list /etc/cron.daily >jobs; [ -s jobs ]
run-parts --test /etc/cron.daily | grep -q logrotate
(flock 9; nice -n 5 timeout 20 sh -c 'date >stamp') 9>lock; [ -s stamp ]; nohup sh -c 'echo done' | grep -q done`},
	{name: "switch user", policy: "baseline", run: `
setpriv --reuid=app --regid=app --init-groups id -un | grep -q app
su -s /bin/sh app -c 'id -u' | grep -q 1000
runuser -u app -- sh -c 'echo $HOME' | grep -q /tmp
start-stop-daemon --start --background --make-pidfile --pidfile p --chuid app --exec /bin/sleep -- 60
await test -s p; start-stop-daemon --stop --pidfile p --retry 5`},
	{name: "terminals", policy: "baseline", run: `
script -qec 'tty && stty -a' typed | grep -q /dev/pts/
screen -dmS s sh -c 'echo in >from; sleep 60'; await test -s from; screen -S s -X quit
printf 'a\nhello\n.\nw f\nq\n' | ed -s; grep -q hello f
vim.tiny -es -c '%s/hello/goodbye/' -c wq f; grep -q goodbye f`},
	{name: "cron", policy: "batch", run: `
mkdir -p /var/spool/cron/crontabs; echo '* * * * * echo ran >>/acts/cron/out' | crontab -; crontab -l | grep -q ran
cron -f & await test -s out; kill $!`},
}

var scriptActs = []act{
	{name: "perl", policy: "baseline", slim: true, run: `
perl -we 'use strict; my %h; $h{length $_}++ for map { "x" x ($_ % 7) } 1..5000; die unless keys %h == 7;
pipe(my $r, my $w); my $p = fork; if (!$p) { print $w "child\n"; exit 0 } waitpid $p, 0; close $w; die unless <$r> eq "child\n";
use IO::Socket::INET; my $l = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1") or die; if (!fork) { my $c = $l->accept; print $c "served\n"; exit 0 }
my $c = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $l->sockport) or die; die unless <$c> eq "served\n"; exec "true"'`},
	{name: "perl modules", policy: "baseline", run: `
perl -MDigest::SHA=sha256_hex -MFile::Temp -MStorable=dclone -MData::Dumper -MEncode -MPOSIX -MTime::HiRes -we 'print sha256_hex("x"), Dumper(dclone({a=>[1]}))' | grep -q 2d711642
perl -i -pe 's/a/b/' $(echo a >f; echo f); grep -q b f`},
	{name: "python", policy: "baseline", slim: true, run: `
python3 - <<'E'
import json, hashlib, re, threading, subprocess, tempfile, os, sqlite3, ssl, zlib, socket
assert json.loads(json.dumps({"a": [1, 2.5, None]}))["a"][1] == 2.5
assert hashlib.sha256(b"x").hexdigest().startswith("2d711642")
ts = [threading.Thread(target=lambda: re.findall("a+b", "aab" * 1000)) for _ in range(4)]
[t.start() for t in ts]; [t.join() for t in ts]
assert subprocess.run(["cat"], input=b"in", capture_output=True).stdout == b"in"
with tempfile.NamedTemporaryFile() as f: f.write(zlib.compress(b"y" * 10000)); f.flush(); os.stat(f.name)
assert sqlite3.connect(":memory:").execute("select 6*7").fetchone() == (42,)
E`},
	{name: "python processes", policy: "batch", run: `
cat >m.py <<'E'
import multiprocessing as mp, concurrent.futures as cf, mmap, os
def f(x): return x * x
if __name__ == "__main__":
    for how in "fork", "spawn", "forkserver":
        with mp.get_context(how).Pool(2) as p: assert sum(p.map(f, range(50))) == 40425
    from multiprocessing import shared_memory
    s = shared_memory.SharedMemory(create=True, size=4096); s.buf[0] = 7; s.close(); s.unlink()
E
python3 m.py`},
	{name: "python ctypes callback", policy: "baseline", run: `
python3 - <<'E'
import ctypes
libc = ctypes.CDLL(None)
T = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
a = (ctypes.c_int * 5)(5, 1, 4, 2, 3)
libc.qsort(a, 5, 4, T(lambda x, y: x[0] - y[0]))
assert list(a) == [1, 2, 3, 4, 5]
E`},
	{name: "python asyncio", policy: "web", run: `
python3 - <<'E'
import asyncio, urllib.request, http.server, threading
async def main():
    async def serve(r, w): w.write((await r.readline()).upper()); await w.drain(); w.close()
    s = await asyncio.start_server(serve, "127.0.0.1", 0)
    r, w = await asyncio.open_connection(*s.sockets[0].getsockname()); w.write(b"hello\n")
    assert await r.readline() == b"HELLO\n"
    p = await asyncio.create_subprocess_exec("echo", "sub", stdout=-1); assert (await p.communicate())[0] == b"sub\n"
asyncio.run(main())
h = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=h.serve_forever, daemon=True).start()
assert urllib.request.urlopen("http://127.0.0.1:%d/" % h.server_port).status == 200
E`},
	{name: "agent tools", policy: "agent", run: `
mkdir w; cd w; git init -q .; git config user.email a@b; git config user.name a
cat >t.py <<'E'
import sqlite3, json, urllib.request, http.server, threading, subprocess
db = sqlite3.connect("notes.db"); db.execute("create table n(x)"); db.execute("insert into n values(1)"); db.commit()
h = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=h.serve_forever, daemon=True).start()
assert b"t.py" in urllib.request.urlopen("http://127.0.0.1:%d/" % h.server_port).read()
print(subprocess.check_output(["bash", "-c", "ls | wc -l"]).decode())
E
python3 t.py; git add .; git commit -qm first; git log --oneline | grep -q first; jq -n '{a:1}' | jq .a | grep -q 1`},
	{name: "ruby", policy: "baseline", run: `
ruby -rjson -rsocket -ropenssl -rtempfile -e 'raise unless JSON.parse(JSON.dump({"a"=>1}))["a"] == 1
s = TCPServer.new("127.0.0.1", 0); t = Thread.new { c = s.accept; c.puts "hi"; c.close }; raise unless TCPSocket.new("127.0.0.1", s.addr[1]).gets == "hi\n"; t.join
raise unless IO.popen(["echo", "x"]).read == "x\n"; Process.wait(fork { exit 0 })'`},
	{name: "lua", policy: "web", run: `lua -e 'local s = 0; for i = 1, 100000 do s = s + i end; assert(s == 5000050000); assert(io.popen("echo x"):read() == "x")'`},
	{name: "m4 and make", policy: "batch", run: `
echo 'define(a,b)a' | m4 | grep -q b
printf 'all: x y\nx:\n\tsleep 0.1; echo x >x\ny:\n\techo y >y\n' >Makefile; make -s -j3; [ -s x ] && [ -s y ]`},
}

// nginxConf serves the directory that it is in.
const nginxConf = `
mkdir -p html; echo hello >html/index.html; chmod 755 . html
cat >n.conf <<E
daemon off; pid $PWD/pid; error_log $PWD/error; worker_processes 2;
events { worker_connections 64; }
http { access_log $PWD/access; client_body_temp_path $PWD/b; proxy_temp_path $PWD/p; fastcgi_temp_path $PWD/f; uwsgi_temp_path $PWD/u; scgi_temp_path $PWD/s;
 gzip on; server { listen 127.0.0.1:8080; root $PWD/html; location / { add_header X-Version one; } } }
E
fetch() { busybox wget -q -S -O - "http://127.0.0.1:8080/" 2>&1; }
`

var serverActs = []act{
	{name: "nginx reload", policy: "web", slim: true, run: nginxConf + `
nginx -q -t -p $PWD -c $PWD/n.conf; nginx -p $PWD -c $PWD/n.conf & await fetch; fetch | grep -q hello
sed s/one/two/ n.conf >n.new; mv n.new n.conf; kill -HUP $(cat pid)
v2() { fetch | grep -q 'X-Version: two'; }; await v2
mv access access.1; kill -USR1 $(cat pid); reopened() { fetch >/dev/null; [ -s access ]; }; await reopened
kill -QUIT $(cat pid); wait`},
	{name: "nginx new program", policy: "web", run: nginxConf + `
sed -i 's/daemon off;//' n.conf; /usr/sbin/nginx -p $PWD -c $PWD/n.conf; await fetch; kill -USR2 $(cat pid); await test -s pid.oldbin; old=$(cat pid.oldbin)
await test -s pid; kill -WINCH $old; fetch | grep -q hello; kill -QUIT $old; away() { ! [ -e /proc/$old/exe ]; }; await away; fetch | grep -q hello; kill -QUIT $(cat pid)`},
	{name: "log rotation", policy: "web", slim: true, run: `
mkdir log; (trap 'exec >>log/a' HUP; exec >>log/a; while :; do echo line; sleep 0.1; done) & echo $! >pid; await test -s log/a
cat >rotate.conf <<E
$PWD/log/a { rotate 2
 create 644 root root
 compress
 postrotate
  kill -HUP \$(cat $PWD/pid)
 endscript
}
$PWD/log/b { copytruncate
 rotate 1
}
E
echo x >log/b; chmod 755 log; chmod 644 rotate.conf log/*
logrotate -f -s state rotate.conf; await test -s log/a; [ -e log/a.1.gz ] && [ -e log/b.1 ]; kill $(cat pid)`},
	{name: "configuration by symbolic link", policy: "web", slim: true, run: `
put() { mkdir ..$1; echo $1 >..$1/conf; ln -s ..$1 ..data_tmp; mv -T ..data_tmp ..data; }
put one; ln -s ..data/conf conf
python3 - <<'E' &
import time
seen = []
for _ in range(1200):
    v = open("conf").read().strip()
    if v not in seen: seen.append(v); open("seen", "w").write(" ".join(seen))
    if len(seen) == 2: break
    time.sleep(0.05)
E
await test -s seen; put two; await grep -q 'one two' seen; rm -r ..one; wait`},
	{name: "watched configuration", policy: "web", run: `
echo 1 >c; (inotifywait -q -e moved_to,close_write --format %f . >hit; echo reloaded >done) & await pgrep inotifywait; sleep 1
echo 2 >c.tmp; mv c.tmp c; await test -s done`},
	{name: "TLS", policy: "web", run: `
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k -out c -subj /CN=localhost -addext subjectAltName=DNS:localhost -days 2 2>/dev/null
openssl s_server -quiet -accept 127.0.0.1:4433 -cert c -key k -www & s=$!
hello() { printf 'GET / HTTP/1.0\r\n\r\n' | timeout 20 openssl s_client -quiet -connect 127.0.0.1:4433 -CAfile c -verify_return_error -servername localhost 2>/dev/null | grep -q TLSv1.3; }
await hello; kill $s`},
	{name: "TLS clients", policy: "web", run: nginxConf + `
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k -out c -subj /CN=localhost -addext subjectAltName=DNS:localhost -days 2 2>/dev/null
sed -i "s|listen 127.0.0.1:8080;|listen 127.0.0.1:8443 ssl http2; ssl_certificate $PWD/c; ssl_certificate_key $PWD/k;|" n.conf
nginx -p $PWD -c $PWD/n.conf & await curl -sf --cacert c https://localhost:8443/ -o one; grep -q hello one
wget -q --ca-certificate=c -O two https://localhost:8443/; cmp one two
SSL_CERT_FILE=c python3 -c 'import urllib.request as u; assert u.urlopen("https://localhost:8443/").read() == b"hello\n"'; kill -QUIT $(cat pid)`},
	{name: "haproxy reload", policy: "baseline", run: `
mkdir h; echo hi >h/x; busybox httpd -p 127.0.0.1:8082 -h h
cat >h.cfg <<E
global
 stats socket $PWD/sock level admin expose-fd listeners
defaults
 mode http
 timeout connect 5s
 timeout client 5s
 timeout server 5s
frontend f
 bind 127.0.0.1:8083
 acl known path_reg ^/[a-z]+$
 http-request deny if !known
 default_backend b
backend b
 server s 127.0.0.1:8082
E
haproxy -W -p pid -f h.cfg & m=$!; await timeout 20 busybox wget -q -O - http://127.0.0.1:8083/x
workers() { pgrep -P $m | tr '\n' ' '; }; before=$(workers); kill -USR2 $m
new() { w=$(workers); [ -n "$w" ] && [ "$w" != "$before" ] && timeout 20 busybox wget -q -O - http://127.0.0.1:8083/x; }; await new; kill -TERM $m; wait $m || true`},
	{name: "SSH client and server", policy: "dev", run: `
mkdir -p /root/.ssh; chmod 700 /root /root/.ssh; ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id; ssh-keygen -q -t ed25519 -N '' -f host; cp /root/.ssh/id.pub /root/.ssh/authorized_keys
mkdir -p /run/sshd; /usr/sbin/sshd -f /dev/null -p 2222 -h $PWD/host -o ListenAddress=127.0.0.1 -o UsePAM=no -o Subsystem='sftp internal-sftp' -E log; o="-i /root/.ssh/id -o StrictHostKeyChecking=no -o UserKnownHostsFile=known"
await ssh $o -p 2222 root@localhost true || { cat log; exit 1; }
[ "$(ssh $o -p 2222 root@localhost 'echo far; cat' <known | head -n1)" = far ]
ssh $o -tt -p 2222 root@localhost tty | grep -q /dev/pts; echo x >a; scp -q $o -P 2222 a root@localhost:$PWD/b; cmp a b
mkdir t; cp a t; rsync -a -e "ssh $o -p 2222" t/ root@localhost:$PWD/u/; cmp a u/a
eval $(ssh-agent) >/dev/null; ssh-add -q /root/.ssh/id; ssh-add -l | grep -q ED25519; ssh-agent -k >/dev/null`},
	{name: "SSH keys", policy: "agent", run: `
export HOME=$PWD; ssh-keygen -q -t ed25519 -N '' -f k; ssh-keygen -l -f k | grep -q ED25519; echo m >m; ssh-keygen -q -Y sign -f k -n file m
echo "a $(cat k.pub)" >signers; ssh-keygen -Y verify -f signers -I a -n file -s m.sig <m | grep -q Good`},
	{name: "memcached", policy: "web", run: `
memcached -u app -l 127.0.0.1 -p 11311 & python3 - <<'E'
import socket, time
for _ in range(600):
    try: s = socket.create_connection(("127.0.0.1", 11311)); break
    except OSError: time.sleep(0.1)
s.sendall(b"set a 0 0 1\r\n1\r\nget a\r\n"); b = b""
while b"END" not in b: b += s.recv(99)
assert b"VALUE a 0 1" in b
E
kill $!`},
	{name: "PHP server", policy: "baseline", run: `
echo '<?php echo strlen(preg_replace("/a+/", "b", str_repeat("aac", 1000))), " ", getmypid();' >i.php
php -S 127.0.0.1:8085 i.php >log 2>&1 & await curl -sf http://127.0.0.1:8085/ -o got; grep -q '^2000 ' got; kill $!`},
}

var databaseActs = []act{
	{name: "SQLite", policy: "database", slim: true, run: `
sqlite3 d.db 'pragma journal_mode=wal; create table t(a integer primary key, b text); with recursive c(i) as (select 1 union all select i+1 from c where i<2000) insert into t select i, hex(i) from c; create index x on t(b);'
sqlite3 d.db 'pragma mmap_size=1000000; select count(*) from t; vacuum; pragma integrity_check' | tr '\n' ' ' | grep -q '2000 ok'
sqlite3 d.db .dump | sqlite3 e.db; sqlite3 e.db 'select max(a) from t' | grep -q 2000`},
	{name: "PostgreSQL", policy: "database", run: `
chown postgres .; B=/usr/lib/postgresql/15/bin; as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=$PWD "$@"; }
as $B/initdb -D d -A trust -N >/dev/null; as $B/pg_ctl -D d -w -t 200 -o "-k $PWD -h 127.0.0.1" -l log start
q() { as psql -h 127.0.0.1 -U postgres -Atq -v ON_ERROR_STOP=1 "$@"; }
q -c 'create table t as select g a, md5(g::text) b from generate_series(1,5000) g' -c 'create index on t(b)' -c 'vacuum analyze t'
q -c 'set max_parallel_workers_per_gather=2; set parallel_setup_cost=0; set min_parallel_table_scan_size=0; select count(*) from t' | grep -q 5000
q -c "alter system set work_mem='8MB'" ; as $B/pg_ctl -D d reload; mem() { q -c 'show work_mem' | grep -q 8MB; }; await mem
as pg_dump -h 127.0.0.1 -U postgres -t t postgres >dump.sql; q -c 'create database r'; q -d r -f dump.sql >/dev/null; q -d r -c 'select count(*) from t' | grep -q 5000
as $B/pg_ctl -D d -w -m fast stop`},
	{name: "PostgreSQL JIT", policy: "baseline", run: `
chown postgres .; B=/usr/lib/postgresql/15/bin; as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=$PWD "$@"; }
as $B/initdb -D d -A trust -N >/dev/null; as $B/pg_ctl -D d -w -t 200 -o "-k $PWD -h ''" -l log start
as psql -h $PWD -U postgres -Atq -v ON_ERROR_STOP=1 -c 'set jit=on; set jit_above_cost=0; set jit_optimize_above_cost=0; set jit_inline_above_cost=0; create table t as select g a from generate_series(1,2000) g; explain (analyze) select sum(a*2+1) from t where a%3=1' | grep -q 'JIT:'
as $B/pg_ctl -D d -w -m fast stop`},
	{name: "MariaDB", policy: "database", run: `
mkdir d; chown mysql . d; mariadb-install-db --no-defaults --rpm --user=mysql --datadir=$PWD/d --auth-root-authentication-method=normal --skip-test-db >log 2>&1 || { cat log; exit 1; }
mariadbd --no-defaults --user=mysql --datadir=$PWD/d --socket=$PWD/s --pid-file=$PWD/pid --bind-address=127.0.0.1 --port=3307 >>log 2>&1 & m=$!
await mariadb --no-defaults -S s -e 'select 1'
mariadb --no-defaults -S s -e 'create database x; use x; create table t(a int primary key, b text) engine=innodb; insert into t select seq, md5(seq) from seq_1_to_3000; select count(*) from t; flush logs' | grep -q 3000
mariadb --no-defaults -h 127.0.0.1 -P 3307 -e 'select sum(a) from x.t where b regexp "^a"' >sum; [ -s sum ]
mariadb-dump --no-defaults -S s x >dump; mariadb --no-defaults -S s -e 'create database y'; mariadb --no-defaults -S s y <dump; mariadb-admin --no-defaults -S s shutdown; wait $m`},
	{name: "Redis", policy: "database", run: `
redis-server --port 7777 --bind 127.0.0.1 --dir $PWD --appendonly yes --daemonize no >log & r="redis-cli -p 7777"; await $r ping
i=0; while [ $i -lt 500 ]; do echo "SET k$i $i"; i=$((i+1)); done | $r >/dev/null; [ "$($r dbsize)" = 500 ]
$r eval 'local s=0 for i=1,1000 do s=s+i end return s' 0 | grep -q 500500; $r bgsave; saved() { [ "$($r info persistence | grep -c rdb_bgsave_in_progress:0)" = 1 ] && [ -s dump.rdb ]; }; await saved
$r bgrewriteaof; $r config set maxmemory 64mb; $r shutdown || true; wait`},
}

var jitActs = []act{
	{name: "JVM", policy: "baseline", run: `
java -version; R=$(ls /usr/share/java/js.jar /usr/share/java/rhino.jar 2>/dev/null | head -n1)
java -XX:CompileThreshold=200 -cp $R org.mozilla.javascript.tools.shell.Main -opt 9 -e 'var s=0; for (var i=0;i<300000;i++) s=(s+i*i)%1000003; print(s); java.nio.file.Files.writeString(java.nio.file.Path.of("j"), "x"); new java.util.concurrent.ForkJoinPool(4)' | grep -q '^[0-9]'; [ -s j ]`},
	{name: "JVM as a server", policy: "web", with: jit("/usr/lib/jvm/java-17-openjdk-amd64/bin/java"), run: `
R=$(ls /usr/share/java/js.jar /usr/share/java/rhino.jar 2>/dev/null | head -n1)
java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp $R org.mozilla.javascript.tools.shell.Main -opt 9 -e 'var s=0; for (var i=0;i<100000;i++) s=(s+i)%1000003; print(s); var p=new java.lang.ProcessBuilder("echo","child").start(); print(new java.util.Scanner(p.getInputStream()).nextLine())' | grep -q child`},
	{name: "Node", policy: "baseline", run: `
node -e 'let s=0; for (let i=0;i<3e6;i++) s=(s+i*i)%1000003; const r=/^(a|b)+c$/; for (let i=0;i<2000;i++) r.test("abab"+i);
const http=require("http"), cp=require("child_process"), {Worker}=require("worker_threads");
new WebAssembly.Instance(new WebAssembly.Module(new Uint8Array([0,97,115,109,1,0,0,0,1,5,1,96,0,1,127,3,2,1,0,7,5,1,1,102,0,0,10,6,1,4,0,65,42,11]))).exports.f()===42||process.exit(3);
const h=http.createServer((q,a)=>a.end("ok")).listen(0,"127.0.0.1",()=>http.get({port:h.address().port,host:"127.0.0.1"},a=>a.on("data",d=>{if(""+d!="ok")process.exit(4);h.close();
 cp.execFile("node",["-p","6*7"],(e,o)=>{if(e||o!="42\n")process.exit(5); new Worker("require(\"fs\").writeFileSync(\"w\",\"x\")",{eval:true}).on("exit",c=>process.exit(c))})})))'; [ -s w ]`},
	{name: "Node as a server", policy: "web", with: jit("/usr/bin/node"), run: `
cat >s.js <<'E'
const cluster = require("cluster"), http = require("http")
if (cluster.isPrimary) { for (let i = 0; i < 2; i++) cluster.fork(); let n = 0
  cluster.on("listening", () => { if (++n == 2) http.get("http://127.0.0.1:8090", a => a.on("data", d => { console.log("" + d); for (const w of Object.values(cluster.workers)) w.kill() })) })
} else http.createServer((q, a) => { let s = 0; for (let i = 0; i < 1e6; i++) s = (s + i) % 997; a.end("answer " + s) }).listen(8090, "127.0.0.1")
E
node s.js | grep -q answer`},
	{name: "LuaJIT", policy: "baseline", run: `luajit -jon -e 'local ffi=require("ffi"); ffi.cdef"int getpid(void);"; local s=0; for i=1,5e6 do s=(s+i)%1000003 end; assert(ffi.C.getpid()>0); print(s)'`},
	{name: "PHP JIT", policy: "baseline", run: `
echo '<?php $s=0; for($i=0;$i<2000000;$i++) $s=($s+$i)%1000003; echo $s, " ", preg_match("/(a|b)+c/", str_repeat("ab", 500)."c"), "\n";' >j.php
php -d opcache.enable_cli=1 -d opcache.jit_buffer_size=16M -d opcache.jit=tracing j.php | grep -q ' 1$'`},
	{name: "V8 without code", policy: "web", run: `node --jitless -p '[3,1,2].sort().join()' | grep -q 1,2,3`},
}

const fakePackage = `
mkdir -p p/DEBIAN p/usr/share/fake; echo data >p/usr/share/fake/data
printf 'Package: fake\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n' >p/DEBIAN/control
`

var packageActs = []act{
	{name: "dpkg", policy: "baseline", run: fakePackage + `
dpkg-deb -Zgzip --build p fake.deb >/dev/null; dpkg -i fake.deb; [ -s /usr/share/fake/data ]; dpkg -s fake | grep -q installed; dpkg -P fake; [ ! -e /usr/share/fake ]`},
	{name: "dpkg with a script", policy: "dev", run: fakePackage + `
printf '#!/bin/sh\necho configured >/acts/configured\n' >p/DEBIAN/postinst; chmod 755 p/DEBIAN/postinst
dpkg-deb -Zgzip --build p fake.deb >/dev/null; dpkg -i fake.deb; [ -s /acts/configured ]; dpkg -P fake`},
	{name: "apt", policy: "baseline", run: fakePackage + `
mkdir r; dpkg-deb -Zgzip --build p r/fake_1_all.deb >/dev/null; (cd r; apt-ftparchive packages . >Packages; apt-ftparchive release . >Release)
chmod -R a+rX /acts; echo "deb [trusted=yes] file:$PWD/r ./" >list
A="apt-get -q -y -o Dir::Etc::sourcelist=$PWD/list -o Dir::Etc::sourceparts=-"; $A update; $A install fake; [ -s /usr/share/fake/data ]; apt-cache policy fake | grep -q Installed; $A remove fake`},
	{name: "pip", policy: "baseline", run: `
mkdir -p pkg pkg-1.dist-info; echo 'def f(): return 42' >pkg/__init__.py; printf 'Metadata-Version: 2.1\nName: pkg\nVersion: 1\n' >pkg-1.dist-info/METADATA
printf 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n' >pkg-1.dist-info/WHEEL; printf 'pkg/__init__.py,,\npkg-1.dist-info/METADATA,,\npkg-1.dist-info/WHEEL,,\npkg-1.dist-info/RECORD,,\n' >pkg-1.dist-info/RECORD
python3 -m zipfile -c pkg-1-py3-none-any.whl pkg pkg-1.dist-info
python3 -m pip install -q --no-index --no-compile --target t ./pkg-1-py3-none-any.whl; PYTHONPATH=t python3 -c 'import pkg; assert pkg.f() == 42'`},
	{name: "python virtual environment", policy: "dev", run: `python3 -m venv --copies --without-pip v; v/bin/python -c 'import sys; assert sys.prefix != sys.base_prefix'`},
	{name: "npm", policy: "baseline", run: `
mkdir package app; echo '{"name":"dep","version":"1.0.0","main":"i.js","scripts":{"postinstall":"echo 1 >p"}}' >package/package.json; echo 'module.exports=()=>42' >package/i.js; tar -czf dep.tgz package
cd app; echo '{"name":"app","version":"1.0.0","scripts":{"t":"node -p 7"}}' >package.json; npm install --offline --no-audit --no-fund ../dep.tgz; [ -s node_modules/dep/p ]; node -e 'if (require("dep")() !== 42) process.exit(1)'; npm run -s t | grep -q 7`},
	{name: "go build", policy: "baseline", run: `
export GOCACHE=$PWD/c GOPATH=$PWD/g GOFLAGS=-mod=mod CGO_ENABLED=0; printf 'module m\ngo 1.19\n' >go.mod; printf 'package main\nfunc main() { println(f()) }\nfunc f() int { return 42 }\n' >m.go
go build -o m .; [ -x m ]; go vet .; gofmt -l .`},
	{name: "go run and test", policy: "dev", run: `
export GOCACHE=$PWD/c GOPATH=$PWD/g CGO_ENABLED=0; printf 'module m\ngo 1.19\n' >go.mod; printf 'package main\nfunc main() { println(f()) }\nfunc f() int { return 42 }\n' >m.go; go run . 2>&1 | grep -q 42`},
	{name: "C compiler", policy: "baseline", run: `
printf '#include <stdio.h>\nint main(void) { printf("%%d\\n", 42); return 0; }\n' >m.c; printf 'm: m.c\n\tcc -O2 -Wall -o m m.c\n' >Makefile; make -s; [ -x m ]; cc -shared -fPIC -o l.so m.c; ar rc l.a m.c; strip m; nm -D l.so | grep -q main`},
	{name: "C compiler and program", policy: "dev", run: `
printf '#include <stdio.h>\nint main(void) { printf("%%d\\n", 42); return 0; }\n' >m.c; cc -o m m.c; ./m | grep -q 42`},
	{name: "git", policy: "baseline", run: `
export HOME=$PWD; git config --global user.email a@b; git config --global user.name a; git config --global init.defaultBranch main; git init -q r; cd r; for i in 1 2 3; do echo $i >f$i; git add .; git commit -qm c$i; done
git checkout -qb b HEAD~1; echo x >g; git add g; git commit -qm d; git merge -q -m m main; git rebase -q main || true; git gc -q; git fsck 2>&1 | grep -c missing | grep -q 0; git grep -qP '^\d' -- f1
cd ..; git clone -q file://$PWD/r k; cmp r/f1 k/f1; git -C k log -p | grep -q c1; git bundle create -q 2>/dev/null || git -C r bundle create -q ../b.bundle --all; git clone -q b.bundle k2`},
	{name: "git hooks", policy: "dev", run: `
export HOME=$PWD; git config --global user.email a@b; git config --global user.name a; git init -q r; cd r; printf '#!/bin/sh\necho ran >../hooked\n' >.git/hooks/pre-commit; chmod 755 .git/hooks/pre-commit; echo 1 >f; git add f; git commit -qm c; [ -s ../hooked ]`},
	{name: "ruby gems", policy: "baseline", run: `
printf 'Gem::Specification.new { |s| s.name="g"; s.version="1"; s.summary="g"; s.authors=["a"]; s.files=["lib/g.rb"] }\n' >g.gemspec; mkdir lib; echo 'G=42' >lib/g.rb; chmod -R a+r .
gem build -q g.gemspec >/dev/null 2>&1; gem install -q --local --no-document -i gems g-1.gem >/dev/null; GEM_PATH=gems ruby -e 'gem "g"; require "g"; exit G == 42'`},
}

var toolActs = []act{
	{name: "compressors", policy: "batch", run: `
seq 20000 >x; for z in xz bzip2 zstd gzip; do $z -q -k -c x >x.$z; $z -d -c x.$z | cmp - x; done; xz -T2 -c x | xz -dc | cmp - x; zip -q x.zip x; unzip -p x.zip | cmp - x`},
	{name: "rsync", policy: "batch", run: `cp -r /etc/default a; rsync -a a/ b/; diff -r --no-dereference a b; touch a/new; rsync -a --delete --checksum a/ b/; [ -e b/new ]`},
	{name: "jq", policy: "batch", run: `seq 500 | jq -s 'map(.*2)|add' | grep -q 250500`},
	{name: "GnuPG", policy: "baseline", run: `
mkdir -m 700 h; export GNUPGHOME=$PWD/h; gpg -q --batch --passphrase '' --quick-generate-key a@b ed25519 sign; echo m >m; gpg -q --batch -s m; gpg -q --verify m.gpg 2>&1 | grep -q Good; gpgconf --kill all`},
	{name: "preloaded allocator", policy: "baseline", run: `LD_PRELOAD=libjemalloc.so.2 sqlite3 :memory: 'select 6*7' | grep -q 42; grep -q . /usr/lib/x86_64-linux-gnu/libjemalloc.so.2`},
	{name: "locale and time", policy: "web", run: `TZ=UTC date -d @0 +%Y | grep -q 1970; printf 'ä' | iconv -t UTF-16LE | wc -c | grep -q 2; getent hosts localhost | grep -q 127.0.0.1; getent passwd app | grep -q 1000`},
	{name: "health check", policy: "web", run: nginxConf + `nginx -p $PWD -c $PWD/n.conf & await curl -sf http://127.0.0.1:8080/; for i in 1 2 3 4 5; do curl -sf http://127.0.0.1:8080/ >/dev/null; pgrep nginx >/dev/null; ps aux | grep -q nginx; cat /proc/loadavg >/dev/null; free >/dev/null; df . >/dev/null; done; kill -QUIT $(cat pid)`},
	{name: "entry point", policy: "web", run: `
cat >/tmp/c.tmpl <<'E'
port=$PORT
E
PORT=80 sh -c 'eval "echo \"$(cat /tmp/c.tmpl)\"" >c; exec setpriv --reuid=app --regid=app --clear-groups cat c' | grep -q port=80`},
}
