{{/* The alerts: what a person should act on, each with what to look at first. */}}
{{- define "drumline.rules" -}}
{{- with .Values.metrics.rules -}}
groups:
  - name: drumline
    rules:
      - alert: DrumlineOperatorNotLeading
        expr: (max(drumline_operator_leading) or vector(0)) < 1
        for: 2m
        labels: {severity: critical}
        annotations:
          summary: No Drumline operator leads
          description: >-
            Nothing is started, restarted or taken down; what runs goes on. Look at the pods and the
            lease named drumline-operator, and whether the API server answers.
      - alert: DrumlineGangPendingTooLong
        expr: max by (namespace, reason) (drumline_jobs_pending_longest_seconds) > {{ .pendingSeconds | int64 }}
        for: 5m
        labels: {severity: warning}
        annotations:
          summary: A job in {{ "{{ $labels.namespace }}" }} waits for {{ "{{ $value | humanizeDuration }}" }}
          description: >-
            Its reason is {{ "{{ $labels.reason }}" }}; `kubectl get -A commandjobs,trainingjobs,modelservices
            -o wide` says what is missing.
      - alert: DrumlineNodeLost
        expr: max(drumline_nodes{phase="silent"}) > 0
        for: 5m
        labels: {severity: warning}
        annotations:
          summary: "{{ "{{ $value }}" }} nodes are not ready"
          description: Their gangs were planned again elsewhere; their devices are lost until they are back.
      - alert: DrumlineDeviceUnhealthy
        expr: min by (node, device) (drumline_device_healthy) < 1
        for: 2m
        labels: {severity: warning}
        annotations:
          summary: Device {{ "{{ $labels.device }}" }} of {{ "{{ $labels.node }}" }} cannot be used
          description: The node's condition DrumlineDevicesHealthy says what the driver reported.
      - alert: DrumlineAllocatedDevicesIdle
        expr: >-
          max by (node) (drumline_node_devices_allocated{kind="gpu"}) > 0
          and on (node) max by (node) (drumline_node_devices_allocated{kind="gpu"}) == max by (node) (drumline_node_devices{kind="gpu"})
          and on (node) avg by (node) (avg_over_time(drumline_device_utilization_ratio[30m])) < {{ .idleUtilization }}
        for: 30m
        labels: {severity: info}
        annotations:
          summary: All devices of {{ "{{ $labels.node }}" }} are held, and none works
          description: Somebody holds devices without use; the pods of the node say who.
      - alert: DrumlineStepStalled
        expr: changes(drumline_job_step[{{ .stalledMinutes | int64 }}m]) == 0 and drumline_job_step offset {{ .stalledMinutes | int64 }}m >= 0
        for: 1m
        labels: {severity: warning}
        annotations:
          summary: "{{ "{{ $labels.job }}" }} has finished no step for {{ .stalledMinutes | int64 }} minutes"
          description: It runs and does not get on; look at the logs of its ranks, rank 0 first.
      - alert: DrumlineJobRestartsOften
        expr: drumline_job_restarts - min_over_time(drumline_job_restarts[1h]) > 3
        labels: {severity: warning}
        annotations:
          summary: "{{ "{{ $labels.job }}" }} was restarted {{ "{{ $value | humanize }}" }} times in an hour"
          description: Its status and its events say why.
      - alert: DrumlineGatewayTurnsAway
        expr: >-
          sum by (model) (rate(drumline_gateway_requests_total{outcome="busy"}[5m]))
          > {{ .gatewayErrors }} * sum by (model) (rate(drumline_gateway_requests_total[5m]))
        for: 10m
        labels: {severity: warning}
        annotations:
          summary: The gateway answers 429 for {{ "{{ $labels.model }}" }}
          description: The model's queue is full; give its ModelService more replicas.
      - alert: DrumlineGatewayFails
        expr: >-
          sum by (model) (rate(drumline_gateway_requests_total{outcome="failed"}[5m]))
          > {{ .gatewayErrors }} * sum by (model) (rate(drumline_gateway_requests_total[5m]))
        for: 5m
        labels: {severity: critical}
        annotations:
          summary: The gateway answers 5xx for {{ "{{ $labels.model }}" }}
          description: Its ranks fail or are away; `kubectl describe modelservice` says why.
      - alert: DrumlineMetricsMissing
        expr: min by (node, source) (drumline_collect_success) < 1
        for: 15m
        labels: {severity: info}
        annotations:
          summary: The agent on {{ "{{ $labels.node }}" }} cannot read {{ "{{ $labels.source }}" }}
          description: Its log says why.
{{- end }}
{{- end }}
