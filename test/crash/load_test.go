package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"hauberk.dev/test/installation"
)

// tellers pay side by side.
const tellers = 2

// movers have enough money for any order of payments.
var movers = []string{"alice", "bob", "carol"}

// made is a payment that was asked for.
type made struct {
	installation.Payment
	acknowledged bool
	err          error // why not
}

// load is a steady stream of payments, each with an id of its own.
type load struct {
	teller *installation.Teller
	stop   func()

	mu   sync.Mutex
	made []made
}

func startLoad(teller *installation.Teller, seed uint64) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{teller: teller}
	var wg sync.WaitGroup
	for n := range uint64(tellers) {
		wg.Go(func() { l.pay(ctx, n, rand.New(rand.NewPCG(seed, n))) })
	}
	l.stop = func() { cancel(); wg.Wait() }
	return l
}

// pay pays until the context ends. A payment under way is finished, so that
// what came of it is known.
func (l *load) pay(ctx context.Context, teller uint64, random *rand.Rand) {
	for n := 0; ctx.Err() == nil; n++ {
		from := random.IntN(len(movers))
		to := (from + 1 + random.IntN(len(movers)-1)) % len(movers)
		p := installation.Payment{ID: fmt.Sprintf("load-%d-%d", teller, n), From: movers[from], To: movers[to], Amount: 1 + random.Int64N(9)}
		err := l.teller.Pay(context.WithoutCancel(ctx), p)
		l.mu.Lock()
		l.made = append(l.made, made{p, err == nil, err})
		l.mu.Unlock()
		pause := 60 * time.Millisecond
		if err != nil {
			pause *= 4
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}
