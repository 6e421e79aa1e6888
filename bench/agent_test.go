// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/podcache"
	"shunt.dev/shunt/internal/podfacts"
	"shunt.dev/shunt/internal/testbed"
)

// client returns a clientset as the agent's: without a limit of requests.
func client(kubeconfig []byte) (kubernetes.Interface, error) {
	config, err := clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS = -1
	return kubernetes.NewForConfig(config)
}

// An agent is the node agent's pod cache, in this process.
type agent struct {
	api    *fakekube.Server
	cache  *podcache.Cache
	socket string
}

func newAgent(b *testing.B, runDir string) *agent {
	b.Helper()
	a := &agent{api: fakekube.Start(b), socket: podcache.SocketPath(runDir)}
	c, err := client(a.api.Kubeconfig(a.api.Token()))
	if err != nil {
		b.Fatal(err)
	}
	a.cache = podcache.New(podcache.Options{Client: c, Node: "node-1", RunDir: runDir})
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- a.cache.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Errorf("agent: %v", err)
		}
	})
	testbed.Eventually(b, "the agent is ready", a.cache.Synced)
	return a
}

// set lets the agent know a pod.
func (a *agent) set(b *testing.B, p *testbed.Pod, mutators ...testbed.PodMutator) {
	b.Helper()
	if err := a.api.SetJSON(p.Injected(mutators...)); err != nil {
		b.Fatal(err)
	}
	testbed.Eventually(b, "the agent knows the pod", func() bool {
		for _, k := range a.cache.Pods() {
			if string(k.UID) == p.UID {
				return true
			}
		}
		return false
	})
}

func rename(b *testing.B, from, to string) {
	b.Helper()
	if err := os.Rename(from, to); err != nil {
		b.Fatal(err)
	}
}

// asAgent makes the test binary a process that has a pod cache and nothing
// else; it names the directory with the kubeconfig, where the socket comes too.
const asAgent = "SHUNT_BENCH_AS_AGENT"

// runAgent answers each line of standard input by its heap, in bytes.
func runAgent() error {
	dir := os.Getenv(asAgent)
	kubeconfig, err := os.ReadFile(filepath.Join(dir, "kubeconfig"))
	if err != nil {
		return err
	}
	c, err := client(kubeconfig)
	if err != nil {
		return err
	}
	cache := podcache.New(podcache.Options{Client: c, Node: "node-1", RunDir: filepath.Join(dir, "run")})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- cache.Run(ctx) }()
	if !testbed.Poll(5*time.Minute, cache.Synced) {
		return errors.New("not filled in five minutes")
	}
	fmt.Println(len(cache.Pods()))
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		fmt.Println(m.HeapAlloc)
	}
	cancel()
	return <-done
}

// injectedPod is a pod as a mesh's API server has it: about 16 KiB in JSON.
func injectedPod(i int) *corev1.Pod {
	name := fmt.Sprintf("reviews-v%d-7f99cc4496-%05d", i%50, i)
	uid := types.UID(fmt.Sprintf("6c5a0f1e-2b7d-4c3a-9e8f-%012d", i))
	id := func(what string) string { return fmt.Sprintf("containerd://%s%064d", what, i)[:77] }
	now := metav1.NewTime(time.Unix(1_700_000_000+int64(i), 0))
	user, yes, no, port := int64(1337), true, false, int32(15021)
	quantity := corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("128Mi")}
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: fmt.Sprintf("team-%d", i%20), Name: name, UID: uid, GenerateName: name[:len(name)-5], CreationTimestamp: now,
			Labels: map[string]string{
				"app": "reviews", "version": "v1", "pod-template-hash": "7f99cc4496", "security.istio.io/tlsMode": "istio",
				"service.istio.io/canonical-name": "reviews", "service.istio.io/canonical-revision": "v1",
			},
			Annotations: map[string]string{
				"kubectl.kubernetes.io/default-container":      "reviews",
				"kubectl.kubernetes.io/default-logs-container": "reviews",
				"prometheus.io/path":                           "/stats/prometheus", "prometheus.io/port": "15020", "prometheus.io/scrape": "true",
				"sidecar.istio.io/status":      `{"initContainers":["istio-validation"],"containers":["istio-proxy"],"volumes":["workload-socket","credential-socket","workload-certs","istio-envoy","istio-data","istio-podinfo","istio-token","istiod-ca-cert"],"imagePullSecrets":null,"revision":"default"}`,
				"cni.projectcalico.org/podIP":  fmt.Sprintf("10.244.%d.%d/32", i/250, i%250),
				"cni.projectcalico.org/podIPs": fmt.Sprintf("10.244.%d.%d/32", i/250, i%250),
			},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: name[:len(name)-6], UID: uid, Controller: &yes, BlockOwnerDeletion: &yes}},
			ManagedFields: []metav1.ManagedFieldsEntry{
				{Manager: "kube-controller-manager", Operation: "Update", APIVersion: "v1", FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:annotations":{` + strings.Repeat(`"f:x.y.z/name":{},`, 120) + `".":{}}}}`)},
				{Manager: "kubelet", Operation: "Update", APIVersion: "v1", FieldsType: "FieldsV1", Subresource: "status", FieldsV1: metav1.NewFieldsV1(`{"f:status":{"f:conditions":{` + strings.Repeat(`"k:{\"type\":\"Ready\"}":{".":{}},`, 60) + `".":{}}}}`)},
			},
		},
		Spec: corev1.PodSpec{
			NodeName: "node-1", ServiceAccountName: "bookinfo-reviews", RestartPolicy: corev1.RestartPolicyAlways, SchedulerName: "default-scheduler",
			InitContainers: []corev1.Container{{
				Name: "istio-validation", Image: "docker.io/istio/proxyv2:1.27.0", Resources: corev1.ResourceRequirements{Requests: quantity, Limits: quantity},
				Args: strings.Fields("istio-iptables -p 15001 -z 15006 -u 1337 -m REDIRECT -i * -x -b * -d 15090,15021,15020 --log_output_level=default:info --run-validation --skip-rule-apply"),
			}},
			Containers: []corev1.Container{
				{
					Name: "reviews", Image: "docker.io/istio/examples-bookinfo-reviews-v1:1.20.3", Resources: corev1.ResourceRequirements{Requests: quantity},
					Ports: []corev1.ContainerPort{{ContainerPort: 9080, Protocol: corev1.ProtocolTCP}},
				},
				{
					Name: "istio-proxy", Image: "docker.io/istio/proxyv2:1.27.0", Resources: corev1.ResourceRequirements{Requests: quantity, Limits: quantity},
					Args:            strings.Fields("proxy sidecar --domain $(POD_NAMESPACE).svc.cluster.local --proxyLogLevel=warning --proxyComponentLogLevel=misc:error --log_output_level=default:info"),
					Ports:           []corev1.ContainerPort{{Name: "http-envoy-prom", ContainerPort: 15090, Protocol: corev1.ProtocolTCP}},
					SecurityContext: &corev1.SecurityContext{RunAsUser: &user, RunAsGroup: &user, RunAsNonRoot: &yes, Privileged: &no, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}},
					ReadinessProbe:  &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz/ready"}}, PeriodSeconds: port},
				},
			},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, HostIP: "192.0.2.1", PodIP: fmt.Sprintf("10.244.%d.%d", i/250, i%250),
			PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.244.%d.%d", i/250, i%250)}}, StartTime: &now, QOSClass: corev1.PodQOSBurstable,
		},
	}
	proxy := &p.Spec.Containers[1]
	for _, env := range []string{
		"PILOT_CERT_PROVIDER=istiod", "CA_ADDR=istiod.istio-system.svc:15012", "POD_NAME=", "POD_NAMESPACE=", "INSTANCE_IP=", "SERVICE_ACCOUNT=", "HOST_IP=",
		"ISTIO_CPU_LIMIT=", `PROXY_CONFIG={"discoveryAddress":"istiod.istio-system.svc:15012","tracing":{"zipkin":{"address":"zipkin.istio-system:9411"}}}`,
		`ISTIO_META_POD_PORTS=[{"containerPort":9080,"protocol":"TCP"}]`, "ISTIO_META_APP_CONTAINERS=reviews", "GOMEMLIMIT=", "GOMAXPROCS=",
		"ISTIO_META_CLUSTER_ID=Kubernetes", "ISTIO_META_NODE_NAME=", "ISTIO_META_INTERCEPTION_MODE=REDIRECT", "ISTIO_META_WORKLOAD_NAME=reviews-v1",
		"ISTIO_META_OWNER=kubernetes://apis/apps/v1/namespaces/default/deployments/reviews-v1", "ISTIO_META_MESH_ID=cluster.local", "TRUST_DOMAIN=cluster.local",
	} {
		key, value, _ := strings.Cut(env, "=")
		e := corev1.EnvVar{Name: key, Value: value}
		if value == "" {
			e.ValueFrom = &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.name"}}
		}
		proxy.Env = append(proxy.Env, e)
	}
	for _, v := range strings.Fields("workload-socket credential-socket workload-certs istio-envoy istio-data istio-podinfo istio-token istiod-ca-cert kube-api-access-x2x4z") {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: v, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
		for c := range p.Spec.Containers {
			p.Spec.Containers[c].VolumeMounts = append(p.Spec.Containers[c].VolumeMounts, corev1.VolumeMount{Name: v, MountPath: "/var/run/secrets/" + v, ReadOnly: true})
		}
	}
	for _, c := range []corev1.PodConditionType{"PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"} {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: c, Status: "True", LastTransitionTime: now})
	}
	for _, c := range p.Spec.Containers {
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{
			Name: c.Name, Ready: true, Started: &yes, Image: c.Image, ImageID: c.Image + "@sha256:" + strings.Repeat("0", 64), ContainerID: id(c.Name[:1]),
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}},
		})
	}
	p.Status.InitContainerStatuses = []corev1.ContainerStatus{{
		Name: "istio-validation", Ready: true, Image: "docker.io/istio/proxyv2:1.27.0", ContainerID: id("i"),
		State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Completed", StartedAt: now, FinishedAt: now, ContainerID: id("i")}},
	}}
	return p
}

var rss = regexp.MustCompile(`(VmRSS|VmHWM):\s+(\d+) kB`)

// BenchmarkAgentPods measures a process that has nothing but the pod cache: its
// memory with so many pods on its node, and how long the plugin's client waits
// for an answer, one at a time and 250 at once.
func BenchmarkAgentPods(b *testing.B) {
	for _, pods := range []int{0, 250, 10_000} {
		b.Run(strconv.Itoa(pods), func(b *testing.B) { benchmarkAgent(b, pods) })
	}
}

func benchmarkAgent(b *testing.B, pods int) {
	dir := b.TempDir()
	api := fakekube.Start(b)
	api.WriteKubeconfig(b, dir)
	for i := range pods {
		api.Set(injectedPod(i))
	}
	cmd := exec.CommandContext(b.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asAgent+"="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			b.Errorf("agent: %v", err)
		}
	}()
	lines := bufio.NewScanner(out)
	line := func() float64 {
		if !lines.Scan() {
			b.Fatal("the agent has ended")
		}
		n, err := strconv.Atoi(lines.Text())
		if err != nil {
			b.Fatal(err)
		}
		return float64(n)
	}
	if got := line(); int(got) != pods {
		b.Fatalf("the agent has %v pods", got)
	}
	filled := time.Since(start)
	status := func() map[string]float64 {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		m := map[string]float64{}
		for _, x := range rss.FindAllSubmatch(data, -1) {
			n, _ := strconv.Atoi(string(x[2])) // digits
			m[string(x[1])] = float64(n) / 1024
		}
		return m
	}
	atFirst := status()

	a := podfacts.NewAgent(filepath.Join(dir, "run"))
	ask := func() time.Duration {
		p := injectedPod(rand.N(max(pods, 1)))
		start := time.Now()
		got, err := a.Pod(b.Context(), p.Namespace, p.Name, string(p.UID))
		took := time.Since(start)
		if pods > 0 && (err != nil || got.UID != string(p.UID)) {
			b.Errorf("asked for %s: %+v, %v", p.UID, got, err)
		}
		return took
	}
	var one, many samples
	if pods > 0 {
		for b.Loop() {
			for range 20 {
				one = append(one, ask())
			}
			const askers = 250
			took := make(samples, askers)
			var wg sync.WaitGroup
			for i := range askers {
				wg.Go(func() { took[i] = ask() })
			}
			wg.Wait()
			many = append(many, took...)
		}
		b.ReportMetric(float64(one.median().Microseconds()), "answer-µs")
		b.ReportMetric(float64(one.quantile(0.99).Microseconds()), "answer-p99-µs")
		b.ReportMetric(float64(many.median().Microseconds()), "answer-of-250-µs")
		b.ReportMetric(float64(many.quantile(0.99).Microseconds()), "answer-of-250-p99-µs")
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(line()/(1<<20), "heap-MiB")
	after := status()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(filled.Milliseconds()), "filled-ms")
	b.ReportMetric(atFirst["VmRSS"], "RSS-filled-MiB")
	b.ReportMetric(after["VmRSS"], "RSS-MiB")
	b.ReportMetric(after["VmHWM"], "RSS-peak-MiB")
}
