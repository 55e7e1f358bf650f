import jax
import numpy as np

from jllm.weights.host_memory import ALIGNMENT, HUGE_PAGE, HostMemory


def test_arrays_are_aligned_apart_and_used_without_a_copy():
    memory = HostMemory(2 * HUGE_PAGE)
    arrays = [
        memory.empty(shape, np.dtype(dtype))
        for shape, dtype in [((3, 5), "float32"), ((7,), "float16"), ((9, 9), "int8")]
    ]
    for value, array in enumerate(arrays):
        array[...] = value
    for value, array in enumerate(arrays):
        assert np.all(array == value)
        assert array.ctypes.data % ALIGNMENT == 0
        placed = jax.device_put(array, jax.devices("cpu")[0])
        assert placed.unsafe_buffer_pointer() == array.ctypes.data


def test_the_stretch_begins_at_a_huge_page_and_is_used_up():
    memory = HostMemory(HUGE_PAGE)
    first = memory.empty((HUGE_PAGE,), np.dtype("int8"))
    assert first.ctypes.data % HUGE_PAGE == 0
    rest = [memory.empty((HUGE_PAGE // 2,), np.dtype("int8")) for _ in range(4)]
    for array in rest:
        array[...] = 1
    assert not first.any()


def test_without_capacity_arrays_are_numpys_own():
    memory = HostMemory(0)
    assert not memory
    assert memory.empty((2, 3), np.dtype("float32")).shape == (2, 3)
