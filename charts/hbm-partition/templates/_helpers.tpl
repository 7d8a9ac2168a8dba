{{/* Prefix of all names. 30 characters, so that the longest suffix stays below 63. */}}
{{- define "hbm.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else if contains "hbm" .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-hbm" (.Release.Name | trunc 26 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{/* What a component's pods are selected by; never changes. Takes {root, component}. */}}
{{- define "hbm.selectorLabels" -}}
app.kubernetes.io/name: hbm-partition
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of a pod: without the chart's version, so that a new chart alone restarts nothing. */}}
{{- define "hbm.podLabels" -}}
{{ include "hbm.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: hbm-partition
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of an object. Takes {root, component}. */}}
{{- define "hbm.labels" -}}
{{ include "hbm.podLabels" . }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* Full name of an image. Takes {root, image}. */}}
{{- define "hbm.image" -}}
{{- $prefix := ternary "" (printf "%s/" .root.Values.image.registry) (empty .root.Values.image.registry) -}}
{{- if .image.digest -}}
{{- printf "%s%s@%s" $prefix .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s%s:%s" $prefix .image.repository (.root.Values.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Pod Security "restricted", pod and container. */}}
{{- define "hbm.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "hbm.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Placement by value. Takes {root, values, tolerations}: the last are the chart's own. */}}
{{- define "hbm.placement" -}}
{{- with .root.Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat (.tolerations | default list) .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Replicas apart from each other, where that is possible. Takes a selector as YAML. */}}
{{- define "hbm.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- $.selector | nindent 8 }}
  {{- end }}
{{- end -}}

{{/* Pod template's annotations and labels. Takes {root, component, values}. */}}
{{- define "hbm.podMetadata" -}}
labels:
  {{- include "hbm.podLabels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Secret that holds the webhook's certificate. */}}
{{- define "hbm.tlsSecret" -}}
{{- if eq .Values.webhook.certificates.mode "given" -}}
{{- .Values.webhook.certificates.given.secretName -}}
{{- else -}}
{{- printf "%s-webhook-tls" (include "hbm.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* The routes with the defaults filled in: {"routes": [...]} as JSON. */}}
{{- define "hbm.routes" -}}
{{- $routes := list -}}
{{- $names := list -}}
{{- range .Values.routes -}}
{{- if has .name $names -}}
{{- fail (printf "routes: %q is there twice; each route needs a name of its own" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $routes = append $routes (mergeOverwrite (deepCopy $.Values.router) (deepCopy .)) -}}
{{- end -}}
{{- dict "routes" $routes | toJson -}}
{{- end -}}

{{/* Namespaces of routes, each once: {"namespaces": [...]} as JSON. */}}
{{- define "hbm.routeNamespaces" -}}
{{- $names := list -}}
{{- range .Values.routes -}}
{{- $names = append $names .namespace -}}
{{- end -}}
{{- dict "namespaces" ($names | uniq | sortAlpha) | toJson -}}
{{- end -}}
