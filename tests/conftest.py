"""Settings of every test session: devices, strictness, compilation cache, seeds."""

import gc
import os
import pathlib
import signal

import hypothesis
import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NUM_CPU_DEVICES = 8
MAX_MEMORY_MAPS = 10_000
PLATFORM_OF_MARKER = {"gpu": "cuda", "tpu": "tpu"}

# Before the first use of a device. An accelerator is used only when it is asked for,
# for example JAX_PLATFORMS=cuda,cpu.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)
# No silent widening of types or of ranks in our own code.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Engines of equal shape compile once for the whole session, and for the next one.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# A process that a shell starts in the background ignores Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--simulator-seeds",
        type=int,
        default=1000,
        help="seeds of the scheduler simulator, 200 steps each",
    )


def pytest_collection_modifyitems(items):
    """Skips, with a reason, the tests of an accelerator that is not in use."""
    asked = (jax.config.jax_platforms or "").split(",")
    for item in items:
        for marker, platform in PLATFORM_OF_MARKER.items():
            if item.get_closest_marker(marker) and platform not in asked:
                reason = f"needs JAX_PLATFORMS={platform},cpu"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_data():
    """The folder of test data beside the checkout; tests skip where it is not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no test data beside the checkout: {folder.name}")
    return folder


@pytest.fixture(scope="session")
def simulator_seeds(request):
    """How many seeds the scheduler simulator runs."""
    return request.config.getoption("--simulator-seeds")


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps():
    """Frees compiled programs before the process has too many maps of memory.

    XLA's CPU backend maps each program; Linux ends a process beyond 65,530 maps, which
    the whole suite reached.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()
