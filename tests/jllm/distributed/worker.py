"""One host of several: `python -m tests.jllm.distributed.worker JSON`.

The argument holds `hosts` and `engine`, fields of `HostConfig` and `EngineConfig`, and
`work`: "tokens" prints the outputs of the workload, "endless" then goes on until it is
ended, "weights" loads the weights alone and counts what it reads of the files.
"""

import json
import logging
import pathlib
import resource
import sys

import jax

from jllm import EngineConfig, HostConfig

ROOT = pathlib.Path(__file__).parents[3]


def main():
    given = json.loads(sys.argv[1])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", given["devices"])
    cache = ROOT / ".cache" / "jax-tests"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    hosts = HostConfig(**given["hosts"])
    config = EngineConfig(hosts=hosts, **given["engine"])
    if given["work"] == "weights":
        load_weights(config, given["others"])
        return
    if hosts.host_id:
        from jllm import follow

        follow(config)
        print("followed", flush=True)
        return
    lead(config, given["work"])


def load_weights(config, others):
    """Prints bytes read; compares this host's slices with those of other folders."""
    import dataclasses

    import numpy as np

    from jllm.distributed.join import start_jax
    from jllm.engine.create import (
        make_meshes,
        plan_replica,
        plan_weights,
        resolve_files,
    )

    start_jax(config.hosts)
    (mesh,) = make_meshes(config)

    def load(model):
        own = dataclasses.replace(config, model=model)
        return plan_weights(plan_replica(own, resolve_files(own), mesh))

    counts = count_bytes()
    weights = jax.tree.leaves(load(config.model))
    print("read", counts["bytes"], flush=True)
    for model in others:
        for mine, theirs in zip(weights, jax.tree.leaves(load(model)), strict=True):
            for shard, other in zip(
                mine.addressable_shards, theirs.addressable_shards, strict=True
            ):
                assert shard.index == other.index
                np.testing.assert_array_equal(shard.data, other.data)
        print("same", flush=True)


def count_bytes():
    """Counts what is asked for of the tensors of safetensors files."""
    import numpy as np

    from jllm.weights.lazy import LazyArray
    from jllm.weights.tensors import StoredTensor

    counts, mapped = {"bytes": 0}, StoredTensor.map

    def counted(tensor):
        array = mapped(tensor)

        def read(box):
            part = np.array(array[tuple(slice(*pair) for pair in box)])
            counts["bytes"] += part.nbytes
            return part

        return LazyArray(array.shape, read)

    StoredTensor.map = counted
    return counts


def lead(config, work):
    from jllm.engine.create import create_engine
    from tests.jllm.distributed.workload import endless, outputs_of

    engine = create_engine(config)
    print("started", flush=True)
    print(json.dumps(outputs_of(engine)), flush=True)
    print("computed", flush=True)
    if work == "endless":
        endless(engine)
    engine.close()
    print("closed", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


if __name__ == "__main__":
    main()
