// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/cni/whole"
	"shunt.dev/shunt/internal/handover"
	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/testbed"
)

// asPlugin makes the test binary behave as the plugin: as either executable, by the
// name that it was started by.
const asPlugin = "SHUNT_CNI_TEST_AS_PLUGIN"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asPlugin) == "":
		testbed.Main(m)
	case filepath.Base(os.Args[0]) != handover.Larger:
		MainSmall("test")
	default:
		if len(os.Args) != 3 || os.Args[1] != handover.Verb {
			panic(fmt.Sprintf("called %q", os.Args))
		}
		if log := os.Getenv(handedLog); log != "" {
			if err := os.WriteFile(log, []byte(os.Args[2]), 0o600); err != nil {
				panic(err)
			}
		}
		Main(Options{
			Version: "test", CheckKubeconfig: kubeapi.CheckConfig,
			Facts: func(conf *netconf.Config, log *slog.Logger) FactsSource {
				return whole.Facts(conf, log, "test", os.Args[2] == string(handover.HungAgent))
			},
			Backends: func(conf *netconf.Config, log *slog.Logger) Node { return whole.Backends(conf, log, os.Getenv("PATH")) },
		})
	}
}

// handedLog names a file for the reason of the request that was handed over.
const handedLog = "SHUNT_CNI_TEST_HANDED"

// binDir gives a directory in which the test binary lies as both executables.
func binDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"shunt-cni", handover.Larger} {
		if err := os.Link(exe, filepath.Join(dir, name)); err == nil {
			continue
		}
		data, err := os.ReadFile(exe) // on another file system
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o755) //nolint:gosec // it is executed
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// run runs the plugin as a process.
func run(t *testing.T, stdin string, env ...string) (stdout string, exit int) {
	t.Helper()
	return runIn(t, binDir(t), stdin, env...)
}

// runIn is run with a directory of executables.
func runIn(t *testing.T, dir, stdin string, env ...string) (stdout string, exit int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "shunt-cni"))
	// A test binary with the race detector would rest for a second at exit.
	cmd.Env = append(env, asPlugin+"=1", "GORACE=atexit_sleep_ms=0")
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout = &out
	err := cmd.Run()
	var code *exec.ExitError
	if err != nil && !errors.As(err, &code) {
		t.Fatal(err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

func attachment(command, args string) []string {
	return []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=c1", "CNI_NETNS=/none/such", "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin", "CNI_ARGS=" + args,
	}
}

func TestProcessVersion(t *testing.T) {
	out, exit := run(t, "", "CNI_COMMAND=VERSION")
	var got struct {
		CNIVersion        string
		SupportedVersions []string
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || exit != 0 {
		t.Fatalf("exit %d: %s", exit, out)
	}
	if diff := cmp.Diff([]string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}, got.SupportedVersions); diff != "" {
		t.Errorf("versions (-want +got):\n%s", diff)
	}
	if out, exit := run(t, ""); out != "" || exit != 0 {
		t.Errorf("without a command: exit %d, printed %s", exit, out)
	}
}

// TestProcessSkip: a pod of an excluded namespace, in every version, with a
// netns, a kubeconfig and directories that are not there.
func TestProcessSkip(t *testing.T) {
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		stdin := `{"type":"shunt-cni","name":"n","cniVersion":"` + version + `","runDir":"/none/run","bpfDir":"/none/bpf",` + prevOf(version) + `}`
		out, exit := run(t, stdin, attachment("ADD", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=p")...)
		if out != prevBytes(version) || exit != 0 {
			t.Errorf("%s: exit %d, printed %s", version, exit, out)
		}
	}
}

// TestProcessErrors: one error object on standard output, nothing else.
func TestProcessErrors(t *testing.T) {
	const conf = `{"type":"shunt-cni","name":"n","cniVersion":"1.1.0","runDir":"/none/run","bpfDir":"/none/bpf"}`
	pod := "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u"
	for _, tc := range []struct {
		name, stdin string
		env         []string
		code        uint
		want        string
	}{
		{"not JSON", `{`, attachment("ADD", pod), 6, ""},
		{"trailing", conf + `x`, attachment("ADD", pod), 6, ""},
		{"old version", strings.Replace(conf, "1.1.0", "0.2.0", 1), attachment("ADD", pod), 1, "incompatible"},
		{"unknown key", strings.Replace(conf, "bpfDir", "bpfdir", 1), attachment("ADD", pod), 7, `expected "bpfDir"`},
		{"no kubeconfig", strings.Replace(conf, "{", `{"podFactsTimeout":"500ms",`, 1), attachment("ADD", pod), 11, "read kubeconfig /none/run/kubeconfig: open /none/run/kubeconfig: no such file"},
		{"container id", conf, append(attachment("ADD", pod), "CNI_CONTAINERID=../x"), 4, "containerID"},
		{"interface", conf, append(attachment("ADD", pod), "CNI_IFNAME=a/b"), 4, "interface name"},
		{"no netns", conf, append(attachment("ADD", pod), "CNI_NETNS="), 4, "CNI_NETNS"},
		{"command", conf, attachment("UPDATE", pod), 4, "UPDATE"},
		{"GC without a list", conf, []string{"CNI_COMMAND=GC", "CNI_PATH=/x"}, 7, "cni.dev/valid-attachments is missing"},
		{"STATUS", strings.Replace(conf, "{", `{"datapath":"ebpf","cgroupRoot":"/proc",`, 1), []string{"CNI_COMMAND=STATUS", "CNI_PATH=/x"}, 50, "no cgroup2: cgroupRoot: /proc"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			start := time.Now()
			out, exit := run(t, tc.stdin, tc.env...)
			var got struct {
				Code uint
				Msg  string
			}
			if err := json.Unmarshal([]byte(out), &got); err != nil || exit != 1 || got.Code != tc.code || !strings.Contains(got.Msg, tc.want) {
				t.Errorf("exit %d, printed %s (%v)\nwant code %d: %s", exit, out, err, tc.code, tc.want)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// TestProcessDel: there is nothing to do, and that is no error.
func TestProcessDel(t *testing.T) {
	dir := t.TempDir()
	stdin := `{"type":"shunt-cni","name":"n","cniVersion":"1.1.0","runDir":"` + dir + `/run","bpfDir":"` + dir + `/bpf"}`
	if out, exit := run(t, stdin, append(attachment("DEL", ""), "CNI_NETNS=")...); out != "" || exit != 0 {
		t.Errorf("exit %d, printed %s", exit, out)
	}
}

// TestAbout: who runs the plugin by hand is told what it is, and what to run.
func TestAbout(t *testing.T) {
	for _, want := range []string{"shunt-cni v1", "container runtime", "run shunt."} {
		if !strings.Contains(about("v1"), want) {
			t.Errorf("%q lacks %q", about("v1"), want)
		}
	}
}
