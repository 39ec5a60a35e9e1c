{{- define "kvferry.name" -}}
{{- if contains "kvferry" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-kvferry" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Of (dict "root" $ "part" "gateway"). */}}
{{- define "kvferry.selector" -}}
app.kubernetes.io/name: kvferry
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "kvferry.labels" -}}
{{ include "kvferry.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "kvferry.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ index $image .name }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* Every directory's own address: services go to another when one is away. */}}
{{- define "kvferry.directories" -}}
{{- $name := include "kvferry.name" . -}}
{{- $addresses := list -}}
{{- range $i := until (int .Values.directory.replicas) -}}
{{- $addresses = append $addresses (printf "%s-directory-%d.%s-directory.%s.svc.%s:8472" $name $i $name $.Release.Namespace $.Values.clusterDomain) -}}
{{- end -}}
{{ join "," $addresses }}
{{- end }}

{{/* Flags of (a map of options). */}}
{{- define "kvferry.flags" -}}
{{- range $key, $value := . }}
{{- $flag := $key | replace "_" "-" }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $flag | quote }}
{{- else if kindIs "slice" $value }}
- {{ printf "--%s=%s" $flag (join "," $value) | quote }}
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) }}
- {{ printf "--%s=%d" $flag (int64 $value) | quote }}
{{- else }}
- {{ printf "--%s=%v" $flag $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kvferry.tlsSecret" -}}
{{- if eq .root.Values.tls.mode "certManager" }}{{ include "kvferry.name" .root }}-{{ .role }}-tls
{{- else }}{{ index .root.Values.tls.secrets .role | required (printf "tls.secrets.%s must name a Secret with tls.crt, tls.key and ca.crt (or choose another tls.mode)" .role) }}{{ end }}
{{- end }}

{{- define "kvferry.tlsFlags" -}}
{{- if eq .Values.tls.mode "none" }}
- "--insecure"
{{- else }}
- "--tls-cert=/etc/kvferry/tls/tls.crt"
- "--tls-key=/etc/kvferry/tls/tls.key"
- "--tls-ca=/etc/kvferry/tls/ca.crt"
{{- end }}
{{- end }}

{{/* The folder, not its files one by one: only so does Kubernetes bring renewed ones in. */}}
{{- define "kvferry.tlsMount" -}}
{{- if ne .Values.tls.mode "none" }}
- {name: tls, mountPath: /etc/kvferry/tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "kvferry.tlsVolume" -}}
{{- if ne .root.Values.tls.mode "none" }}
- name: tls
  secret: {secretName: {{ include "kvferry.tlsSecret" . | quote }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{/* "live" says that the process works; "" that it can be given work, which one that drains or waits for others cannot.
     Only the former may end it. */}}
{{- define "kvferry.probes" -}}
ports:
{{- range .ports }}
  - {{ toJson . }}
{{- end }}
  - {name: health, containerPort: 9471}
startupProbe:
  grpc: {port: 9471, service: live}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .startSeconds) 4) 5 }}
livenessProbe:
  grpc: {port: 9471, service: live}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: 9471}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}

{{- define "kvferry.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What is written at run time: caches, temporary files, and home, for users that no image knows. */}}
{{- define "kvferry.env" -}}
- {name: HOME, value: /cache}
- {name: TMPDIR, value: /tmp}
- {name: HF_HOME, value: /cache/huggingface}
{{- with .token }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: token}}
{{- end }}
{{- with .extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kvferry.pod" -}}
serviceAccountName: {{ include "kvferry.name" .root }}
automountServiceAccountToken: false
# Or Kubernetes would set KVFERRY_..._PORT for each Service, which are names of options.
enableServiceLinks: false
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with .own.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .own.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
