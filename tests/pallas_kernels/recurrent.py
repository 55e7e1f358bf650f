"""What the tests of layers with a state per sequence have in common.

A case's arrays are those over the tokens, the layer's own, the row starts or rows, and
the states. Every check compares with float64.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from pallas_kernels.common.target import Target
from tests.pallas_kernels.targets import gpu_target

TARGETS = {
    "reference": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target(
        "tpu", "v6e", "v6e", 1, interpret=pltpu.InterpretParams(detect_races=True)
    ),
}
# Those outside of 0 ... 9 stand behind rows that they would meet if clamped.
STEP_ROWS = np.array([2, 0, -1, 9, 10], np.int32)
NUM_STEP_ROWS = 10

# Of one compiled program for all: the rest of the tokens is padding.
QUICK_TOKENS, ALL_TOKENS = 145, 570
QUICK_COUNTS = st.lists(
    st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48]), min_size=3, max_size=3
)
ALL_COUNTS = st.lists(st.integers(0, 140), min_size=4, max_size=4)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's operations and their oracle.

    Attributes:
        scan: Calls the scan with the arrays of a case.
        step: Calls the step with them.
        make_arrays: Draws the arrays of a case of the scan.
        solve: The scan in float64, token by token.
        num_inputs: How many arrays are over the tokens.
        values: Which of them has the outputs' shape.
        fit_tpu: Gives a case the widths that a TPU's kernel takes.
        tolerance: Bound of the error by type, relative to the largest value.
    """

    scan: Callable
    step: Callable
    make_arrays: Callable
    solve: Callable
    num_inputs: int
    values: int
    fit_tpu: Callable
    tolerance: dict[str, float]

    def check_scan(self, case, implementation, seed=0, change=None):
        if implementation == "tpu":
            case = self.fit_tpu(case)
        arrays = self.make_arrays(case, seed)
        if change is not None:
            change(*arrays)
        scan = jax.jit(partial(self.scan, **choice(implementation)))
        found = scan(*map(jnp.asarray, arrays))
        self._compare(found, self.solve(*arrays), case.dtype)
        assert_no_races(implementation)

    def check_boundaries(self, case, counts, num_tokens, seed):
        padding = num_tokens - sum(counts)
        case = dataclasses.replace(case, num_new=tuple(counts), padding=padding)
        self.check_scan(case, "gpu_triton", seed)

    def check_step(self, case, implementation):
        """Tokens of some rows in any order; dead tokens hold NaN."""
        case = dataclasses.replace(case, num_new=(1,) * NUM_STEP_ROWS, padding=0)
        if implementation == "tpu":
            case = self.fit_tpu(case)
        *arrays, _, state = self.make_arrays(case)
        tokens = [array[: len(STEP_ROWS)].copy() for array in arrays[: self.num_inputs]]
        own = arrays[self.num_inputs :]
        expected = np.zeros(tokens[self.values].shape), state.astype(np.float64)
        dead = (STEP_ROWS < 0) | (STEP_ROWS >= NUM_STEP_ROWS)
        for token in np.flatnonzero(~dead):
            one = [array[token : token + 1] for array in tokens]
            row = STEP_ROWS[token]
            out, new = self.solve(*one, *own, [0, 1], state[row : row + 1])
            expected[0][token], expected[1][row] = out[0], new[0]
        for array in tokens:
            array[dead] = np.nan
        step = jax.jit(partial(self.step, **choice(implementation)))
        found = step(*map(jnp.asarray, (*tokens, *own, STEP_ROWS, state)))
        self._compare(found, expected, case.dtype)
        assert_no_races(implementation)
        untouched = np.setdiff1d(np.arange(NUM_STEP_ROWS), STEP_ROWS)
        np.testing.assert_array_equal(np.asarray(found[1])[untouched], state[untouched])

    def check_cut(self, case, implementation):
        """State handed from call to call, and a step in the end, equal one call."""
        case = dataclasses.replace(case, num_new=(41,), padding=0)
        *arrays, _, state = map(jnp.asarray, self.make_arrays(case))
        inputs, own = arrays[: self.num_inputs], arrays[self.num_inputs :]
        scan = jax.jit(partial(self.scan, **choice(implementation)))
        whole, final = scan(*inputs, *own, jnp.array([0, 41]), state)
        parts, carried = [], state
        for first, last in ((0, 19), (19, 40)):
            # The tokens before are at the end, where they are padding.
            turned = [jnp.roll(array, -first, axis=0) for array in inputs]
            starts = jnp.array([0, last - first])
            out, carried = scan(*turned, *own, starts, carried)
            parts.append(out[: last - first])
        left = [array[40:] for array in inputs]
        rows = jnp.array([0])
        out, carried = self.step(*left, *own, rows, carried, **choice(implementation))
        np.testing.assert_allclose(jnp.concatenate([*parts, out]), whole, atol=2e-5)
        np.testing.assert_allclose(carried, final, atol=2e-5)

    def check_gradients(self, case, tolerance):
        *arrays, starts, state = map(jnp.asarray, self.make_arrays(case))

        @jax.jit
        def total(*arrays):
            *inputs, state = arrays
            out, final = self.scan(*inputs, starts, state, implementation="reference")
            return jnp.sum(out * out) + jnp.sum(jnp.sin(final))

        bounds = {"atol": tolerance, "rtol": tolerance}
        check_grads(total, (*arrays, state), 1, ["rev"], **bounds)

    def _compare(self, found, expected, dtype):
        for name, one, other in zip(("out", "state"), found, expected, strict=True):
            error = np.abs(np.asarray(one, np.float64) - other).max()
            bound = self.tolerance[dtype] * max(1, np.abs(other).max())
            assert error <= bound, f"{name}: {error} > {bound}"


def choice(implementation):
    """Arguments that choose an implementation and its interpreter."""
    return {"implementation": implementation, "target": TARGETS[implementation]}


def assert_no_races(implementation):
    if implementation == "tpu":
        assert not interpret_pallas_call.races.races_found


def assert_distinct(cases):
    """Names tell the cases apart, and the counts are filled in."""
    names = [(case.operation, case.name) for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert case.num_bytes > 0
        assert case.num_flops > 0
