package guard

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// debian makes an image of Debian's packages and of all that they depend on,
// and gives its path. Packages and images are kept between runs, in the user's
// cache. No package's script runs: configure does what the programs need of it.
func debian(t *testing.T, packages []string) string {
	t.Helper()
	home, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	d := debs{cache: filepath.Join(home, "hauberk", "debian")}
	if err := os.MkdirAll(d.cache+"/debs/partial", 0o755); err != nil {
		t.Fatal(err)
	}
	files, err := d.fetch(packages)
	if err != nil {
		t.Fatalf("fetch Debian's packages: %v", err)
	}
	sum := sha256.Sum256([]byte(strings.Join(files, "\n") + configure))
	image := filepath.Join(d.cache, fmt.Sprintf("%x.erofs", sum[:8]))
	if _, err := os.Stat(image); err == nil {
		return image
	}
	t.Logf("make an image of %d packages", len(files))
	if err := d.make(t.TempDir(), image, files); err != nil {
		t.Fatalf("make image: %v", err)
	}
	return image
}

// debs are packages in a directory of their own.
type debs struct{ cache string }

// fetch downloads packages, what is not here yet, and gives their files.
func (d debs) fetch(packages []string) (files []string, err error) {
	args := append([]string{"-q", "-y", "--no-install-recommends", "-o", "Dir::State::status=/dev/null", "-o", "Dir::Cache::archives=" + d.cache + "/debs",
		"-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "-o", "Dpkg::Use-Pty=0"}, "install")
	run := func(more ...string) ([]byte, error) {
		c := exec.Command("apt-get", slices.Concat(more, args, packages)...)
		c.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
		var out, errs bytes.Buffer
		c.Stdout, c.Stderr = &out, &errs
		if err := c.Run(); err != nil {
			return nil, fmt.Errorf("apt-get: %w: %s", err, &errs)
		}
		return out.Bytes(), nil
	}
	out, err := run("-s")
	if err != nil { // nobody may have asked for the lists yet
		if out, err := exec.Command("apt-get", "-q", "-o", "Acquire::Retries=3", "update").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("apt-get update: %w: %s", err, out)
		}
		if out, err = run("-s"); err != nil {
			return nil, err
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^Inst (\S+) \((\S+) .*\[(\w+)\]\)`).FindAllStringSubmatch(string(out), -1) {
		name, _, _ := strings.Cut(m[1], ":")
		files = append(files, fmt.Sprintf("%s_%s_%s.deb", name, strings.ReplaceAll(m[2], ":", "%3a"), m[3]))
	}
	if len(files) < len(packages) {
		return nil, fmt.Errorf("%d packages for %d", len(files), len(packages))
	}
	slices.Sort(files)
	for _, f := range files {
		if _, err := os.Stat(d.cache + "/debs/" + f); err != nil {
			_, err := run("--download-only")
			return files, err
		}
	}
	return files, nil
}

// make unpacks packages below a directory and makes an image of that.
func (d debs) make(root, image string, files []string) error {
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.MkdirAll(filepath.Join(root, "usr", dir), 0o755); err != nil {
			return err
		}
		if err := os.Symlink("usr/"+dir, filepath.Join(root, dir)); err != nil {
			return err
		}
	}
	for _, f := range files {
		unpack := exec.Command("sh", "-c", `dpkg-deb --fsys-tarfile "$1" | tar --keep-directory-symlink -C "$2" -x`, "sh", filepath.Join(d.cache, "debs", f), root)
		if out, err := unpack.CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w: %s", f, err, out)
		}
	}
	c := exec.Command("sh", "-eu", "-c", configure)
	c.Dir = root
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("configure: %w: %s", err, out)
	}
	made := image + fmt.Sprint(".", os.Getpid())
	defer os.Remove(made)
	if out, err := exec.Command("mkfs.erofs", "--quiet", made, root).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.erofs: %w: %s", err, out)
	}
	return os.Rename(made, image)
}

// configure is what the packages' own scripts would have done, as far as the
// programs here need it. It runs in the image's root directory.
const configure = `
mkdir -p proc sys dev run/sshd run/php tmp work var/lib/dpkg/updates var/lib/apt/lists/partial var/cache/apt/archives/partial
chmod 1777 tmp
ldconfig -r .
cp usr/share/base-passwd/passwd.master etc/passwd
cp usr/share/base-passwd/group.master etc/group
for user in postgres:201 mysql:202 redis:203 sshd:204 _apt:205 app:1000; do
	echo "${user%:*}:x:${user#*:}:${user#*:}::/tmp:/bin/sh" >>etc/passwd
	echo "${user%:*}:x:${user#*:}:" >>etc/group
done
sed 's/:.*/:*:19000:0:99999:7:::/' etc/passwd >etc/shadow
printf 'passwd: files\ngroup: files\nhosts: files dns\n' >etc/nsswitch.conf
mkdir -p etc/pam.d
for kind in auth account password session; do echo "$kind required pam_permit.so" | tee etc/pam.d/common-$kind >etc/pam.d/common-$kind-noninteractive; done
cat etc/pam.d/common-session etc/pam.d/common-auth etc/pam.d/common-account etc/pam.d/common-password >etc/pam.d/other
printf 'PRETTY_NAME="test"\n' >etc/os-release
touch var/lib/dpkg/status
[ -e usr/bin/awk ] || ln -s mawk usr/bin/awk
[ -e usr/bin/which ] || [ ! -e usr/bin/which.debianutils ] || ln -s which.debianutils usr/bin/which
java=usr/lib/jvm/java-17-openjdk-amd64/bin/java
[ ! -e $java ] || ln -sf /$java usr/bin/java
[ ! -e usr/bin/gcc ] || ln -sf gcc usr/bin/cc
chroot . /usr/bin/python3 -m compileall -q /usr/lib/python3* || true # as the packages do
for php in usr/bin/php[0-9]*; do [ ! -e "$php" ] || ln -sf "${php##*/}" usr/bin/php; done
for lua in usr/bin/lua5*; do [ ! -e "$lua" ] || ln -sf "${lua##*/}" usr/bin/lua; done
`
