package sandbox

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

var (
	manners = strings.Fields("able brave bright calm clear crisp eager early fair fast firm fresh gentle glad keen kind light lively lucky mild neat noble prompt proud quick quiet ready sharp steady sunny warm wise")
	animals = strings.Fields("badger bear beaver bison crane deer dove eagle falcon finch fox hare hawk heron horse ibis jay lark lynx marten mole otter owl raven robin seal stork swan tern vole wolf wren")
)

// freeName makes up a name that no sandbox has. The lock is held.
func (h *Host) freeName() string {
	for n := 0; ; n++ {
		name := manners[rand.IntN(len(manners))] + "-" + animals[rand.IntN(len(animals))]
		if n > 10 { // most are taken
			name += "-" + strconv.Itoa(rand.IntN(1<<20))
		}
		if _, err := os.Lstat(filepath.Join(h.names(), name)); err != nil {
			return name
		}
	}
}
