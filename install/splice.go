// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// pluginType is the plugin's name in network configurations, and its binary's.
const pluginType = "shunt-cni"

// A span is where a value is in a text: bytes start to end.
type span struct{ start, end int }

func (s span) of(text []byte) []byte { return text[s.start:s.end] }

// A list is the text of a list of plugins (.conflist), and where they are. It is
// changed by splicing only: spacing, order, numbers and keys that nobody here
// knows stay as they are.
type list struct {
	text    []byte
	conf    *libcni.NetworkConfigList
	array   span   // of "plugins", with its brackets
	plugins []span // its items
}

// parseList reads a list as runtimes do. Its errors say why they would not take
// it.
func parseList(text []byte) (*list, error) {
	conf, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return nil, err
	}
	l := &list{text: text, conf: conf}
	err = eachMember(text, func(key string, value span) error {
		if key == "plugins" { // the last of several counts, as for libcni
			l.array = value
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if l.plugins, err = items(text, l.array); err != nil {
		return nil, err
	}
	if len(l.plugins) != len(conf.Plugins) {
		return nil, fmt.Errorf("plugins: %d were found, and libcni finds %d", len(l.plugins), len(conf.Plugins))
	}
	return l, nil
}

// eachMember calls f for every member of the object that is text.
func eachMember(text []byte, f func(key string, value span) error) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	if t, err := dec.Token(); err != nil {
		return fmt.Errorf("decode JSON: %w", err)
	} else if t != json.Delim('{') {
		return errors.New("decode JSON: it is not an object")
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return fmt.Errorf("decode JSON: %w", err)
		}
		value, err := next(dec)
		if err != nil {
			return fmt.Errorf("decode JSON: %w", err)
		}
		name, _ := key.(string) // what stands before a value of an object
		if err := f(name, value); err != nil {
			return err
		}
	}
	return nil
}

// items returns where the items of an array are; none if it is not one.
func items(text []byte, array span) (out []span, err error) {
	raw := array.of(text)
	if len(raw) == 0 || raw[0] != '[' {
		return nil, nil
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if _, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("decode JSON: %w", err)
	}
	for dec.More() {
		s, err := next(dec)
		if err != nil {
			return nil, fmt.Errorf("decode JSON: %w", err)
		}
		out = append(out, span{array.start + s.start, array.start + s.end})
	}
	return out, nil
}

// next reads one value, and says where it was.
func next(dec *json.Decoder) (span, error) {
	var raw json.RawMessage
	if err := dec.Decode(&raw); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return span{}, err
	}
	end := int(dec.InputOffset())
	return span{end - len(raw), end}, nil
}

func (l *list) ours(i int) bool { return l.conf.Plugins[i].Network.Type == pluginType }

// count returns how many plugins are ours, and how many others'.
func (l *list) count() (ours, others int) {
	for i := range l.plugins {
		if l.ours(i) {
			ours++
		} else {
			others++
		}
	}
	return ours, others
}

// with returns the text with entry as its last plugin, and the only one of its
// type. A list that has just that is returned as it is. At least one plugin must
// be another's.
func (l *list) with(entry []byte) ([]byte, error) {
	last := len(l.plugins) - 1
	if ours, _ := l.count(); ours == 1 && l.ours(last) {
		if at := l.plugins[last]; !sameJSON(at.of(l.text), entry) {
			return l.splice(at, render(entry, l.text, l.plugins[last-1])), nil
		}
		return l.text, nil
	} else if ours > 0 {
		bare, err := parseList(l.without())
		if err != nil {
			return nil, err
		}
		return bare.with(entry)
	}
	// The new one follows as the last one follows what is before it.
	model := l.plugins[last]
	lead := l.text[l.array.start+1 : model.start]
	if last > 0 {
		_, lead, _ = bytes.Cut(l.text[l.plugins[last-1].end:model.start], []byte(","))
	}
	added := append([]byte(","), lead...)
	return l.splice(span{model.end, model.end}, append(added, render(entry, l.text, model)...)), nil
}

// without returns the text without the plugins that are ours: exactly what with
// has added is gone. At least one plugin must be another's.
func (l *list) without() []byte {
	first := 0
	for l.ours(first) {
		first++
	}
	out := l.text
	for i := len(l.plugins) - 1; i > first; i-- {
		if l.ours(i) {
			out = splice(out, span{l.plugins[i-1].end, l.plugins[i].end}, nil)
		}
	}
	return splice(out, span{l.plugins[0].start, l.plugins[first].start}, nil)
}

func (l *list) splice(at span, by []byte) []byte { return splice(l.text, at, by) }

func splice(text []byte, at span, by []byte) []byte {
	out := make([]byte, 0, len(text)-(at.end-at.start)+len(by))
	out = append(out, text[:at.start]...)
	out = append(out, by...)
	return append(out, text[at.end:]...)
}

// sameJSON says whether two texts differ in their spacing only.
func sameJSON(a, b []byte) bool {
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}

// render writes entry in the way of another object of the text: on one line, or
// with its indentation and its ends of lines.
func render(entry, text []byte, model span) []byte {
	var out bytes.Buffer
	object := model.of(text)
	head, tail := bytes.IndexByte(object, '\n'), bytes.LastIndexByte(object, '\n')
	if head < 0 {
		_ = json.Compact(&out, entry) // it is JSON: see New
		return out.Bytes()
	}
	base, inner := indentation(object[tail+1:]), indentation(object[head+1:])
	unit, deeper := strings.CutPrefix(inner, base)
	if !deeper || unit == "" {
		unit = "  "
	}
	_ = json.Indent(&out, bytes.TrimSpace(entry), base, unit) // which would keep what follows the value
	if head > 0 && object[head-1] == '\r' {
		return bytes.ReplaceAll(out.Bytes(), []byte("\n"), []byte("\r\n"))
	}
	return out.Bytes()
}

// indentation is what a line begins with.
func indentation(line []byte) string {
	return string(line[:len(line)-len(bytes.TrimLeft(line, " \t"))])
}
