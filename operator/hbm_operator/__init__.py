"""The Kubernetes operator: policies, one partition per GPU pod, the injected sidecar.

Pure parts: `models` (the custom resources), `planner` (policy and pod -> partition), `injector`
(pod -> pod). Around them: `controller` and `webhook`, two processes of one image.
"""
