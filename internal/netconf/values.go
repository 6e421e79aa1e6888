// SPDX-License-Identifier: Apache-2.0

package netconf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
)

// The functions below read one value each. Their errors name the key, the
// value and what was expected, and their raw has passed checkSyntax.

// kindOf returns the first byte of a JSON value: one of { [ " t f n - 0…9.
func kindOf(raw []byte) byte {
	raw = bytes.TrimLeft(raw, " \t\r\n")
	if len(raw) == 0 {
		return 0
	}
	return raw[0]
}

// quote returns raw for an error message, shortened.
func quote(raw []byte) string {
	const most = 80
	if len(raw) > most {
		return strings.ToValidUTF8(string(raw[:most]), "") + "…"
	}
	return string(raw)
}

// mismatch says that the value of key is not what was expected.
func mismatch(key string, raw []byte, expected string) error {
	return fmt.Errorf("%s: %s is not %s", key, quote(raw), expected)
}

// unknown says that key does not exist, and which of known it may have meant.
func unknown(key string, raw []byte, known []string) error {
	for _, k := range known {
		if strings.EqualFold(k, key) {
			return fmt.Errorf("%q: %s: no such key: expected %q (keys are case-sensitive)", key, quote(raw), k)
		}
	}
	return fmt.Errorf("%q: %s: no such key: expected one of %s, or a key of the CNI specification",
		key, quote(raw), strings.Join(known, ", "))
}

// eachKey calls f for every member of the object raw, with prefix before its
// name. A key given twice is an error: which of the two counts would be
// anybody's guess.
func eachKey(prefix string, raw []byte, f func(key string, raw json.RawMessage) error) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if _, err := dec.Token(); err != nil { // the opening brace
		return fmt.Errorf("decode JSON: %w", err)
	}
	seen := make(map[string]struct{}, 16)
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return fmt.Errorf("decode JSON: %w", err)
		}
		name, _ := tok.(string) // an object's odd tokens are its keys
		key := prefix + name
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return fmt.Errorf("%s: decode JSON: %w", key, err)
		}
		if _, twice := seen[key]; twice {
			return fmt.Errorf("%s: %s: the key is given twice: expected it once", key, quote(value))
		}
		seen[key] = struct{}{}
		if err := f(key, value); err != nil {
			return err
		}
	}
	return nil
}

// eachIn is eachKey for the object at key; f gets the members' full names.
func eachIn(key string, raw []byte, f func(key string, raw json.RawMessage) error) error {
	if kindOf(raw) != '{' {
		return mismatch(key, raw, "an object")
	}
	return eachKey(key+".", raw, f)
}

// eachItem calls f for every item of the array at key, named key[0], key[1] …
func eachItem(key string, raw []byte, expected string, f func(item string, raw json.RawMessage) error) error {
	if kindOf(raw) != '[' {
		return mismatch(key, raw, expected)
	}
	var items []json.RawMessage
	if err := json.Unmarshal(raw, &items); err != nil {
		return fmt.Errorf("%s: decode JSON: %w", key, err)
	}
	for i, item := range items {
		if err := f(key+"["+strconv.Itoa(i)+"]", item); err != nil {
			return err
		}
	}
	return nil
}

// scan unmarshals into v, which must not accept null.
func scan(key string, raw json.RawMessage, v any, expected string) error {
	if kindOf(raw) == 'n' || json.Unmarshal(raw, v) != nil {
		return mismatch(key, raw, expected)
	}
	return nil
}

func text(key string, raw json.RawMessage) (string, error) {
	var s string
	err := scan(key, raw, &s, "a string")
	return s, err
}

func nonEmpty(key string, raw json.RawMessage) (string, error) {
	s, err := text(key, raw)
	if err == nil && s == "" {
		err = mismatch(key, raw, "a string of at least one character")
	}
	return s, err
}

func oneOf(key string, raw json.RawMessage, values ...string) (string, error) {
	s, err := text(key, raw)
	if err != nil {
		return "", mismatch(key, raw, "one of "+strings.Join(values, ", "))
	}
	for _, v := range values {
		if s == v {
			return s, nil
		}
	}
	return "", mismatch(key, raw, "one of "+strings.Join(values, ", "))
}

// absolute reads an absolute path without "..": where that leads would depend
// on the links on the way. The path is cleaned.
func absolute(key string, raw json.RawMessage) (string, error) {
	const expected = "an absolute path without .. in it"
	s, err := text(key, raw)
	if err != nil || !path.IsAbs(s) || strings.ContainsRune(s, 0) {
		return "", mismatch(key, raw, expected)
	}
	for part := range strings.SplitSeq(s, "/") {
		if part == ".." {
			return "", mismatch(key, raw, expected)
		}
	}
	return path.Clean(s), nil
}

// integer reads an integer from 1 to most.
func integer[T uint16 | uint32](key string, raw json.RawMessage, most uint64) (T, error) {
	n, err := strconv.ParseUint(string(raw), 10, 64)
	if err != nil || n < 1 || n > most {
		return 0, mismatch(key, raw, fmt.Sprintf("an integer from 1 to %d", most))
	}
	return T(n), nil
}

func timeout(key string, raw json.RawMessage) (time.Duration, error) {
	s, err := text(key, raw)
	if err == nil {
		if d, perr := time.ParseDuration(s); perr == nil && d > 0 && d <= maxPodFactsTimeout {
			return d, nil
		}
	}
	return 0, mismatch(key, raw, `a duration above 0 and at most 10m, such as "30s"`)
}

func names(key string, raw json.RawMessage, valid func(string) bool, what string) ([]string, error) {
	var out []string
	err := eachItem(key, raw, "an array of strings", func(item string, raw json.RawMessage) error {
		s, err := text(item, raw)
		if err != nil || !valid(s) {
			return mismatch(item, raw, what)
		}
		out = append(out, s)
		return nil
	})
	return out, err
}

// isLabel reports whether s is a DNS label as Kubernetes has it (RFC 1123):
// 1 to 63 lower-case letters, digits and inner dashes.
func isLabel(s string) bool {
	if len(s) < 1 || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		switch b := s[i]; {
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9':
		case b == '-' && i > 0 && i < len(s)-1:
		default:
			return false
		}
	}
	return true
}

// isSubdomain reports whether s is a Kubernetes object's name (RFC 1123): up
// to 253 characters of letters, digits, inner dashes, and dots between.
func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if part == "" || part[0] == '-' || part[len(part)-1] == '-' {
			return false
		}
		for i := range len(part) {
			b := part[i]
			if ('a' > b || b > 'z') && ('0' > b || b > '9') && b != '-' {
				return false
			}
		}
	}
	return true
}
