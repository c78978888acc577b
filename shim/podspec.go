package shim

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// What the CRI says of a pod's size in the annotations of its pause container.
const (
	sandboxMemory = "io.kubernetes.cri.sandbox-memory"
	sandboxQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	sandboxPeriod = "io.kubernetes.cri.sandbox-cpu-period"
)

// parsePodConfiguration reads what the configuration of a pause container says
// of its pod. The process, its rights and its files are never made, so most of
// it asks for nothing.
func parsePodConfiguration(raw []byte, o options) (wish, error) {
	var c struct {
		Annotations map[string]string `json:"annotations"`
		Hostname    string            `json:"hostname"`
		Linux       linux             `json:"linux"`
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return wish{}, fmt.Errorf("read config.json: %w", err)
	}
	w := wish{hostname: c.Hostname}
	var err error
	if w.policy, err = compilePolicy(c.Annotations); err != nil {
		return wish{}, err
	}
	for name, into := range map[string]*int64{
		sandboxMemory: &c.Linux.Resources.Memory.Limit, sandboxQuota: &c.Linux.Resources.CPU.Quota,
	} {
		if err := number(c.Annotations, name, into); err != nil {
			return wish{}, err
		}
	}
	period := int64(c.Linux.Resources.CPU.Period)
	if err := number(c.Annotations, sandboxPeriod, &period); err != nil {
		return wish{}, err
	}
	c.Linux.Resources.CPU.Period = uint64(max(0, period))
	for i, n := range c.Linux.Namespaces {
		switch {
		case n.Type == "network" && n.Path != "":
			w.netns = n.Path
		case n.Type == "user":
			return wish{}, fmt.Errorf("read config.json: linux.namespaces[%d]: a pod has users of its own already", i)
		}
	}
	w.size = sizeOf(o, &c.Linux)
	return w, nil
}

// number reads an annotation that is a number, if it is there.
func number(annotations map[string]string, name string, into *int64) error {
	text, ok := annotations[name]
	if !ok || text == "" {
		return nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < -1 || n > 1<<50 {
		return fmt.Errorf("read config.json: annotation %s %.64q: want a number", name, text)
	}
	*into = n
	return nil
}
