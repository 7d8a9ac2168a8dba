"""Layer 1, the learned residual: a frozen network in an ONNX file.

The graph holds all of it, normaliser and clips included: input `observation` [1, n] float32 by
`observation.OBSERVATION_NAMES`, output `action` [1, 4] float32 by `layers.ACTION_NAMES`. The file
says in its metadata what it was made for, and is refused when that is not what we show it.

| key | content |
|---|---|
| `hbm.observation_version`, `hbm.observation` | version and comma-separated names of the inputs |
| `hbm.action` | comma-separated names of the outputs |
| `hbm.gain` | share of its wish that its maker found worth taking, 0..1 |
| `hbm.commit` | source revision that trained it |

ONNX Runtime is loaded with the first file. A run costs a few µs: memory is bound once, one thread,
no spinning.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from hbm_policy.layers import ACTION_NAMES, Action
from hbm_policy.observation import OBSERVATION_NAMES, OBSERVATION_VERSION

MAX_FILE_BYTES: Final = 1 << 20
"""No key of a ConfigMap is larger."""
INPUT: Final = "observation"
OUTPUT: Final = "action"
_new: Final = tuple.__new__
_NOTHING: Final = Action(math.nan, math.nan, math.nan, math.nan)


class ResidualError(ValueError):
    """A file that cannot be the residual; the text says why and what to do."""


class OnnxResidual:
    """A `Residual` from a file."""

    def __init__(self, path: Path, sha256: str) -> None:
        """`sha256`: of the file, in hex; at least its first 16 digits.

        Raises ResidualError for any file but the one meant, or one made for other inputs.
        """
        content = _read(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        if len(sha256) < 16 or not self.sha256.startswith(sha256.lower()):
            raise ResidualError(
                f"{path.name} has the hash {self.sha256[:12]}…, {sha256[:12]}… is asked for; "
                "put the file there that was meant, or name its hash"
            )
        session = _open(path.name, content)
        about = dict(session.get_modelmeta().custom_metadata_map)
        self.gain = _check_about(path.name, about)
        self.commit = about.get("hbm.commit", "")
        _check_signature(path.name, session)
        width = len(OBSERVATION_NAMES)
        self._input = np.zeros((1, width), np.float32)
        self._output = np.zeros((1, len(ACTION_NAMES)), np.float32)
        self._fill = struct.Struct(f"<{width}f").pack_into
        self._input_bytes = self._input.data.cast("B")
        self._action = self._output.reshape(-1).data
        binding = session.io_binding()
        binding.bind_input(INPUT, "cpu", 0, np.float32, (1, width), self._input.ctypes.data)
        shape = self._output.shape
        binding.bind_output(OUTPUT, "cpu", 0, np.float32, shape, self._output.ctypes.data)
        self._run = _bound_run(session, binding)
        answer = self.act((0.0,) * width)
        if not all(math.isfinite(value) for value in answer):
            raise ResidualError(f"{path.name} answers {tuple(answer)} to zeros; train it anew")

    def act(self, observation: tuple[float, ...]) -> Action:
        """The action; NaN for an observation that holds NaN, or a number too large for float32."""
        try:
            self._fill(self._input_bytes, 0, *observation)
        except OverflowError:
            return _NOTHING
        self._run()
        return _new(Action, self._action.tolist())


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ResidualError(f"{path.name} cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE_BYTES:
        raise ResidualError(f"{path.name} is larger than {MAX_FILE_BYTES} bytes; no policy is")
    return content


def _open(name: str, content: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ResidualError(f"onnxruntime is not installed, so {name} cannot be used") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever the runtime raises for bytes that are no model
        reason = " ".join(str(error).split())[:200]
        raise ResidualError(f"{name} is no ONNX model that can be run ({reason})") from error


def _bound_run(session: Any, binding: Any) -> Callable[[], None]:
    """One run of the bound session.

    The session's own method makes run options at every call, and with given ones it parses their
    settings, which costs ten runs; what it calls in the end takes them as they are (onnxruntime
    1.20 to 1.31). Where that is not there, the method it is.
    """
    import onnxruntime

    try:
        run, inner = session._sess.run_with_iobinding, binding._iobinding
    except AttributeError:
        return functools.partial(session.run_with_iobinding, binding)
    return functools.partial(run, inner, onnxruntime.RunOptions())


def _check_about(name: str, about: dict[str, str]) -> float:
    """The gain in the metadata; raises ResidualError when the file was made for something else."""
    version = about.get("hbm.observation_version")
    if version != str(OBSERVATION_VERSION):
        raise ResidualError(
            f"{name} was made for observations of version {version}, this program shows version "
            f"{OBSERVATION_VERSION}; export it anew with `hbm export`"
        )
    for key, names in (("hbm.observation", OBSERVATION_NAMES), ("hbm.action", ACTION_NAMES)):
        found = tuple(about.get(key, "").split(","))
        if found != names:
            odd = sorted(set(found) ^ set(names)) or ["their order"]
            raise ResidualError(
                f"{name}: {key} differs from this program's in {', '.join(odd)[:120]}; export it "
                "anew with `hbm export`"
            )
    try:
        gain = float(about.get("hbm.gain", ""))
    except ValueError:
        gain = math.nan
    if not 0.0 <= gain <= 1.0:
        raise ResidualError(f"{name}: hbm.gain is {about.get('hbm.gain')!r}; it must be 0 to 1")
    return gain


def _check_signature(name: str, session: Any) -> None:
    wanted = {INPUT: len(OBSERVATION_NAMES), OUTPUT: len(ACTION_NAMES)}
    for places, tensor in ((session.get_inputs(), INPUT), (session.get_outputs(), OUTPUT)):
        found = [(each.name, each.type, each.shape) for each in places]
        fits = len(found) == 1 and found[0][:2] == (tensor, "tensor(float)")
        # The first dimension may be open: a file for batches too.
        shape = found[0][2] if fits else []
        batch = shape[0] if len(shape) == 2 else 0
        if (batch not in (1, None) and not isinstance(batch, str)) or shape[1] != wanted[tensor]:
            raise ResidualError(
                f"{name} has {found}; it must have one {tensor} [1, {wanted[tensor]}] of float32"
            )
