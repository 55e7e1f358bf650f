"""What the tree promises its readers: sizes, complete folders, nothing forbidden.

Reads the sources as text and syntax trees; imports none of them.
"""

import ast
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jllm", "pallas_kernels", "shardings", "server")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}

MAX_FILE_LINES = {"pallas_kernels": 900}
MAX_FUNCTION_LINES = {"pallas_kernels": 150}
MAX_ARGUMENTS = 9
KERNEL_FILES = (
    "__init__.py",
    "api.py",
    "cases.py",
    "gpu_triton.py",
    "reference.py",
    "tpu.py",
)
SHARED_MODEL_FILES = {"__init__", "base", "registry"}

UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load"}
UNWANTED_NAMES = {"os.environ", "os.getenv", "typing.TYPE_CHECKING"}
# libtpu tells its compiler's flags, and takes its settings, in no other way.
# Slurm and GKE tell a process in no other way which host it is.
ENVIRONMENT_READERS = {
    "jllm/commands/hosts.py": {"os.environ"},
    "jllm/engine/executables.py": {"os.environ"},
    "jllm/plan/described.py": {"os.environ"},
}
# Paths of a developer's machine; the project speaks of itself alone.
FOREIGN_PATHS = re.compile(r"/work/|/root/|/home/|\.\./shared")


def package_of(path):
    return path.relative_to(ROOT).parts[0]


def name_of(path):
    return str(path.relative_to(ROOT))


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def dotted(node):
    """Gives `a.b.c` for a chain of attributes on a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def imported(node):
    """Gives the full names that an import statement brings in."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return {module} | {f"{module}.{alias.name}" for alias in node.names}
    return set()


def forbidden_uses(tree):
    """Lists `line: name` of every use that the four packages renounce."""
    found = []
    for node in ast.walk(tree):
        names = imported(node)
        bad = {name for name in names if name.split(".")[0] in UNSAFE_MODULES}
        bad |= (names | {dotted(node)}) & UNWANTED_NAMES
        if isinstance(node, ast.Call):
            bad |= {dotted(node.func)} & UNSAFE_CALLS
        if "__future__.annotations" in names:
            bad.add("from __future__ import annotations")
        found += [f"{node.lineno}: {name}" for name in sorted(bad)]
    return found


def kernel_folders():
    folders = [path.parent for path in SOURCES if path.name == "__init__.py"]
    root = ROOT / "pallas_kernels"
    return [path for path in folders if path.parent == root and path.name != "common"]


def registered_modules():
    """Gives every `jllm.models.<family>` that the registry names or imports."""
    tree = TREES[ROOT / "jllm" / "models" / "registry.py"]
    words = set()
    for node in ast.walk(tree):
        words |= imported(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value.partition(":")[0])  # of `module:function`
    pattern = re.compile(r"jllm\.models\.\w+")
    modules = {word for word in words if pattern.fullmatch(word)}
    return {name for name in modules if name.split(".")[-1] not in SHARED_MODEL_FILES}


def argument_count(function):
    a = function.args
    return len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)


def too_long_functions(path):
    """Lists `name: lines` of the functions that are too long."""
    bound = MAX_FUNCTION_LINES.get(package_of(path), 70)
    sizes = [(f.name, f.end_lineno - f.lineno + 1) for f in functions(TREES[path])]
    return [f"{name}: {lines} lines" for name, lines in sizes if lines > bound]


def offenders(rule):
    """Maps each source file that breaks the rule to what the rule found there."""
    found = {name_of(path): rule(path) for path in SOURCES}
    return {name: what for name, what in found.items() if what}


def test_sources_are_found():
    assert {package_of(path) for path in SOURCES} == set(PACKAGES)


def test_nothing_forbidden():
    def rule(path):
        allowed = ENVIRONMENT_READERS.get(name_of(path), ())
        uses = forbidden_uses(TREES[path])
        return [use for use in uses if use.split(": ")[1] not in allowed]

    assert offenders(rule) == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os\nos.environ['X']",
        "from os import environ",
        "from typing import TYPE_CHECKING",
        "import typing\nif typing.TYPE_CHECKING: pass",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "from __future__ import annotations",
    ],
)
def test_forbidden_uses_are_seen(source):
    assert forbidden_uses(ast.parse(source))


def test_ordinary_code_is_not_forbidden():
    source = "import re\nre.compile('a')\nmodel.eval()\nfrom os import path"
    assert forbidden_uses(ast.parse(source)) == []


def test_sources_speak_of_the_project_alone():
    assert offenders(lambda path: FOREIGN_PATHS.findall(path.read_text("utf-8"))) == {}


def test_modules_have_docstrings():
    assert offenders(lambda path: not ast.get_docstring(TREES[path])) == {}


def test_files_are_short():
    def too_long(path):
        num_lines = len(path.read_text("utf-8").splitlines())
        return num_lines if num_lines > MAX_FILE_LINES.get(package_of(path), 450) else 0

    assert offenders(too_long) == {}


def test_functions_are_short():
    assert offenders(too_long_functions) == {}


def test_functions_have_few_arguments():
    def too_many(path):
        counts = [(f.name, argument_count(f)) for f in functions(TREES[path])]
        return [f"{name}: {n}" for name, n in counts if n > MAX_ARGUMENTS]

    assert offenders(too_many) == {}


@pytest.mark.parametrize("folder", kernel_folders(), ids=lambda path: path.name)
def test_kernel_folder_is_complete(folder):
    missing = [name for name in KERNEL_FILES if not (folder / name).is_file()]
    assert missing == []
    tests = ROOT / "tests" / "pallas_kernels" / folder.name
    assert list(tests.glob("test_*.py")), f"no tests of {folder.name}"


def test_registered_models_exist():
    modules = registered_modules()
    assert modules, "the registry names no family"
    files = {name: ROOT / (name.replace(".", "/") + ".py") for name in modules}
    assert [name for name, file in files.items() if not file.is_file()] == []


def test_independence_contract_lists_every_family():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = [c for c in contracts if c["name"].startswith("Models do not know")]
    assert set(contract["modules"]) == registered_modules()
