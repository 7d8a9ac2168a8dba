"""The metrics API as an autoscaler asks it: each container of a pod uses nine tenths of a core."""

import json
import ssl
import urllib.request
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
GROUP = "metrics.k8s.io/v1beta1"


def pods(namespace: str, query: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"https://kubernetes.default.svc/api/v1/namespaces/{namespace}/pods?{query}",
        headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=10, context=trust) as answer:
        items: list[dict[str, Any]] = json.load(answer)["items"]
    return items


def metrics(pod: dict[str, Any]) -> dict[str, Any]:
    spec = pod["spec"]
    sidecars = [one for one in spec.get("initContainers", ()) if "restartPolicy" in one]
    return {
        "metadata": {key: pod["metadata"][key] for key in ("name", "namespace", "labels")},
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "window": "10s",
        "containers": [
            {"name": one["name"], "usage": {"cpu": "900m", "memory": "64Mi"}}
            for one in (*sidecars, *spec["containers"])
        ],
    }


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        parts = asked.path.strip("/").split("/")
        if parts[3:4] == ["namespaces"] and parts[5:] == ["pods"]:
            found = [metrics(pod) for pod in pods(parts[4], asked.query)]
            self.say(200, {"apiVersion": GROUP, "kind": "PodMetricsList", "items": found})
        elif asked.path.rstrip("/") == f"/apis/{GROUP}":
            resource = {"name": "pods", "kind": "PodMetrics", "namespaced": True, "verbs": ["list"]}
            listed = {"groupVersion": GROUP, "resources": [{**resource, "singularName": ""}]}
            self.say(200, {"apiVersion": "v1", "kind": "APIResourceList", **listed})
        else:
            self.say(404, {"apiVersion": "v1", "kind": "Status", "code": 404})

    def say(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
server = ThreadingHTTPServer(("0.0.0.0", 8443), Answer)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
