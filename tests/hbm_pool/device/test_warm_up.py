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
import numpy as np
import torch
from hbm_pool import KVSpec, Pool, PoolConfig, RamRowStore, TableSpec
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from test_pool_machine import PoolMachine
run_state_machine_as_test(
    PoolMachine,
    settings=settings(max_examples=25, stateful_step_count=50, deadline=None, derandomize=True,
                      database=None, phases=[Phase.generate]),
)
config = PoolConfig(
    pool_bytes=1 << 20, extent_bytes=8 << 10, tables=(TableSpec("item", 1 << 20, 8),),
    kv=KVSpec(layers=1, heads=1, head_dim=8, page_tokens=16), max_batch_users=1,
    max_sequence_tokens=16, refill_bytes_per_s=1e9,
)
store = RamRowStore(np.zeros((1 << 20, 8), np.float32))
with Pool(config, {"item": store}, background=False) as pool:
    for _ in range(16):
        pool.emb.gather({"item": torch.arange(4096)}, {"item": torch.empty(4096, 8)})
        pool.begin_batch()
    pool.refiller.step()
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
