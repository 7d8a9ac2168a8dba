"""What the pods of `helm test` do, run as they are against real listeners."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.chart.conftest import Render
from tests.chart.rendered import CHART


class _Busy(BaseHTTPRequestHandler):
    """Ready at /readyz, out of backends elsewhere."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def answers(*checks: str, patience_s: int = 90) -> subprocess.CompletedProcess[str]:
    script = (CHART / "files" / "tests" / "answers.py").read_text()
    assert "+ 90" in script
    script = script.replace("+ 90", f"+ {patience_s}")
    return subprocess.run(
        [sys.executable, "-c", script, *checks],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_answers_that_are_wanted_pass(address: str) -> None:
    done = answers(f"controller=200={address}/readyz", f"route rank=any={address}/v2/health")
    assert (done.returncode, done.stdout) == (0, "controller: 200\nroute rank: 503\n")


def test_a_part_that_is_not_ready_or_not_there_fails_by_name(address: str) -> None:
    unready = answers(f"controller=200={address}/other", patience_s=0)
    assert unready.returncode == 1
    assert f"controller: {address}/other says 503, not 200" in unready.stderr
    absent = answers("route rank=any=http://127.0.0.1:1/", patience_s=0)
    assert absent.returncode == 1
    assert "no answer" in absent.stderr


@pytest.mark.helm
def test_the_pods_ask_the_parts_of_the_release(render: Render) -> None:
    rendered = render(CHART / "ci" / "full-values.yaml")
    (container,) = rendered.one("Pod", "hbm-test-answers")["spec"]["containers"]
    assert container["args"][1:] == [
        "controller=200=http://hbm-controller.hbm-ns.svc:8080/readyz",
        "route rank=any=http://hbm-router-rank.models.svc:80/v2/health/ready",
        "route feed=any=http://hbm-router-feed.feeds.svc:80/v2/health/ready",
    ]
    assert container["args"][0] == (CHART / "files" / "tests" / "answers.py").read_text()
    (container,) = rendered.one("Pod", "hbm-test-injection")["spec"]["containers"]
    assert {each["name"]: each["value"] for each in container["env"]} == {
        "CONFIGURATION": "hbm-webhook",
        "WEBHOOK": "https://hbm-webhook.hbm-ns.svc/mutate",
    }
