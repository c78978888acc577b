package manifest_test

import (
	"strings"
	"testing"

	"hauberk.dev/kube/manifest"
)

const good = "apiVersion: hauberk.dev/v1alpha1\nkind: Workload\nmetadata: {namespace: bank, name: web}\nspec: {application: bank, image: \"bank/web:1\"}\n"

// FuzzParse proves that no manifest brings the reader down, and that what
// it takes has a kind and a name.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"", "---\n", "a: [", "- a", "null", "kind: List\napiVersion: v1\nitems: []\n",
		good,
		good + "---\n# nothing\n---\n" + good,
		"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {a: &x [1, 2], b: *x}\n",
		"apiVersion: v1\nkind: ConfigMap\nmetadata: [name]\n", "apiVersion: a/b/c\nkind: 7\nmetadata: {name: 1}\n",
		"a: &a [x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nd: [*c,*c,*c]\n", "\xff\xfe", "a: 1\na: 2\n", "? [a]\n: b\n", "key: !!binary zzz\n",
		`{"apiVersion":"v1","kind":"Secret","metadata":{"name":"s","namespace":"x"}}`,
		strings.Repeat("---\na: b\n", 30),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		docs, err := manifest.Parse(raw)
		for _, d := range docs {
			if err == nil && (d.Object.GetKind() == "" || d.Object.GetName() == "" || d.Object.GetAPIVersion() == "") {
				t.Errorf("took document %d without a kind or a name", d.Index)
			}
		}
		if err == nil && len(docs) == 0 {
			t.Error("took a manifest without a document")
		}
		if err != nil && err.Error() == "" {
			t.Error("refused without a word")
		}
	})
}
