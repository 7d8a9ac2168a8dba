"""After `compile_kernels` nothing is compiled any more, whatever a pool is asked to do."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = """
import sys
from numba.core.dispatcher import Dispatcher
import hbm_pool

def kernels():
    return {
        f"{module}.{name}{signature}"
        for module, loaded in list(sys.modules.items()) if module.startswith("hbm_")
        for name, value in vars(loaded).items() if isinstance(value, Dispatcher)
        for signature in value.signatures
    }

hbm_pool.compile_kernels()
before = kernels()
assert len(before) > 20, before
"""
EVERYTHING = """
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from test_pool_machine import PoolMachine
run_state_machine_as_test(
    PoolMachine,
    settings=settings(max_examples=25, stateful_step_count=50, deadline=None, derandomize=True,
                      database=None, phases=[Phase.generate]),
)
"""


def _compiled_later(exercise: str) -> str:
    code = SCRIPT + exercise + "print(sorted(kernels() - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_no_kernel_is_compiled_after_the_warm_up() -> None:
    assert _compiled_later(EVERYTHING) == "[]"
