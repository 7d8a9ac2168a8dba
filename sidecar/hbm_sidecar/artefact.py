"""A learned policy on its way from a file to the process that decides.

Admin finds the file (in a mounted ConfigMap, or where a flag says), checks its hash and puts a copy
into the run directory; the intent names the hash. Decide loads that copy before a tick and says in
a small file what came of it. A file that is missing, another one, or no policy for this program
leaves the policy of before deciding, and the words for it go to the log, `/v1/state` and the
partition's condition.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

from hbm_policy import Residual

MAX_ARTEFACT_BYTES: Final = 1 << 20
"""No key of a ConfigMap is larger."""
STATUS_FILE: Final = "residual.json"
_KEY: Final = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_HASH_DIGITS: Final = 16
_STAYS: Final = "the policy of before decides. All else in the spec is in force"


class Verdict(NamedTuple):
    """What became of a wish. An empty reason: all of it is taken over."""

    reason: str
    """SpecRefused, ArtefactPending, ArtefactInvalid, or empty."""
    message: str


def copy_path(run_dir: Path, digits: str) -> Path:
    """Where the copy with a hash that begins with these 16 digits lies."""
    return run_dir / f"residual-{digits}.onnx"


def read_status(run_dir: Path) -> dict[str, Any]:
    """What decide says of the residual; empty when it has said nothing."""
    try:
        said: dict[str, Any] = json.loads((run_dir / STATUS_FILE).read_bytes())
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError):
        return {}


class Artefact:
    """The learned policy that is asked for: present, the one that was meant, and in use?"""

    def __init__(self, path: Path, sha256: str, run_dir: Path, place: str) -> None:
        """`place`: where it is looked for, in words."""
        self._path = path
        self._name = path.name
        self._sha256 = sha256.lower()
        self._run_dir = run_dir
        self._place = place
        self._seen: tuple[int, int, int] | None = None
        self._verdict = Verdict("", "")
        self._offered = copy_path(run_dir, self._digits).exists()

    @classmethod
    def of_key(cls, directory: Path, key: str, sha256: str, run_dir: Path) -> Artefact | None:
        """A key of a mounted ConfigMap; None when it is no key."""
        if _KEY.fullmatch(key) is None or key in (".", ".."):
            return None
        place = "in the ConfigMap hbm-policies of this namespace"
        return cls(directory / key, sha256, run_dir, place)

    @property
    def _digits(self) -> str:
        return self._sha256[:_HASH_DIGITS]

    @property
    def hash(self) -> int:
        """As the intent names it; 0 until the right file has been found."""
        return int(self._digits, 16) if self._offered else 0

    def look(self) -> Verdict:
        """What is to be said of it now; reads the file only when it has changed."""
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp != self._seen:
                self._verdict = self._check()
                self._seen = stamp
        except FileNotFoundError:
            self._seen = None
            return Verdict(
                "ArtefactPending",
                f"{self._name} is not {self._place} (yet); until then {_STAYS}",
            )
        except OSError as error:
            self._seen = None
            return Verdict(
                "ArtefactInvalid", f"{self._name} cannot be read ({error.strerror}); {_STAYS}"
            )
        return self._verdict if self._verdict.reason else self._used()

    def _check(self) -> Verdict:
        with self._path.open("rb") as file:
            content = file.read(MAX_ARTEFACT_BYTES + 1)
        found = hashlib.sha256(content).hexdigest()
        if found != self._sha256:
            return Verdict(
                "ArtefactInvalid",
                f"{self._name} has the hash {found[:12]}…, {self._sha256[:12]}… is asked for; "
                f"{_STAYS}",
            )
        copy = copy_path(self._run_dir, self._digits)
        temporary = copy.with_name(f".{copy.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.rename(copy)
        self._offered = True
        return Verdict("", "")

    def _used(self) -> Verdict:
        """The file is right: what does the process that decides make of it?"""
        said = read_status(self._run_dir)
        if said.get("asked") != self._digits:
            return Verdict(
                "ArtefactPending", f"{self._name} waits for the process that decides; {_STAYS}"
            )
        if said.get("used") != self._digits:
            return Verdict("ArtefactInvalid", f"{said.get('why')}; {_STAYS}")
        return Verdict("", f"decisions follow this spec, {said.get('how')}")


class ResidualSlot:
    """Decide's end: the residual in use, and what is said of it."""

    def __init__(self, run_dir: Path, gain: float, log: Any) -> None:
        """`gain`: `residual_gain`, for the words."""
        self._run_dir = run_dir
        self._gain = gain
        self._log = log
        self._asked: str | None = None
        self._settled = False
        self._used = ""
        self.residual: Residual | None = None

    @property
    def used(self) -> str:
        """First digits of the hash of the file in use; empty: none."""
        return self._used

    def follow(self, wanted: int) -> bool:
        """Use the file whose hash the intent names (0: none). True when the residual is another.

        Loading one costs tenths of a second, once: that tick is late.
        """
        asked = f"{wanted:0{_HASH_DIGITS}x}" if wanted else ""
        if asked == self._asked and self._settled:
            return False
        if asked != self._asked:
            self._asked, self._settled = asked, False
        if not asked:
            changed = self.residual is not None
            self.residual, self._used, self._settled = None, "", True
            self._say("", "no learned policy is asked for")
            return changed
        path = copy_path(self._run_dir, asked)
        if not path.exists():  # comes with the next look, or admin brings it again
            return False
        self._settled = True
        if asked == self._used:
            self._say("", self._how())
            return False
        from hbm_policy.onnx_residual import OnnxResidual, ResidualError

        try:
            residual = OnnxResidual(path, asked)
        except ResidualError as error:
            self._log.warning("learned policy refused; the one of before decides", why=str(error))
            self._say(str(error), "")
            return False
        self.residual, self._used = residual, asked
        self._log.info(
            "learned policy loaded", sha256=residual.sha256, gain=residual.gain, how=self._how()
        )
        self._say("", self._how())
        for other in self._run_dir.glob("residual-*.onnx"):
            if other != path:
                other.unlink(missing_ok=True)
        return True

    def _how(self) -> str:
        file_gain = 0.0 if self.residual is None else self.residual.gain
        total = self._gain * file_gain
        if total > 0.0:
            return f"the learned residual counts with gain {total:g}"
        if self._gain == 0.0:
            return (
                "the learned residual is loaded and does not count: residual_gain is 0 "
                "(HBM_RESIDUAL_GAIN of the sidecar)"
            )
        return "the learned residual is loaded and does not count: its file states gain 0"

    def _say(self, why: str, how: str) -> None:
        """For admin. A full disk is no reason to stop."""
        said = {"asked": self._asked, "used": self._used, "why": why, "how": how}
        path = self._run_dir / STATUS_FILE
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(said))
            temporary.rename(path)
        except OSError as error:
            self._log.warning("cannot say what became of the learned policy", why=str(error))
