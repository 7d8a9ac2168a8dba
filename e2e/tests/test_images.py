"""The images of `images/Dockerfile`: small, without privileges, and with nothing that builds."""

import json
import tarfile
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pytest
from hbm_e2e.images import TAG, TARGETS, Image

MAX_BYTES = 350_000_000
TOOLS = {
    *("apt", "apt-get", "as", "c++", "cc", "curl", "dpkg", "g++", "gcc", "ld", "make"),
    *("pip", "pip3", "wget"),
}
"""Programs that build or fetch."""
BUILDERS = {"Cython", "hatchling", "pip", "setuptools", "torch", "wheel"}
"""Python packages that build, and the one that weighs gigabytes."""
LABELS = {"title", "description", "vendor", "licenses", "version", "revision"}


class Content(NamedTuple):
    """What an archive holds, all layers together."""

    config: dict[str, Any]
    bytes: int
    files: list[tarfile.TarInfo]


@pytest.fixture(scope="session")
def contents(built: dict[str, Image]) -> dict[str, Content]:
    return {target: _read(image) for target, image in built.items()}


def _read(image: Image) -> Content:
    with tarfile.open(image.archive) as archive:

        def load(name: str) -> Any:
            file = archive.extractfile(name)
            assert file is not None, name
            return json.load(file)

        (stated,) = load("manifest.json")
        files: list[tarfile.TarInfo] = []
        for name in stated["Layers"]:
            with tarfile.open(fileobj=archive.extractfile(name)) as layer:
                files += layer.getmembers()
        total = sum(archive.getmember(name).size for name in stated["Layers"])
        return Content(load(stated["Config"])["config"], total, files)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_is_small(contents: dict[str, Content], target: str) -> None:
    assert contents[target].bytes < MAX_BYTES


def test_nothing_in_it_has_privileges(contents: dict[str, Content], target: str) -> None:
    config = contents[target].config
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == (["redis-server"] if target == "redis" else ["hbm"])
    privileged = [one.name for one in contents[target].files if one.isfile() and one.mode & 0o6000]
    assert privileged == []


def test_it_says_what_it_is(contents: dict[str, Content], target: str) -> None:
    labels = contents[target].config["Labels"]
    said = {name: labels.get(f"org.opencontainers.image.{name}") for name in LABELS}
    if target == "redis":  # its version is Debian's
        said.pop("version")
        said.pop("revision")
    assert all(said.values()), said
    assert said.get("version", TAG) == TAG


def test_it_holds_nothing_that_builds(contents: dict[str, Content], target: str) -> None:
    paths = [PurePosixPath(one.name) for one in contents[target].files]
    assert [
        str(path) for path in paths if path.parent.name in ("bin", "sbin") and path.name in TOOLS
    ] == []
    assert [
        str(path) for path in paths if path.parent.name == "site-packages" and path.name in BUILDERS
    ] == []


def test_its_python_is_debians(contents: dict[str, Content], target: str) -> None:
    found = {one.name.removeprefix("./") for one in contents[target].files}
    assert ("usr/bin/python3.11" in found) is (target != "redis")
