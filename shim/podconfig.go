package shim

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/protofields"
	"hauberk.dev/shim/oci"
)

// podConfigURL is the CRI's configuration of a pod, which a caller of the
// Sandbox API gives. The few of its fields that mean something here are read by
// hand: the package that defines them is of Kubernetes, and this door knows no
// cluster.
const podConfigURL = "runtime.v1.PodSandboxConfig"

const maxPodConfig = 4 << 20

// podConfig is what of a pod's configuration means something here.
type podConfig struct {
	hostname, uid                 string
	servers, searches, options    []string // of names
	annotations, sysctls          map[string]string
	memory, quota, period, shares uint64
	host                          []string // namespaces that are to be the host's
}

// parsePodConfig reads the options of a pod; there may be none.
func parsePodConfig(given *anypb.Any) (podConfig, error) {
	c := podConfig{annotations: map[string]string{}, sysctls: map[string]string{}}
	u := strings.TrimPrefix(given.GetTypeUrl(), "type.googleapis.com/")
	if u == "" && len(given.GetValue()) == 0 {
		return c, nil
	}
	if u != podConfigURL {
		return c, fmt.Errorf("read pod configuration: type %.128q: want %s", u, podConfigURL)
	}
	if len(given.GetValue()) > maxPodConfig {
		return c, fmt.Errorf("read pod configuration: it has more than %d bytes", maxPodConfig)
	}
	if err := c.parse(given.GetValue()); err != nil {
		return c, fmt.Errorf("read pod configuration: %w", err)
	}
	if len(c.host) > 0 {
		return c, fmt.Errorf("read pod configuration: the host's %s namespace: a sandbox cannot share it", strings.Join(c.host, " and "))
	}
	return c, nil
}

func (c *podConfig) parse(raw []byte) error {
	return protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch n {
		case 1:
			return protofields.Each(inner, func(n protowire.Number, inner []byte, _ uint64) error {
				if n == 2 {
					c.uid = string(inner)
				}
				return nil
			})
		case 2:
			c.hostname = string(inner)
		case 4:
			return protofields.Each(inner, c.name)
		case 7:
			return pair(inner, c.annotations)
		case 8:
			return protofields.Each(inner, c.linux)
		}
		return nil
	})
}

func (c *podConfig) name(n protowire.Number, inner []byte, _ uint64) error {
	for at, into := range map[protowire.Number]*[]string{1: &c.servers, 2: &c.searches, 3: &c.options} {
		if n == at {
			if strings.ContainsAny(string(inner), "\n\x00") {
				return fmt.Errorf("dns_config: %.64q", inner)
			}
			*into = append(*into, string(inner))
		}
	}
	return nil
}

func (c *podConfig) linux(n protowire.Number, inner []byte, _ uint64) error {
	switch n {
	case 2: // security_context
		return protofields.Each(inner, func(n protowire.Number, inner []byte, _ uint64) error {
			if n != 1 {
				return nil
			}
			return protofields.Each(inner, c.namespace)
		})
	case 3:
		return pair(inner, c.sysctls)
	case 5: // resources
		return protofields.Each(inner, func(n protowire.Number, _ []byte, v uint64) error {
			for at, into := range map[protowire.Number]*uint64{1: &c.period, 2: &c.quota, 3: &c.shares, 4: &c.memory} {
				if n == at {
					*into = v
				}
			}
			return nil
		})
	}
	return nil
}

// namespace notes what is to be the host's (NODE).
func (c *podConfig) namespace(n protowire.Number, _ []byte, v uint64) error {
	const node = 2
	if name := map[protowire.Number]string{1: "network", 2: "PID", 3: "IPC"}[n]; name != "" && v == node {
		c.host = append(c.host, name)
	}
	return nil
}

// pair reads an entry of a map of strings.
func pair(raw []byte, into map[string]string) error {
	var key, value string
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch n {
		case 1:
			key = string(inner)
		case 2:
			value = string(inner)
		}
		return nil
	})
	into[key] = value
	return err
}

// config is the configuration that a pause container of this pod would have, so
// that both ways to make a pod are judged by one table.
func (c podConfig) config(id string) (*oci.Config, error) {
	type object = map[string]any
	annotations := map[string]string{
		criAnnotations[0].kind: "sandbox", criAnnotations[0].pod: id, "io.kubernetes.cri.sandbox-uid": c.uid,
	}
	for name, v := range map[string]uint64{
		"memory": c.memory, "cpu-quota": c.quota, "cpu-period": c.period, "cpu-shares": c.shares,
	} {
		if int64(v) > 0 {
			annotations["io.kubernetes.cri.sandbox-"+name] = strconv.FormatUint(v, 10)
		}
	}
	var namespaces []object
	for _, kind := range []string{"pid", "ipc", "uts", "mount", "network"} {
		namespaces = append(namespaces, object{"type": kind})
	}
	raw, err := json.Marshal(object{
		"ociVersion": "1.1.0", "hostname": c.hostname, "annotations": annotations,
		"process": object{"args": []string{"pause"}, "cwd": "/"},
		"linux":   object{"namespaces": namespaces, "sysctl": c.sysctls},
	})
	if err != nil {
		return nil, err
	}
	return oci.Parse(raw)
}

// files are those that a pod's containers have of it, where no pause container
// lends them its own.
func (c podConfig) files(hostname string) []guestproto.File {
	var names strings.Builder
	for _, line := range []struct {
		word string
		list []string
	}{{"search", c.searches}, {"nameserver", c.servers}, {"options", c.options}} {
		if line.word == "nameserver" {
			for _, s := range line.list {
				fmt.Fprintf(&names, "nameserver %s\n", s)
			}
		} else if len(line.list) > 0 {
			fmt.Fprintf(&names, "%s %s\n", line.word, strings.Join(line.list, " "))
		}
	}
	hosts := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	out := []guestproto.File{
		{Path: "/etc/hostname", Mode: 0o644, Data: []byte(hostname + "\n")},
		{Path: "/etc/hosts", Mode: 0o644, Data: []byte(hosts)},
	}
	if names.Len() > 0 {
		out = append(out, guestproto.File{Path: "/etc/resolv.conf", Mode: 0o644, Data: []byte(names.String())})
	}
	return out
}
