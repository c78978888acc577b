package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	crowd  = 8
	settle = 4 * time.Second // until a guest has nothing left to do
)

// memories weighs idle sandboxes, alone and in a crowd.
func memories(ctx context.Context, l *lab) (out []figure, err error) {
	var all []*sandbox
	defer func() {
		for _, s := range all {
			err = errors.Join(err, s.stop(context.WithoutCancel(ctx)))
		}
	}()
	for len(all) < crowd {
		s, err := l.launch(ctx, fromTemplate)
		if err != nil {
			return out, err
		}
		all = append(all, s)
		if len(all) != 1 && len(all) != crowd {
			continue
		}
		select {
		case <-ctx.Done():
			return out, context.Cause(ctx)
		case <-time.After(settle):
		}
		f, err := weigh(ctx, all)
		if out = append(out, f...); err != nil {
			return out, err
		}
	}
	return out, nil
}

// weigh reads what the sandboxes take now.
func weigh(ctx context.Context, all []*sandbox) ([]figure, error) {
	var private, shared, part, agent, used []float64
	for _, s := range all {
		m, err := s.machine.Memory()
		if err != nil {
			return nil, err
		}
		st, err := s.channel.Stats(ctx)
		if err != nil {
			return nil, err
		}
		private, shared, part = append(private, mib(m.Private)), append(shared, mib(m.Shared)), append(part, mib(m.Proportional))
		agent, used = append(agent, mib(st.AgentPrivate)), append(used, mib(st.MemoryTotal-st.MemoryAvailable))
	}
	of := fmt.Sprintf("one of %d idle sandboxes: ", len(all))
	return []figure{
		spread(of+"private", "MiB", "QEMU and its guest: pages nobody else maps", private),
		spread(of+"shared", "MiB", "template and programs, mapped by others too", shared),
		spread(of+"proportional", "MiB", "private and its part of the shared", part),
		spread(of+"used in the guest", "MiB", "total less available, as the guest counts", used),
		spread(of+"agent, private", "MiB", "", agent),
	}, nil
}
