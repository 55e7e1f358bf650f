"""Runs kernels for Mosaic GPU in JAX's simulator, with race detection.

The simulator waits for ever where a barrier is not completed, runs each warpgroup in a
thread of its own with a vector clock, and leaves memory that nothing wrote full of NaN.
Unlike the device it runs copies at once and in order, and knows no proxies, so that a
missing fence is not seen.
"""

import contextlib
import threading

import jax
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.common.target import Target


def simulated(num_cores=1):
    """A Hopper GPU that is not there."""
    params = InterpretGPUParams(detect_races=True)
    return Target("gpu", "sm_90", "h200", num_cores, interpret=params)


@contextlib.contextmanager
def simulator(monkeypatch):
    """Simulates, and fails if there was a race.

    The simulator compiles the kernel anew for each thread of each thread block; here
    that is done once.
    """
    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        def evaluate(consts, *args):
            jax.core.eval_jaxpr(jaxpr, consts, *args)

        with lock:
            if id(jaxpr) not in compiled:
                program = jax.jit(evaluate).lower(consts, *args).compile()
                compiled[id(jaxpr)] = jaxpr, program
        compiled[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    yield
    assert not interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()
