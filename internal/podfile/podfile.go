// SPDX-License-Identifier: Apache-2.0

// Package podfile reads a Pod as people have it: YAML or JSON, from a file or
// from `kubectl get pod -o yaml`.
//
// It is strict where a slip would go unseen: a key given twice, a second
// document, a list of several pods, an object that only describes pods.
package podfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"sigs.k8s.io/yaml"

	"shunt.dev/shunt/redirect"
)

// maxSize bounds a file, in bytes: etcd holds no object of more than 1.5 MiB.
const maxSize = 4 << 20

// A File is what a file says of one pod.
type File struct {
	Pod *redirect.Pod
	// IPs are the pod's addresses by its status; empty before it has started.
	IPs []netip.Addr
	// RunAsUser and RunAsGroup are those of the pod's securityContext, which
	// stand for a container's own; nil where it names none.
	RunAsUser, RunAsGroup *int64
}

// Read reads one Pod from r, to its end.
func Read(r io.Reader) (*File, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxSize {
		return nil, fmt.Errorf("it is longer than %d MiB: expected one Pod", maxSize>>20)
	}
	return Parse(data)
}

// Parse is Read for what has been read.
func Parse(data []byte) (*File, error) {
	object, err := oneDocument(data)
	if err != nil {
		return nil, err
	}
	if object, err = onePod(object); err != nil {
		return nil, err
	}
	f := new(File)
	if f.Pod, err = redirect.ParsePod(object); err != nil {
		return nil, explained(err)
	}
	var rest struct {
		Spec struct {
			SecurityContext struct {
				RunAsUser  *int64 `json:"runAsUser"`
				RunAsGroup *int64 `json:"runAsGroup"`
			} `json:"securityContext"`
		} `json:"spec"`
		Status struct {
			PodIP  string `json:"podIP"`
			PodIPs []struct {
				IP string `json:"ip"`
			} `json:"podIPs"`
		} `json:"status"`
	}
	if err := json.Unmarshal(object, &rest); err != nil {
		return nil, explained(fmt.Errorf("parse pod: %w", err))
	}
	f.RunAsUser, f.RunAsGroup = rest.Spec.SecurityContext.RunAsUser, rest.Spec.SecurityContext.RunAsGroup
	var ips []string
	for _, ip := range rest.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	if len(ips) == 0 && rest.Status.PodIP != "" {
		ips = []string{rest.Status.PodIP}
	}
	for _, ip := range ips {
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			return nil, fmt.Errorf("parse pod: status.podIPs: %q: expected an IP address", ip)
		}
		f.IPs = append(f.IPs, addr)
	}
	return f, nil
}

// oneDocument gives the only document of a file as JSON.
func oneDocument(data []byte) ([]byte, error) {
	if json.Valid(data) {
		// Not by way of YAML, which has not all of JSON's escapes.
		return data, checkKeys(data)
	}
	var documents [][]byte
	for _, text := range split(data) {
		// The YAML parser would pass over whatever follows the last brace.
		if isFlow(text) {
			dec := json.NewDecoder(bytes.NewReader(text))
			for {
				var object json.RawMessage
				err := dec.Decode(&object)
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					return nil, fmt.Errorf("expected a Pod as YAML or JSON: %w", err)
				}
				if err := checkKeys(object); err != nil {
					return nil, err
				}
				documents = append(documents, object)
			}
			continue
		}
		object, err := yaml.YAMLToJSONStrict(text)
		if err != nil {
			return nil, fmt.Errorf("expected a Pod as YAML or JSON: %w", oneLine(err))
		}
		if string(object) != "null" {
			documents = append(documents, object)
		}
	}
	switch len(documents) {
	case 0:
		return nil, errors.New("it is empty: expected a Pod as YAML or JSON")
	case 1:
		return documents[0], nil
	}
	return nil, fmt.Errorf("it holds %d documents: expected one Pod", len(documents))
}

// split cuts a YAML stream where a line begins with a marker, "---" or "...",
// which no content can (YAML 1.2, section 9.1.2). Lines keep their numbers for
// errors.
func split(data []byte) (documents [][]byte) {
	var document []byte
	lines := 0
	for line := range bytes.Lines(data) {
		if isMarker(line) {
			documents = append(documents, document)
			document = bytes.Repeat([]byte("\n"), lines)
			line = line[3:]
		}
		document = append(document, line...)
		lines++
	}
	return append(documents, document)
}

func isMarker(line []byte) bool {
	mark, rest := line[:min(3, len(line))], line[min(3, len(line)):]
	return (string(mark) == "---" || string(mark) == "...") && (len(rest) == 0 || strings.ContainsRune(" \t\r\n", rune(rest[0])))
}

// isFlow reports whether a document's first content is a brace or a bracket.
func isFlow(document []byte) bool {
	for line := range bytes.Lines(document) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && line[0] != '#' {
			return line[0] == '{' || line[0] == '['
		}
	}
	return false
}

// checkKeys fails where an object of a JSON text has a key twice.
func checkKeys(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var value func(path string) error
	value = func(path string) error {
		tok, err := dec.Token()
		if err != nil {
			return err
		}
		delim, ok := tok.(json.Delim)
		if !ok {
			return nil
		}
		seen := map[string]bool{}
		for i := 0; dec.More(); i++ {
			at := fmt.Sprintf("%s[%d]", path, i)
			if delim == '{' {
				key, err := dec.Token()
				if err != nil {
					return err
				}
				name, _ := key.(string) // an object's odd tokens are its keys
				at = strings.TrimPrefix(path+"."+name, ".")
				if seen[name] {
					return fmt.Errorf("key %s is given twice: expected it once", at)
				}
				seen[name] = true
			}
			if err := value(at); err != nil {
				return err
			}
		}
		_, err = dec.Token()
		return err
	}
	return value("")
}

// onePod takes the pod out of a list of one, as kubectl gives it for a
// selector, and knows what is no pod but looks like it.
func onePod(object []byte) ([]byte, error) {
	var head struct {
		Kind  string            `json:"kind"`
		Items []json.RawMessage `json:"items"`
		Spec  struct {
			Template    json.RawMessage `json:"template"`
			JobTemplate json.RawMessage `json:"jobTemplate"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(object, &head); err != nil {
		return nil, explained(fmt.Errorf("expected a Pod: %w", err))
	}
	switch {
	case head.Kind == "List", head.Kind == "PodList":
		if len(head.Items) == 1 {
			return head.Items[0], nil
		}
		return nil, fmt.Errorf("it is a list of %d objects%s: expected one Pod", len(head.Items), names(head.Items))
	case head.Kind != "Pod" && (head.Spec.Template != nil || head.Spec.JobTemplate != nil):
		kind := head.Kind
		if kind == "" {
			kind = "object without a kind"
		}
		return nil, fmt.Errorf("it is a %s, which holds a template of pods: expected a Pod, as `kubectl get pod NAME -o yaml` gives it", kind)
	}
	return object, nil
}

// names tells the first names of a list.
func names(items []json.RawMessage) string {
	const most = 10
	var list []string
	for _, item := range items {
		var o struct {
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
		}
		if json.Unmarshal(item, &o) != nil || o.Metadata.Name == "" {
			o.Metadata.Name = "one without a name"
		}
		list = append(list, o.Metadata.Name)
	}
	switch {
	case len(list) == 0:
		return ""
	case len(list) > most:
		list = append(list[:most], "and others")
	}
	return " (" + strings.Join(list, ", ") + ")"
}

// explained says in the words of a pod what encoding/json says in Go's.
func explained(err error) error {
	var mismatch *json.UnmarshalTypeError
	if !errors.As(err, &mismatch) {
		return err
	}
	want := map[string]string{
		"string": "a string: a number, true or false has to stand in quotes", "int64": "a whole number", "int32": "a whole number",
		"bool": "true or false",
	}[mismatch.Type.String()]
	switch {
	case want != "":
	case strings.HasPrefix(mismatch.Type.String(), "[]"):
		want = "a list"
	default:
		want = "an object"
	}
	where := strings.TrimPrefix(mismatch.Field, "Pod.")
	if where == "" {
		where = "the document"
	}
	return fmt.Errorf("parse pod: %s: %s is not %s", where, mismatch.Value, want)
}

// oneLine is for the YAML parser, which lists what it finds line by line.
func oneLine(err error) error {
	var lines []string
	for line := range strings.Lines(err.Error()) {
		lines = append(lines, strings.TrimSpace(line))
	}
	return errors.New(strings.Join(lines, " "))
}
