"""`python -m hbm_e2e`: the harness by hand."""

import argparse
import sys
from pathlib import Path

from hbm_e2e.errors import HarnessError
from hbm_e2e.images import TARGETS
from hbm_e2e.toolchain import PROGRAMS, Toolchain, find_go


def main() -> None:
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except HarnessError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _build(arguments: argparse.Namespace) -> None:
    Toolchain().build(arguments.programs or PROGRAMS, say=_say)


def _check(_: argparse.Namespace) -> None:
    from hbm_e2e.requirements import probe

    probe()
    toolchain = Toolchain()
    if toolchain.missing():
        find_go()
    _say("this machine can hold a cluster")


def _prepare(_: argparse.Namespace) -> None:
    """In the order of need: tests without nodes wait for the first programs."""
    import time

    from hbm_e2e.cluster import Cluster
    from hbm_e2e.images import cluster_images
    from hbm_e2e.requirements import require

    began = time.monotonic()

    def done(what: str) -> None:
        _say(f"{time.monotonic() - began:6.0f} s  {what}")

    require(_say)
    cluster = Cluster(say=_say)
    toolchain = Toolchain()
    toolchain.build(say=_say)
    done("programs")
    cluster_images(cluster.images, toolchain)
    cluster.images.build_python()
    done("images of the cluster")
    for target in TARGETS:
        cluster.images.build_project(target)
        done(f"image {target}")


def _api_server(arguments: argparse.Namespace) -> None:
    import signal
    import tempfile

    from hbm_e2e.api_server import ApiServer

    with tempfile.TemporaryDirectory(prefix="hbm-api-server-") as scratch:
        folder = Path(arguments.folder or scratch).absolute()
        with ApiServer(folder, controllers=not arguments.no_controllers) as server:
            _say(f"API server {server.url}")
            _say(f"export KUBECONFIG={server.kubeconfig}")
            _say("ends with Ctrl-C or SIGTERM")
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.pause()


def _up(_: argparse.Namespace) -> None:
    from hbm_e2e.cluster import Cluster

    cluster = Cluster(say=_say)
    cluster.up()
    _say(f"export KUBECONFIG={cluster.kubeconfig}")


def _images(arguments: argparse.Namespace) -> None:
    from hbm_e2e.cluster import Cluster

    cluster = Cluster(say=_say)
    images = cluster.images.build_project(*arguments.targets)
    for image in images:
        size = image.archive.stat().st_size / 1e6
        _say(f"{image.name}  {image.id}  {size:.0f} MB")
    if cluster.is_up():
        cluster.load(images)
        _say(f"loaded into the nodes of {cluster.name}")


def _down(_: argparse.Namespace) -> None:
    from hbm_e2e.cluster import Cluster

    Cluster(say=_say).down()


def _status(_: argparse.Namespace) -> None:
    from hbm_e2e.cluster import Cluster

    cluster = Cluster(say=_say)
    if not cluster.is_up():
        raise HarnessError(f"cluster {cluster.name} is not up")
    _say(cluster.kubectl("get", "nodes", "-o", "wide").rstrip())


def _kubeconfig(_: argparse.Namespace) -> None:
    from hbm_e2e.cluster import Cluster

    cluster = Cluster(say=_say)
    if not cluster.is_up():
        raise HarnessError(f"cluster {cluster.name} is not up")
    _say(str(cluster.kubeconfig))


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hbm_e2e", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="build the cluster's programs that are missing")
    build.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of: {', '.join(PROGRAMS)}")
    build.set_defaults(run=_build)

    for name, action, what in (
        ("check", _check, "say whether this machine can hold a cluster; ends with 2 if not"),
        (
            "prepare",
            _prepare,
            "programs and images that the tests need, beside other work",
        ),
        ("up", _up, "start three nodes, unless they run"),
        ("down", _down, "stop them; what was built and loaded stays"),
        ("status", _status, "show the nodes; ends with 2 when the cluster is not up"),
        ("kubeconfig", _kubeconfig, "print the path of the administrator's kubeconfig"),
    ):
        commands.add_parser(name, help=what).set_defaults(run=action)

    images = commands.add_parser(
        "images", help="build targets of images/Dockerfile; into the nodes, if a cluster is up"
    )
    images.add_argument("targets", nargs="*", metavar="TARGET", help="default: all but the server")
    images.set_defaults(run=_images)

    api_server = commands.add_parser(
        "api-server", help="run an API server without nodes until interrupted (no root needed)"
    )
    api_server.add_argument("--folder", help="keep its state and logs here (else a scratch folder)")
    api_server.add_argument(
        "--no-controllers", action="store_true", help="no garbage collection, no service accounts"
    )
    api_server.set_defaults(run=_api_server)
    return parser
