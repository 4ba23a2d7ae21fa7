{{- define "bdh-batch.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "bdh-batch.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "bdh-batch.labels" -}}
{{ include "bdh-batch.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "bdh-batch.config" -}}
{{- $keys := dict }}
{{- if .Values.keysSecret }}
{{- $keys = dict "auth" (dict "enabled" true "api_keys_file" "/etc/bdh-batch-keys/keys") }}
{{- end }}
{{- toYaml (mustMergeOverwrite (deepCopy .Values.config) (dict "server" (dict "host" "0.0.0.0" "port" 8000)) $keys) }}
{{- end }}
