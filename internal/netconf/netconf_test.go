// SPDX-License-Identifier: Apache-2.0

package netconf

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"shunt.dev/shunt/redirect"
)

// full is the contract's configuration, with other values than its defaults.
const full = `{
	"type": "shunt-cni",
	"name": "mesh", "cniVersion": "1.0.0",
	"capabilities": {"cgroupPath": true, "io.kubernetes.cri.pod-annotations": true, "portMappings": false},
	"runtimeConfig": {
		"cgroupPath": "/kubepods/burstable/pod1",
		"io.kubernetes.cri.pod-annotations": {"a": "b", "traffic.sidecar.istio.io/includeInboundPorts": ""},
		"portMappings": [{"hostPort": 1}]
	},
	"args": {"cni": {"ips": ["10.0.0.1"]}, "shunt.dev/agent": "mesh-system/shunt-node"}, "dns": {}, "ipam": {}, "cni.dev/valid-attachments": [], "cni.dev/other": 1,
	"prevResult": { "cniVersion":"1.0.0" ,  "ips": [] },
	"logLevel": "debug",
	"runDir": "/srv/run/",
	"kubeconfig": "/etc/shunt/kubeconfig",
	"bpfDir": "/sys/fs/bpf/other",
	"cgroupRoot": "/sys/fs/cgroup/unified",
	"excludeNamespaces": ["istio-system", "a"],
	"datapath": "ebpf",
	"inboundHook": "tc",
	"iptablesBackend": "nft",
	"includeInboundPortsDefault": "*",
	"nativeRuntimeClasses": ["nvidia", "crun.v2"],
	"podFactsTimeout": "1m30s",
	"proxy": {"containerName": "linkerd-proxy", "uid": 2102, "gid": 4294967294, "outboundPort": 4140, "inboundPort": 4143,
		"tunnelPort": 1, "dnsPort": 65535, "excludeInboundPorts": [4190]}
}`

func TestParseFull(t *testing.T) {
	got, err := Parse([]byte(full))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		CNIVersion: "1.0.0", Name: "mesh", Type: "shunt-cni",
		PrevResult:     json.RawMessage(`{ "cniVersion":"1.0.0" ,  "ips": [] }`),
		CgroupPath:     "/kubepods/burstable/pod1",
		PodAnnotations: map[string]string{"a": "b", "traffic.sidecar.istio.io/includeInboundPorts": ""},
		LogLevel:       "debug", RunDir: "/srv/run", Kubeconfig: "/etc/shunt/kubeconfig", BPFDir: "/sys/fs/bpf/other",
		CgroupRoot: "/sys/fs/cgroup/unified",
		Datapath:   "ebpf", InboundHook: "tc", IptablesBackend: "nft", PodFactsTimeout: 90 * time.Second,
		Redirect: redirect.Config{
			ExcludeNamespaces: []string{"istio-system", "a"},
			ProxyContainer:    "linkerd-proxy",
			Proxy:             redirect.Proxy{UID: 2102, GID: 4294967294, OutboundPort: 4140, InboundPort: 4143, TunnelPort: 1, DNSPort: 65535},

			ProxyExcludeInboundPorts:   []uint16{4190},
			IncludeInboundPortsDefault: "*",
			NativeRuntimeClasses:       []string{"nvidia", "crun.v2"},
			Agent:                      redirect.AgentRef{Namespace: "mesh-system", DaemonSet: "shunt-node"},
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
}

// TestDefaults holds the contract's defaults, as literals of its text.
func TestDefaults(t *testing.T) {
	got, err := Parse([]byte(`{"type":"shunt-cni"}`))
	if err != nil {
		t.Fatal(err)
	}
	written, err := Parse([]byte(`{
      "type": "shunt-cni",
      "logLevel": "warn",
      "runDir": "/run/shunt",
      "kubeconfig": "/run/shunt/kubeconfig",
      "bpfDir": "/sys/fs/bpf/shunt",
      "cgroupRoot": "",
      "excludeNamespaces": ["kube-system"],
      "datapath": "auto",
      "inboundHook": "auto",
      "iptablesBackend": "auto",
      "includeInboundPortsDefault": "containerPorts",
      "nativeRuntimeClasses": [],
      "podFactsTimeout": "30s",
      "proxy": {"containerName": "istio-proxy", "uid": 1337, "gid": 1337, "outboundPort": 15001, "inboundPort": 15006,
                "tunnelPort": 15008, "dnsPort": 15053, "excludeInboundPorts": [15020, 15021, 15090]}
    }`))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(written, got, cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("defaults differ from the contract's (-contract +got):\n%s", diff)
	}
	if got, err := Parse([]byte(`{"type":"shunt-cni","runDir":"/x"}`)); err != nil || got.Kubeconfig != "/x/kubeconfig" {
		t.Errorf("kubeconfig with another runDir: got %v, %v", got, err)
	}
	for _, level := range []string{"panic", "fatal", "error", "warn", "info", "debug"} {
		if _, err := Parse([]byte(`{"type":"shunt-cni","logLevel":"` + level + `"}`)); err != nil {
			t.Error(err)
		}
	}
	for _, v := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		if c, err := Parse([]byte(`{"type":"shunt-cni","cniVersion":"` + v + `"}`)); err != nil || c.CNIVersion != v {
			t.Errorf("version %s: got %v, %v", v, c, err)
		}
	}
}

// TestErrors holds what is refused, with which code, and that the message
// names key and value.
func TestErrors(t *testing.T) {
	const six, seven = types.ErrDecodingFailure, types.ErrInvalidNetworkConfig
	for _, tc := range []struct {
		in   string // without the type where it begins with a quote
		code uint
		want string
	}{
		{``, six, "unexpected end of JSON input"},
		{`{`, six, "unexpected end of JSON input"},
		{`{"type":"shunt-cni"} x`, six, "invalid character 'x' after top-level value"},
		{`{"type":"shunt-cni"}{}`, six, "at byte 21"},
		{`[]`, six, "[] is not an object"},
		{`null`, six, "null is not an object"},
		{`{}`, seven, "type is missing"},
		{`{"type":""}`, seven, `type: "" is not a string of at least one character`},
		{`{"type":"a","type":"b"}`, seven, "type: \"b\": the key is given twice"},

		{`"logLevl":"warn"`, seven, `"logLevl": "warn": no such key: expected one of logLevel, runDir`},
		{`"loglevel":"warn"`, seven, `"loglevel": "warn": no such key: expected "logLevel" (keys are case-sensitive)`},
		{`"Type":"x"`, seven, `expected "type"`},
		{`"cni.de/x":1`, seven, `"cni.de/x": 1: no such key`},
		{`"prevresult":{}`, seven, `expected "prevResult"`},
		{`"cniVersion":"0.2.0"`, seven, `cniVersion: "0.2.0" is not one of 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0`},
		{`"cniVersion":1`, seven, `cniVersion: 1 is not one of`},
		{`"name":7`, seven, `name: 7 is not a string`},
		{`"logLevel":"WARN"`, seven, `logLevel: "WARN" is not one of panic, fatal, error, warn, info, debug`},
		{`"logLevel":null`, seven, `logLevel: null is not one of`},
		{`"args":{"shunt.dev/agent":"shunt-node"}`, seven, `args.shunt.dev/agent: "shunt-node" is not a DaemonSet's "namespace/name"`},
		{`"args":{"shunt.dev/agent":7}`, seven, `args.shunt.dev/agent: 7 is not a DaemonSet's`},
		{`"runDir":"run/shunt"`, seven, `runDir: "run/shunt" is not an absolute path`},
		{`"runDir":"/run/../etc"`, seven, `runDir: "/run/../etc" is not an absolute path without .. in it`},
		{`"kubeconfig":""`, seven, `kubeconfig: "" is not an absolute path`},
		{`"bpfDir":true`, seven, `bpfDir: true is not an absolute path`},
		{`"bpfDir":"/a\u0000b"`, seven, `bpfDir: "/a\u0000b" is not`},
		{`"cgroupRoot":"x"`, seven, `cgroupRoot: "x" is not an absolute path`},
		{`"excludeNamespaces":"kube-system"`, seven, `excludeNamespaces: "kube-system" is not an array of strings`},
		{`"excludeNamespaces":null`, seven, `excludeNamespaces: null is not an array of strings`},
		{`"excludeNamespaces":["a",1]`, seven, `excludeNamespaces[1]: 1 is not a namespace name`},
		{`"excludeNamespaces":["Kube-System"]`, seven, `excludeNamespaces[0]: "Kube-System" is not a namespace name`},
		{`"excludeNamespaces":["a-"]`, seven, `excludeNamespaces[0]: "a-" is not`},
		{`"datapath":"bpf"`, seven, `datapath: "bpf" is not one of auto, ebpf, iptables`},
		{`"inboundHook":"TC"`, seven, `inboundHook: "TC" is not one of auto, sk_lookup, tc`},
		{`"iptablesBackend":"nftables"`, seven, `iptablesBackend: "nftables" is not one of auto, nft, legacy`},
		{`"includeInboundPortsDefault":"80"`, seven, `includeInboundPortsDefault: "80" is not one of containerPorts, *`},
		{`"nativeRuntimeClasses":["a..b"]`, seven, `nativeRuntimeClasses[0]: "a..b" is not a RuntimeClass name`},
		{`"podFactsTimeout":30`, seven, `podFactsTimeout: 30 is not a duration above 0 and at most 10m, such as "30s"`},
		{`"podFactsTimeout":"0s"`, seven, `podFactsTimeout: "0s" is not a duration`},
		{`"podFactsTimeout":"-1s"`, seven, `podFactsTimeout: "-1s" is not a duration`},
		{`"podFactsTimeout":"10m1s"`, seven, `podFactsTimeout: "10m1s" is not a duration`},
		{`"podFactsTimeout":"30"`, seven, `podFactsTimeout: "30" is not a duration`},
		{`"proxy":[]`, seven, `proxy: [] is not an object`},
		{`"proxy":null`, seven, `proxy: null is not an object`},
		{`"proxy":{"UID":1}`, seven, `"proxy.UID": 1: no such key: expected "proxy.uid"`},
		{`"proxy":{"user":1}`, seven, `"proxy.user": 1: no such key`},
		{`"proxy":{"uid":1,"uid":2}`, seven, `proxy.uid: 2: the key is given twice`},
		{`"proxy":{"uid":0}`, seven, `proxy.uid: 0 is not an integer from 1 to 4294967294`},
		{`"proxy":{"uid":-1}`, seven, `proxy.uid: -1 is not an integer`},
		{`"proxy":{"gid":4294967295}`, seven, `proxy.gid: 4294967295 is not an integer from 1 to 4294967294`},
		{`"proxy":{"uid":"1337"}`, seven, `proxy.uid: "1337" is not an integer`},
		{`"proxy":{"uid":1e3}`, seven, `proxy.uid: 1e3 is not an integer`},
		{`"proxy":{"containerName":""}`, seven, `proxy.containerName: "" is not a container name`},
		{`"proxy":{"outboundPort":0}`, seven, `proxy.outboundPort: 0 is not an integer from 1 to 65535`},
		{`"proxy":{"inboundPort":65536}`, seven, `proxy.inboundPort: 65536 is not an integer from 1 to 65535`},
		{`"proxy":{"tunnelPort":1.5}`, seven, `proxy.tunnelPort: 1.5 is not an integer`},
		{`"proxy":{"dnsPort":null}`, seven, `proxy.dnsPort: null is not an integer`},
		{`"proxy":{"inboundPort":15001}`, seven, `proxy.inboundPort: 15001 is not a port of its own: proxy.outboundPort has it too`},
		{`"proxy":{"excludeInboundPorts":"15020"}`, seven, `proxy.excludeInboundPorts: "15020" is not an array of ports`},
		{`"proxy":{"excludeInboundPorts":[15020,0]}`, seven, `proxy.excludeInboundPorts[1]: 0 is not an integer from 1 to 65535`},
		{`"capabilities":{"cgroupPath":"yes"}`, seven, `capabilities.cgroupPath: "yes" is not true or false`},
		{`"runtimeConfig":"x"`, seven, `runtimeConfig: "x" is not an object`},
		{`"runtimeConfig":{"cgroupPath":["x"]}`, seven, `runtimeConfig.cgroupPath: ["x"] is not a string`},
		{`"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"a":1}}`, seven, `runtimeConfig.io.kubernetes.cri.pod-annotations.a: 1 is not a string`},
		{`"runtimeConfig":{"io.kubernetes.cri.pod-annotations":"a"}`, seven, `pod-annotations: "a" is not an object`},
	} {
		in := tc.in
		if strings.HasPrefix(in, `"`) {
			in = `{"type":"shunt-cni",` + in + `}`
		}
		_, err := Parse([]byte(in))
		checkError(t, in, err, tc.code, tc.want)
	}
}

func checkError(t *testing.T, in string, err error, code uint, want string) {
	t.Helper()
	var e *types.Error
	switch {
	case err == nil:
		t.Errorf("%s: no error, want %q", in, want)
	case !errors.As(err, &e):
		t.Errorf("%s: error without a CNI code: %v", in, err)
	case e.Code != code || !strings.Contains(e.Msg, want):
		t.Errorf("%s:\n got code %d: %s\nwant code %d: … %s …", in, e.Code, e.Msg, code, want)
	}
}

// TestParseForRemoval: DEL works on what nobody would be set up by any more.
func TestParseForRemoval(t *testing.T) {
	for _, in := range []string{
		`{"type":"shunt-cni","runDir":"/x","bpfDir":"/y","ofAnotherRelease":1}`,
		`{"type":"shunt-cni","runDir":"/x","bpfDir":"/y","proxy":{"uid":-1},"podFactsTimeout":"soon"}`,
		`{"type":"shunt-cni","runDir":"/x","bpfDir":"/y","prevResult":"none","runtimeConfig":null}`,
		`{"type":"shunt-cni","runDir":"/x","bpfDir":"/y","proxy":{"inboundPort":15001}}`,
	} {
		c, err := ParseForRemoval([]byte(in))
		if err != nil {
			t.Errorf("%s: %v", in, err)
		} else if c.RunDir != "/x" || c.BPFDir != "/y" {
			t.Errorf("%s: got %+v", in, c)
		}
	}
	_, err := ParseForRemoval([]byte(`{"type":"shunt-cni","bpfDir":"y"}`))
	checkError(t, "bpfDir", err, types.ErrInvalidNetworkConfig, `bpfDir: "y" is not`)
	_, err = ParseForRemoval([]byte(`{`))
	checkError(t, "{", err, types.ErrDecodingFailure, "decode JSON")
}

func TestValidAttachments(t *testing.T) {
	one := []redirect.Attachment{{ContainerID: "a", IfName: "eth0"}}
	for _, tc := range []struct {
		in   string
		want []redirect.Attachment
		err  string
	}{
		{in: `"cni.dev/valid-attachments":[]`},
		{in: `"cni.dev/valid-attachments":null`},
		{in: `"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0","more":1}]`, want: one},
		{in: `"cni.dev/attachments":[{"containerID":"a","ifname":"eth0"}]`, want: one},
		{in: `"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],"cni.dev/attachments":null`, want: one},
		{in: `"name":"x"`, err: "cni.dev/valid-attachments is missing"},
		{in: `"cni.dev/valid-attachments":{}`, err: "cni.dev/valid-attachments: {} is not an array"},
		{in: `"cni.dev/valid-attachments":[{"containerID":"a"}]`, err: `cni.dev/valid-attachments[0]: {"containerID":"a"} is not an object with containerID and ifname`},
		{in: `"cni.dev/valid-attachments":[{"containerId":"a","ifname":"b"}]`, err: `cni.dev/valid-attachments[0]: `},
		{in: `"cni.dev/valid-attachments":[{"containerID":"","ifname":"b"}]`, err: `cni.dev/valid-attachments[0].containerID: "" is not`},
	} {
		c, err := Parse([]byte(`{"type":"shunt-cni",` + tc.in + `}`))
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.ValidAttachments()
		if tc.err != "" {
			checkError(t, tc.in, err, types.ErrInvalidNetworkConfig, tc.err)
			continue
		}
		if diff := cmp.Diff(tc.want, got); diff != "" || err != nil {
			t.Errorf("%s: error %v, (-want +got):\n%s", tc.in, err, diff)
		}
	}
}

func TestPrevAddrs(t *testing.T) {
	addrs := func(s ...string) (out []netip.Addr) {
		for _, a := range s {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	for _, tc := range []struct {
		name, in string
		want     []netip.Addr
		err      string
	}{
		{name: "none", in: `null`},
		{name: "empty", in: `{"cniVersion":"1.0.0"}`},
		{
			name: "bridge", in: `{"cniVersion":"1.0.0","interfaces":[{"name":"br0"},{"name":"veth1"},{"name":"eth0","sandbox":"/n"}],
				"ips":[{"address":"10.0.0.5/24","interface":2},{"address":"10.0.0.1/24","interface":0},{"address":"fd00::5/64","interface":2}]}`,
			want: addrs("10.0.0.5", "fd00::5"),
		},
		{name: "no interfaces", in: `{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.5/32"},{"address":"10.0.0.5/24"}]}`, want: addrs("10.0.0.5")},
		{name: "mapped", in: `{"cniVersion":"0.3.1","ips":[{"address":"::ffff:10.0.0.5/128"}]}`, want: addrs("10.0.0.5")},
		{name: "no version", in: `{"ips":[{"address":"10.0.0.5/32"}]}`, want: addrs("10.0.0.5")},
		{name: "a string", in: `"x"`, err: "parse prevResult: json: cannot unmarshal string"},
		{name: "an array", in: `[]`, err: "parse prevResult: "},
		{name: "ips", in: `{"ips":"10.0.0.1"}`, err: "parse prevResult: "},
		{name: "address", in: `{"ips":[{"address":"10.0.0.1"}]}`, err: `ips[0].address: "10.0.0.1" is not an address with its prefix length`},
		{name: "no address", in: `{"ips":[{}]}`, err: `ips[0].address: "" is not`},
		{name: "index", in: `{"interfaces":[{"sandbox":"/n"}],"ips":[{"address":"10.0.0.1/8","interface":1}]}`, err: "ips[0].interface: 1 is not the index of one of its 1 interfaces"},
		{name: "null for an address", in: `{"ips":[{"address":"10.0.0.1/8"},null]}`, err: "ips[1]: null is not an address"},
		{name: "null for an interface", in: `{"interfaces":[null],"ips":[{"address":"10.0.0.1/8","interface":0}]}`, err: "interfaces[0]: null is not an interface"},
		{name: "negative index", in: `{"ips":[{"address":"10.0.0.1/8","interface":-1}]}`, err: "ips[0].interface: -1"},
		{name: "old form", in: `{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.1/8"}}`, err: `cniVersion: "0.2.0" is not one of`},
		{name: "version of no meaning", in: `{"cniVersion":""}`, err: `cniVersion: "" is not one of`},
	} {
		c, err := Parse([]byte(`{"type":"shunt-cni","cniVersion":"1.0.0","prevResult":` + tc.in + `}`))
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.PrevAddrs()
		if tc.err != "" {
			checkError(t, tc.name, err, types.ErrDecodingFailure, tc.err)
			continue
		}
		if diff := cmp.Diff(tc.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" || err != nil {
			t.Errorf("%s: error %v, (-want +got):\n%s", tc.name, err, diff)
		}
	}
}

func TestResult(t *testing.T) {
	for _, tc := range []struct{ version, prev, want string }{
		{"1.1.0", ``, `{"cniVersion":"1.1.0"}`},
		{"0.3.0", `null`, `{"cniVersion":"0.3.0"}`},
		// Byte for byte: order, numbers, spacing, escapes, foreign keys.
		{"1.0.0", `{ "z":1.50, "cniVersion" : "1.0.0",` + "\n\t" + `"a":"<\u00e9>" }`, `{ "z":1.50, "cniVersion" : "1.0.0",` + "\n\t" + `"a":"<\u00e9>" }`},
		// Without a version it is of the one that it was passed in.
		{"1.0.0", `{ }`, `{"cniVersion":"1.0.0" }`},
		{"1.0.0", `{"ips":[] }`, `{"cniVersion":"1.0.0","ips":[] }`},
	} {
		in := `{"type":"shunt-cni","cniVersion":"` + tc.version + `"`
		if tc.prev != "" {
			in += `,"prevResult": ` + tc.prev
		}
		c, err := Parse([]byte(in + ` }`))
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.Result()
		if err != nil || string(got) != tc.want {
			t.Errorf("%s in %s:\n got %s, %v\nwant %s", tc.prev, tc.version, got, err, tc.want)
		}
	}
}

// TestResultConverted: a prevResult of another version is converted to the
// caller's, both ways.
func TestResultConverted(t *testing.T) {
	for _, tc := range []struct{ from, to string }{{"0.4.0", "1.0.0"}, {"1.1.0", "0.3.1"}, {"1.0.0", "1.1.0"}} {
		c, err := Parse([]byte(`{"type":"shunt-cni","cniVersion":"` + tc.to + `","prevResult":{"cniVersion":"` + tc.from +
			`","ips":[{"version":"4","address":"10.0.0.5/24"}]}}`))
		if err != nil {
			t.Fatal(err)
		}
		out, err := c.Result()
		if err != nil {
			t.Errorf("%v: %v", tc, err)
			continue
		}
		var got struct {
			CNIVersion string
			IPs        []struct{ Address string }
		}
		if err := json.Unmarshal(out, &got); err != nil || got.CNIVersion != tc.to || len(got.IPs) != 1 || got.IPs[0].Address != "10.0.0.5/24" {
			t.Errorf("%v: got %s, %v", tc, out, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte(`{"type":"shunt-cni","cniVersion":"1.1.0","prevResult":{"interfaces":[{"sandbox":"/n"}],"ips":[{"address":"10.0.0.1/8","interface":0}]}}`))
	f.Add([]byte(`{"type":"shunt-cni","cniVersion":"0.4.0","prevResult":{"cniVersion":"1.0.0","interfaces":[null],"routes":[null],"dns":null}}`))
	f.Add([]byte(`{"type":"shunt-cni","cniVersion":"1.0.0","prevResult":{"cniVersion":"0.4.0","ips":[null],"interfaces":[{}],"routes":[{"dst":"0.0.0.0/0"}]}}`))
	f.Add([]byte(`{"type":"shunt-cni","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`))
	f.Add([]byte(`{"type":"shunt-cni","proxy":{"uid":1,"uid":2}} x`))
	f.Fuzz(func(t *testing.T, data []byte) {
		coded := func(err error) {
			var e *types.Error
			if !errors.As(err, &e) || e.Code != types.ErrDecodingFailure && e.Code != types.ErrInvalidNetworkConfig {
				t.Errorf("error without its CNI code: %v", err)
			}
		}
		c, err := Parse(data)
		if (err == nil) && !json.Valid(data) {
			t.Error("takes what is not JSON")
		}
		if err != nil {
			coded(err)
			if c, err := ParseForRemoval(data); err != nil {
				coded(err)
			} else if !strings.HasPrefix(c.BPFDir, "/") {
				t.Errorf("bpfDir %q", c.BPFDir)
			}
			return
		}
		if _, err := ParseForRemoval(data); err != nil {
			t.Errorf("DEL fails where ADD would not: %v", err)
		}
		if _, err := c.ValidAttachments(); err != nil {
			coded(err)
		}
		addrs, err := c.PrevAddrs()
		if err != nil {
			coded(err)
			return
		}
		for _, a := range addrs {
			if !a.IsValid() || a.Is4In6() {
				t.Errorf("address %v", a)
			}
		}
		if out, err := c.Result(); err != nil {
			coded(err)
		} else if !json.Valid(out) {
			t.Errorf("result is not JSON: %s", out)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	for b.Loop() {
		if _, err := Parse([]byte(full)); err != nil {
			b.Fatal(err)
		}
	}
}
