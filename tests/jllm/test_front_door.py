"""What `import jllm` gives, and what it does not import."""

import subprocess
import sys

import pytest

import jllm

HEAVY = ("jax", "transformers", "tokenizers", "numpy", "huggingface_hub")


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("code", ["import jllm", "HELP"])
def test_light_imports(code):
    if code == "HELP":
        code = "import jllm.cli; assert jllm.cli.main(['generate', '--help']) == 0"
    code += f"; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code).splitlines()[-1] == "[]"


def test_all_names_are_there():
    for name in jllm.__all__:
        assert getattr(jllm, name) is not None
    assert jllm.LLM.__name__ == "LLM"
    with pytest.raises(AttributeError, match="unheard"):
        jllm.unheard  # noqa: B018
