{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{/*
The name of every object. It is not for the release to choose: two agents on a
node would fight, and the plugin knows its own pod by the DaemonSet's name.
*/}}
{{- define "shunt.name" -}}
shunt-node
{{- end }}

{{- define "shunt.selectorLabels" -}}
app.kubernetes.io/name: shunt
app.kubernetes.io/component: node
{{- end }}

{{- define "shunt.labels" -}}
{{ include "shunt.selectorLabels" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "shunt.metadata" -}}
name: {{ include "shunt.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "shunt.labels" . | nindent 2 }}
{{- end }}

{{/* Of what is there to be seen; labels are further ones. */}}
{{- define "shunt.monitoringMetadata" -}}
name: {{ include "shunt.name" .root }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "shunt.labels" .root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "shunt.clusterMetadata" -}}
name: {{ include "shunt.name" . }}
labels:
  {{- include "shunt.labels" . | nindent 2 }}
{{- end }}

{{- define "shunt.image" -}}
{{- $tag := .tag | default .root.Values.tag | default .root.Chart.AppVersion -}}
{{ .hub | default .root.Values.hub }}/shunt-node:{{ $tag }}
{{- end }}

{{/*
What depends on the platform, as YAML: the operator's value, else the
platform's, else the default. Names as in files/platforms.yaml.
*/}}
{{- define "shunt.settings" -}}
{{- $platforms := .Files.Get "files/platforms.yaml" | fromYaml -}}
{{- $s := $platforms.default -}}
{{- if .Values.platform -}}
{{- $s = mergeOverwrite $s (get $platforms .Values.platform) -}}
{{- end -}}
{{- $own := dict
    "cniBinDir" .Values.cniBinDir
    "cniConfDir" .Values.cniConfDir
    "cniCacheDir" .Values.cniCacheDir
    "cniConfFileName" .Values.cniConfFileName
    "seccompProfile" .Values.seccompProfile
    "seLinuxOptions" .Values.seLinuxOptions
    "repair.criSocket" .Values.repair.criSocket
    "repair.netnsDir" .Values.repair.netnsDir -}}
{{- range $key, $value := $own -}}
{{- if $value -}}
{{- $_ := set $s $key $value -}}
{{- end -}}
{{- end -}}
{{- if not (kindIs "invalid" .Values.chained) -}}
{{- $_ := set $s "chained" .Values.chained -}}
{{- end -}}
{{- if and (not $s.chained) (not $s.cniConfFileName) -}}
{{- fail "cniConfFileName is empty: with chained=false, expected the name of the file to write, such as shunt-cni.conf" -}}
{{- end -}}
{{ $s | toYaml }}
{{- end }}

{{/*
The plugin's network configuration: the entry that the agent puts into the
chain. Alone in a file, it needs a name and a version of its own.
*/}}
{{- define "shunt.netconf" -}}
{{- $s := include "shunt.settings" . | fromYaml -}}
{{- $ports := dict -}}
{{- range $key := list "outboundPort" "inboundPort" "tunnelPort" "dnsPort" -}}
{{- $port := get $.Values.proxy $key | toString -}}
{{- if hasKey $ports $port -}}
{{- fail (printf "proxy.%s: %s is not a port of its own: proxy.%s has it too" $key $port (get $ports $port)) -}}
{{- end -}}
{{- $_ := set $ports $port $key -}}
{{- end -}}
{{- $entry := dict
    "type" "shunt-cni"
    "capabilities" (dict "cgroupPath" true "io.kubernetes.cri.pod-annotations" true)
    "logLevel" .Values.logLevel
    "runDir" .Values.runDir
    "bpfDir" .Values.bpfDir
    "cgroupRoot" .Values.cgroupRoot
    "excludeNamespaces" .Values.excludeNamespaces
    "datapath" .Values.datapath
    "inboundHook" .Values.inboundHook
    "iptablesBackend" .Values.iptablesBackend
    "includeInboundPortsDefault" .Values.includeInboundPortsDefault
    "nativeRuntimeClasses" .Values.nativeRuntimeClasses
    "podFactsTimeout" .Values.podFactsTimeout
    "proxy" .Values.proxy -}}
{{- if not $s.chained -}}
{{- $entry = merge (dict "name" "shunt-cni" "cniVersion" "1.0.0") $entry -}}
{{- end -}}
{{ $entry | toPrettyJson }}
{{- end }}

{{/* Where bpffs is mounted, so that a mount of it is seen in the containers. */}}
{{- define "shunt.bpffs" -}}
{{- if hasPrefix "/sys/fs/bpf/" .Values.bpfDir }}/sys/fs/bpf{{ else }}{{ dir .Values.bpfDir }}{{ end }}
{{- end }}

{{/* Whether pods are entered to be mended: only that needs more than the API server. */}}
{{- define "shunt.mends" -}}
{{ and .Values.repair.enabled .Values.repair.repairPods }}
{{- end }}

{{/* The capabilities of each container; docs/OPERATIONS.md says what for. */}}
{{- define "shunt.agentNeeds" -}}
[BPF, NET_ADMIN, PERFMON]
{{- end }}

{{- define "shunt.repairNeeds" -}}
{{- if eq (include "shunt.mends" .) "true" -}}
[DAC_READ_SEARCH, NET_ADMIN, NET_RAW, SYS_ADMIN, SYS_PTRACE]
{{- else -}}
[]
{{- end -}}
{{- end }}

{{- define "shunt.allNeeds" -}}
{{- $needs := include "shunt.agentNeeds" . | fromYamlArray -}}
{{- if .Values.repair.enabled -}}
{{- $needs = concat $needs (include "shunt.repairNeeds" . | fromYamlArray) -}}
{{- end -}}
{{ $needs | uniq | sortAlpha | toYaml }}
{{- end }}

{{- define "shunt.securityContext" -}}
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsUser: 0
runAsGroup: 0
runAsNonRoot: false
capabilities:
  drop: [ALL]
  {{- with concat .needed .root.Values.extraCapabilities | uniq }}
  add:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "shunt.env" -}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- end }}

{{/* Readiness waits for the node; liveness only for the process. */}}
{{- define "shunt.probes" -}}
livenessProbe:
  httpGet: {path: /healthz, port: health}
  initialDelaySeconds: 10
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}

{{/* Where cgroup2 is: on a hybrid host below /sys/fs/cgroup. */}}
{{- define "shunt.cgroupMount" -}}
{{- $root := .Values.cgroupRoot | default "/sys/fs/cgroup" -}}
{{- if hasPrefix "/sys/fs/cgroup/" $root }}/sys/fs/cgroup{{ else }}{{ $root }}{{ end }}
{{- end }}

{{/* Each at its place on the host: the configuration has the same paths for all. */}}
{{- define "shunt.datapathMounts" -}}
- {name: run, mountPath: {{ .Values.runDir }}}
- {name: bpffs, mountPath: {{ include "shunt.bpffs" . }}, mountPropagation: HostToContainer}
{{- end }}

{{- define "shunt.podAnnotations" -}}
{{- $a := dict -}}
{{- if .Values.prometheus.scrape -}}
{{- $_ := set $a "prometheus.io/scrape" "true" -}}
{{- $_ := set $a "prometheus.io/port" "15014" -}}
{{- $_ := set $a "prometheus.io/path" "/metrics" -}}
{{- end -}}
{{- /* Before 1.30 there is no field for it. */ -}}
{{- if and .Values.appArmorProfile (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) -}}
{{- $profile := "unconfined" -}}
{{- if eq .Values.appArmorProfile.type "RuntimeDefault" }}{{ $profile = "runtime/default" }}{{ end -}}
{{- if eq .Values.appArmorProfile.type "Localhost" }}{{ $profile = printf "localhost/%s" .Values.appArmorProfile.localhostProfile }}{{ end -}}
{{- range $name := ternary (list "agent" "repair") (list "agent") .Values.repair.enabled -}}
{{- $_ := set $a (printf "container.apparmor.security.beta.kubernetes.io/%s" $name) $profile -}}
{{- end -}}
{{- end -}}
{{- with mergeOverwrite $a .Values.podAnnotations -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end }}
