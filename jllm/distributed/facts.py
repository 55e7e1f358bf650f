"""What must be the same on all hosts, compared before anything is computed."""

import dataclasses
from collections.abc import Mapping
from importlib import metadata

from jllm.config import EngineConfig

OWN = (
    "model",
    "tokenizer",
    "chat_template",
    "skip_tokenizer_init",
    "generation_config",
    "compilation_cache_dir",
    "hosts",
)
"""Options that may differ: paths, and what only the first host uses."""

VERSIONS = ("jllm", "jax", "jaxlib", "numpy", "ml_dtypes")
"""Packages whose versions must agree."""


def make_facts(config: EngineConfig, checkpoint: Mapping[str, str]) -> dict[str, str]:
    """Lists what all hosts must agree on.

    Args:
        config: The engine's options.
        checkpoint: Digest of each file of the checkpoint.
    """
    facts = {f"version of {name}": metadata.version(name) for name in VERSIONS}
    for field in dataclasses.fields(config):
        if field.name not in OWN:
            facts[field.name] = repr(getattr(config, field.name))
    if config.hosts is not None:
        facts["num_hosts"] = repr(config.hosts.num_hosts)
        facts["host_timeout"] = repr(config.hosts.timeout)
    return facts | {f"checkpoint file {name}": checkpoint[name] for name in checkpoint}


def difference(host: int, facts: Mapping[str, str], first: Mapping[str, str]) -> str:
    """Says what a host has otherwise than the first one; empty where nothing."""
    names = sorted(facts.keys() | first.keys())
    found = [
        f"{name} is {facts.get(name, 'missing')}, not {first.get(name, 'missing')}"
        for name in names
        if facts.get(name) != first.get(name)
    ]
    return f"host {host} differs from host 0: {'; '.join(found)}" if found else ""
