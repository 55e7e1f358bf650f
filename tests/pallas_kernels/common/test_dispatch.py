"""Which implementation runs, and what is said when it is not the best one."""

import logging
import sys
import types

import pytest

from pallas_kernels.common.dispatch import Operation, collect_fallbacks
from pallas_kernels.common.target import Target

CPU, GPU, TPU = Target("cpu"), Target("gpu", "sm_90", "h200", 132), Target("tpu")
MODULES = ("reference", "gpu_triton", "gpu_mosaic", "tpu")


@pytest.fixture
def operation(monkeypatch):
    """An operation whose implementations give their names; mosaic cannot."""

    def implementation(name):
        def run(x, target=None):
            if name == "gpu_mosaic":
                raise NotImplementedError(f"x={x} is odd")
            return name, target

        module = types.ModuleType(name)
        setattr(module, f"fake_{name}", run)
        return module

    for name in MODULES:
        path = f"pallas_kernels.fake.{name}"
        monkeypatch.setitem(sys.modules, path, implementation(name))
    gpu = ("gpu_mosaic", "gpu_triton", "reference")
    return Operation("fake", "fake", gpu=gpu)


@pytest.mark.parametrize(
    ("target", "used"), [(CPU, "reference"), (GPU, "gpu_triton"), (TPU, "tpu")]
)
def test_auto_takes_the_best_of_the_device(operation, target, used):
    name, seen = operation.run("auto", target, 1)
    assert name == used
    assert seen == (None if target is CPU else target)


def test_a_fallback_is_collected_and_logged_once(operation, caplog):
    with caplog.at_level(logging.WARNING), collect_fallbacks() as found:
        operation.run("auto", GPU, 12345)
        operation.run("auto", GPU, 12345)
    assert [(f.operation, f.wanted, f.used) for f in found] == [
        ("fake", "gpu_mosaic", "gpu_triton")
    ] * 2
    assert found[0].reason == "x=12345 is odd"
    assert [r.getMessage() for r in caplog.records] == [
        "fake: gpu_mosaic cannot be used here (x=12345 is odd); using gpu_triton"
    ]


def test_a_forced_implementation_never_falls_back(operation):
    with collect_fallbacks() as found, pytest.raises(NotImplementedError, match="odd"):
        operation.run("gpu_mosaic", GPU, 1)
    assert found == []
    assert operation.run("reference", GPU, 1) == ("reference", None)


def test_a_forced_implementation_of_another_device_is_refused(operation):
    with pytest.raises(ValueError, match=r"'tpu' of fake needs a TPU; .* is a CPU"):
        operation.run("tpu", CPU, 1)
    with pytest.raises(ValueError, match="must be one of auto, gpu_mosaic"):
        operation.run("blocked", CPU, 1)


def test_the_default_target_is_the_default_device():
    assert Target.default() == Target("cpu", name="cpu")
