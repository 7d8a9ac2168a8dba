"""Images of the project and of the cluster, built without a container daemon or a registry."""

import fcntl
import hashlib
import json
import os
import shutil
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hbm_e2e import dockerfile as stages
from hbm_e2e.kubectl import run
from hbm_e2e.places import PACKAGE_ROOT, cache_dir
from hbm_e2e.toolchain import Toolchain

BASE = "docker.io/library/debian:12-slim"
"""What a Dockerfile's FROM says; the store answers with its own Debian 12."""
SUITE = "bookworm"
REPOSITORY = "docker.io/hbm-partition"
TAG = "0.1.0"
"""The chart's appVersion: what the commands of the documents name, without a further setting."""
PROJECT = PACKAGE_ROOT.parent
TARGETS = ("operator", "sidecar", "router", "redis")
"""Of `images/Dockerfile`. Not `server`: with torch it takes gigabytes on every node."""
CA_INSIDE = "/run/hbm-build-ca.crt"
PIP_CACHE_INSIDE = "/run/hbm-pip-cache"
BUILD_TIMEOUT_S = 1800
SHORT_OF_DISK_BYTES = 20 << 30
"""Below this the layers of earlier builds go: the next build repeats what they would have saved."""

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def image_name(name: str) -> str:
    """Under which pods of the harness's own cluster find an image."""
    return f"{REPOSITORY}/{name}:{TAG}"


PAUSE = image_name("pause")
COREDNS = image_name("coredns")


@dataclass(frozen=True)
class Image:
    """A built image: the name pods use, its content's id, and an archive that nodes import."""

    name: str
    id: str
    archive: Path


class ImageStore:
    """buildah with a storage of its own below the cache; needs root.

    The machine's CA bundle and pip's cache are bind-mounted during a build: nothing of the
    machine ends up in an image.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._folder = (cache or cache_dir()) / "images"
        self._buildah = [
            "buildah",
            f"--root={self._folder / 'storage'}",
            f"--runroot={self._folder / 'run'}",
            "--storage-driver=overlay",
        ]

    def build(
        self,
        dockerfile: Path,
        context: Path,
        name: str,
        *,
        target: str | None = None,
        arguments: Mapping[str, str] | None = None,
    ) -> Image:
        """Build a target of a Dockerfile under `name` (`docker.io/…:tag`).

        Nothing is done while what goes in is what went in the last time; else layers are cached.
        """
        text = dockerfile.read_text()
        if target:
            text = stages.only(text, target)
        inputs = inputs_digest(text, context, arguments or {})
        known = self._known(name, inputs)
        if known is not None:
            return known
        pip_cache = self._folder / "pip"
        pip_cache.mkdir(parents=True, exist_ok=True)
        all_arguments = {
            "BASE": BASE,
            "PIP_CERT": CA_INSIDE,
            "PIP_CACHE_DIR": PIP_CACHE_INSIDE,
            **(arguments or {}),
        }
        with (
            self._exclusive(),
            tempfile.NamedTemporaryFile("r") as image_id,
            tempfile.NamedTemporaryFile("w") as pruned,
        ):
            pruned.write(text)
            pruned.flush()
            self._tidy()
            self._import_base()
            self._run(
                *("build", "--isolation=chroot", "--network=host", "--pull-never", "--layers"),
                f"--volume={_ca_bundle()}:{CA_INSIDE}:ro",
                f"--volume={pip_cache}:{PIP_CACHE_INSIDE}",
                *(f"--build-arg={key}={value}" for key, value in all_arguments.items()),
                *([f"--target={target}"] if target else []),
                *("--tag", name, "--iidfile", image_id.name, "--file", pruned.name),
                str(context),
            )
            built = image_id.read().strip()
            content = built.removeprefix("sha256:")[:16]
            image = Image(name, content, self._archive(name, content))
            self._push(built, image)
            self._stamp(name).write_text(json.dumps({"inputs": inputs, "id": content}))
            return image

    def build_project(self, *targets: str) -> list[Image]:
        """Targets of the project's own Dockerfile, from the present source tree."""
        dockerfile = PROJECT / "images" / "Dockerfile"
        return [
            self.build(dockerfile, PROJECT, image_name(target), target=target)
            for target in targets or TARGETS
        ]

    def build_python(self) -> Image:
        """Debian with Python and nothing else: pods of tests, and of the model server."""
        folder = PACKAGE_ROOT / "python"
        return self.build(folder / "Dockerfile", folder, image_name("python"))

    def build_program(self, program: Path, name: str) -> Image:
        """An image of nothing but one static program, which is its entry point."""
        content = hashlib.sha256(program.read_bytes()).hexdigest()[:16]
        image = Image(name, content, self._archive(name, content))
        if image.archive.exists():
            return image
        with tempfile.TemporaryDirectory() as scratch, self._exclusive():
            context = Path(scratch)
            shutil.copy2(program, context / program.name)
            dockerfile = context / "Dockerfile"
            dockerfile.write_text(
                f"FROM scratch\nCOPY {program.name} /{program.name}\n"
                f'ENTRYPOINT ["/{program.name}"]\n'
            )
            self._run(
                *("build", "--isolation=chroot", "--layers=false", "--tag", name),
                *("--file", str(dockerfile), str(context)),
            )
            self._push(name, image)
        return image

    def _import_base(self) -> None:
        """Debian by debootstrap, once per machine (about a minute)."""
        if self._run("images", "--quiet", "--filter", f"reference={BASE}").strip():
            return
        with tempfile.TemporaryDirectory(prefix="base-", dir=self._folder) as scratch:
            root = Path(scratch) / "root"
            mirror = os.environ.get("HBM_E2E_DEBIAN_MIRROR")
            run(
                [
                    "debootstrap",
                    "--variant=minbase",
                    SUITE,
                    str(root),
                    *([mirror] if mirror else []),
                ],
                timeout_s=BUILD_TIMEOUT_S,
            )
            for kept in (root / "var/cache/apt/archives", root / "var/lib/apt/lists"):
                shutil.rmtree(kept)
                (kept / "partial").mkdir(parents=True)
            container = self._run("from", "scratch").strip()
            self._run("copy", container, str(root), "/")
            self._run("config", "--cmd", "/bin/bash", "--env", f"PATH={SEARCH_PATH}", container)
            self._run("commit", "--rm", container, BASE)

    def _archive(self, name: str, content: str) -> Path:
        return self._folder / "archives" / f"{_label(name)}-{content}.tar"

    def _stamp(self, name: str) -> Path:
        """What went into the archive that lies there, and what came out."""
        return self._folder / "archives" / f"{_label(name)}.json"

    def _known(self, name: str, inputs: str) -> Image | None:
        try:
            stamp = json.loads(self._stamp(name).read_text())
        except (OSError, ValueError):
            return None
        archive = self._archive(name, stamp["id"])
        if stamp["inputs"] != inputs or not archive.exists():
            return None
        return Image(name, stamp["id"], archive)

    def _push(self, source: str, image: Image) -> None:
        """Write the archive of an image, in the place of the one its name had before."""
        if image.archive.exists():
            return
        folder = image.archive.parent
        folder.mkdir(parents=True, exist_ok=True)
        for outdated in folder.glob(image.archive.name.split("-")[0] + "-*"):
            outdated.unlink()
        unfinished = image.archive.with_suffix(".unfinished")
        self._run("push", source, f"docker-archive:{unfinished}:{image.name}")
        unfinished.rename(image.archive)

    def _tidy(self) -> None:
        """Away with what interrupted builds left, and with old layers where disk is short."""
        self._run("rm", "--all")
        if shutil.disk_usage(self._folder).free < SHORT_OF_DISK_BYTES:
            self._run("rmi", "--prune")

    def _run(self, *words: str) -> str:
        return run([*self._buildah, *words], timeout_s=BUILD_TIMEOUT_S)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def cluster_images(store: ImageStore, toolchain: Toolchain) -> list[Image]:
    """What every node needs before the first pod: the pause program and the cluster's DNS."""
    return [
        store.build_program(toolchain.path("pause"), PAUSE),
        store.build_program(toolchain.path("coredns"), COREDNS),
    ]


def _label(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def inputs_digest(dockerfile: str, context: Path, arguments: Mapping[str, str]) -> str:
    """Of all that a build reads from here: the stages, and what they copy out of the context."""
    state = hashlib.sha256(json.dumps([dockerfile, sorted(arguments.items())]).encode())
    for source in stages.sources(dockerfile):
        place = context / source
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                executable = os.access(file, os.X_OK)
                state.update(f"{file.relative_to(context)}\0{executable}\0".encode())
                state.update(hashlib.sha256(file.read_bytes()).digest())
    return state.hexdigest()


def _ca_bundle() -> str:
    """The certificates this machine trusts, wherever it keeps them."""
    return (
        os.environ.get("SSL_CERT_FILE")
        or ssl.get_default_verify_paths().cafile
        or "/etc/ssl/certs/ca-certificates.crt"
    )
