"""With what the programs were compiled, and from which state of the code."""

import datetime as dt
import importlib.metadata
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
H200 = ROOT / "jllm" / "plan" / "nvidia_h200.txtpb"


def provenance():
    """Commit, date and versions of the compilers."""

    def git(*arguments):
        command = ("git", *arguments)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--", "jllm", "pallas_kernels", "shardings")
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    compilers = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt")
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        **{name: installed.get(name) for name in compilers},
    }
