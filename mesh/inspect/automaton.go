package inspect

// automaton finds all of many words in one pass: the machine of Aho and
// Corasick, "Efficient string matching" (CACM 18, 1975), with its failure links
// made into a table. Bytes that no word has are one class, so that the table
// stays in the cache.
type automaton struct {
	classes [256]uint8
	width   int
	next    []uint16 // state*width + class
	// States from first on end a word: words[state-first] are all of them.
	first uint16
	words [][]uint8
}

func newAutomaton(words []string) *automaton {
	a := &automaton{width: 1}
	defer func() { a.classes['\n'] = a.classes[' '] }() // a blank, to all but a shell
	for _, w := range words {
		for i := range len(w) {
			if c := w[i]; a.classes[c] == 0 {
				a.classes[c] = uint8(a.width)
				a.width++
			}
		}
	}
	trie, ends := a.trie(words)
	a.link(trie, ends)
	return a
}

// trie is a tree of the words; -1 is no child.
func (a *automaton) trie(words []string) (trie [][]int, ends [][]uint8) {
	node := func() int {
		kids := make([]int, a.width)
		for i := range kids {
			kids[i] = -1
		}
		trie, ends = append(trie, kids), append(ends, nil)
		return len(trie) - 1
	}
	node()
	for n, w := range words {
		at := 0
		for i := range len(w) {
			c := a.classes[w[i]]
			if trie[at][c] < 0 {
				kid := node()
				trie[at][c] = kid
			}
			at = trie[at][c]
		}
		ends[at] = append(ends[at], uint8(n))
	}
	return trie, ends
}

// link makes the tree a machine, breadth first, and numbers the states so that
// those with words come last.
func (a *automaton) link(trie [][]int, ends [][]uint8) {
	fail := make([]int, len(trie))
	queue := []int{}
	for c, kid := range trie[0] {
		if kid < 0 {
			trie[0][c] = 0
		} else {
			queue = append(queue, kid)
		}
	}
	for len(queue) > 0 {
		s := queue[0]
		queue = queue[1:]
		ends[s] = append(ends[s], ends[fail[s]]...)
		for c, kid := range trie[s] {
			if kid < 0 {
				trie[s][c] = trie[fail[s]][c]
			} else {
				fail[kid] = trie[fail[s]][c]
				queue = append(queue, kid)
			}
		}
	}
	number := make([]uint16, len(trie))
	n := uint16(0)
	for _, with := range []bool{false, true} {
		if with {
			a.first = n
		}
		for s := range trie {
			if (len(ends[s]) > 0) == with {
				number[s] = n
				n++
			}
		}
	}
	a.next = make([]uint16, len(trie)*a.width)
	a.words = make([][]uint8, len(trie)-int(a.first))
	for s := range trie {
		for c, to := range trie[s] {
			a.next[int(number[s])*a.width+c] = number[to]
		}
		if len(ends[s]) > 0 {
			a.words[number[s]-a.first] = ends[s]
		}
	}
}
