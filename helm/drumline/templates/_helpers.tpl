{{/* The image of every process. */}}
{{- define "drumline.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{/* The secret with the tokens. */}}
{{- define "drumline.secret" -}}
{{ .Values.auth.existingSecret | default "drumline-tokens" }}
{{- end }}

{{/* Labels of an object; its argument is the name. */}}
{{- define "drumline.labels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: drumline
{{- end }}

{{/* What passes the `restricted` Pod Security level: of a pod. */}}
{{- define "drumline.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* And of a container. */}}
{{- define "drumline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop:
    - ALL
{{- end }}

{{- define "drumline.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The volume with the tokens; a process that finds none serves no metrics. */}}
{{- define "drumline.tokens" -}}
- name: tokens
  secret:
    secretName: {{ include "drumline.secret" . }}
    defaultMode: 0440
{{- end }}
