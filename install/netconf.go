// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"

	"shunt.dev/shunt/internal/netconf"
)

// Of a configuration that is written whole.
const (
	standaloneName = "shunt"
	// standaloneVersion is one that runtimes and Multus have known since 2021.
	// The netconf may name a newer one.
	standaloneVersion = "1.0.0"
	// wrapVersion is that of a list made of a configuration whose own version
	// is older than lists are, or missing.
	wrapVersion = "0.3.1"
)

// A member is one of an object's.
type member struct{ key, value []byte }

// members returns those of an object, but those named.
func members(object []byte, but ...string) (out []member, err error) {
	err = eachMember(object, func(key string, value span) error {
		if !slices.Contains(but, key) {
			name, err := json.Marshal(key)
			if err != nil {
				return err
			}
			out = append(out, member{name, value.of(object)})
		}
		return nil
	})
	return out, err
}

// object is the reverse of members, on one line.
func object(ms []member) []byte {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range ms {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(m.key)
		b.WriteByte(':')
		b.Write(m.value)
	}
	b.WriteByte('}')
	return b.Bytes()
}

// chainedEntry returns the netconf as an item of a list, from which it gets its
// name and version.
func chainedEntry(conf []byte) ([]byte, error) {
	ms, err := members(conf, "name", "cniVersion")
	if err != nil {
		return nil, err
	}
	return object(ms), nil
}

// standaloneConf returns the netconf as a file of its own, and for .conflist as a
// list of one.
func standaloneConf(conf []byte, asList bool) ([]byte, error) {
	name, cniVersion := []byte(`"`+standaloneName+`"`), []byte(`"`+standaloneVersion+`"`)
	err := eachMember(conf, func(key string, value span) error {
		switch key {
		case "name":
			name = value.of(conf)
		case "cniVersion":
			cniVersion = value.of(conf)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	rest, err := members(conf, "name", "cniVersion")
	if err != nil {
		return nil, err
	}
	out := []member{{[]byte(`"cniVersion"`), cniVersion}, {[]byte(`"name"`), name}}
	if asList {
		out = append(out, member{[]byte(`"plugins"`), slices.Concat([]byte("["), object(rest), []byte("]"))})
	} else {
		out = append(out, rest...)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, object(out), "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// fromKey is a member of the lists that wrap makes. Runtimes pass over it.
const fromKey = "shunt.dev/from"

// wrap makes a list of a single configuration, as runtimes do it in memory, and
// of the entry. The configuration is in it byte for byte. from is its file's
// name.
func wrap(text []byte, conf *libcni.PluginConfig, from string, entry []byte) ([]byte, error) {
	cniVersion := conf.Network.CNIVersion
	if tooOld(cniVersion) {
		cniVersion = wrapVersion
	}
	var b bytes.Buffer
	b.WriteString("{\n")
	for _, m := range []struct{ key, value string }{{fromKey, from}, {"cniVersion", cniVersion}, {"name", conf.Network.Name}} {
		value, err := json.Marshal(m.value)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "  %q: %s,\n", m.key, value)
	}
	b.WriteString("  \"plugins\": [\n    ")
	b.Write(bytes.TrimSpace(text))
	b.WriteString(",\n    ")
	if err := json.Indent(&b, entry, "    ", "  "); err != nil {
		return nil, err
	}
	b.WriteString("\n  ]\n}\n")
	return b.Bytes(), nil
}

// tooOld says whether a single configuration's version is older than lists are,
// or missing.
func tooOld(cniVersion string) bool {
	if cniVersion == "" {
		return true
	}
	ok, err := version.GreaterThanOrEqualTo(cniVersion, "0.3.0")
	return err == nil && !ok
}

// wrappedFrom returns which file a list was made of by wrap, or "".
func wrappedFrom(text []byte) (from string) {
	_ = eachMember(text, func(key string, value span) error { // such a text is not wrap's
		if key == fromKey {
			_ = json.Unmarshal(value.of(text), &from)
		}
		return nil
	})
	return from
}

// accepts fails unless the plugin takes the entry as the runtime would hand it
// over, out of the list.
func accepts(l *libcni.NetworkConfigList, entry []byte) error {
	if err := utils.ValidateNetworkName(l.Name); err != nil {
		return fmt.Errorf("name: %q: %w", l.Name, err)
	}
	conf, err := libcni.NetworkPluginConfFromBytes(entry)
	if err != nil {
		return err
	}
	conf, err = libcni.InjectConf(conf, map[string]any{"name": l.Name, "cniVersion": l.CNIVersion})
	if err != nil {
		return err
	}
	_, err = netconf.Parse(conf.Bytes)
	return err
}

// knows says whether this build's plugin takes an entry that is in the chain.
// One of a newer build may have keys that it does not know.
func knows(entry []byte) bool {
	_, err := netconf.Parse(entry)
	return err == nil
}

// checkEntry fails unless the netconf is one that a chain can have.
func checkEntry(entry []byte) error {
	c, err := netconf.Parse(entry)
	if err != nil {
		return err
	}
	if c.Type != pluginType {
		return fmt.Errorf("type: %q is not %q", c.Type, pluginType)
	}
	if c.PrevResult != nil {
		return errors.New("prevResult: only a runtime may give one")
	}
	return nil
}
