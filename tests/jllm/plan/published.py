"""Searches the layouts of every published model on every topology; prints what fits.

    python -m tests.jllm.plan.published FOLDER

In a process of its own, where no arguments are checked: under pytest that takes most of
the time. One line of JSON per topology: by model the sizes of each layout that fits.
"""

import json
import pathlib
import sys

from jllm.config import EngineConfig
from jllm.errors import ConfigError
from jllm.models.registry import ARCHITECTURES
from jllm.plan.planner import Task, describe, search
from jllm.plan.throughput import Workload
from jllm.plan.topology import gpu_topology, known_topologies, tpu_topology
from jllm.weights.hub import CheckpointFiles


class Replicas:
    """Remembers replicas, of which all slices of a kind have the same ones."""

    def __init__(self):
        self.known = {}

    def __call__(self, task, layout):
        key = (
            task.files.path,
            task.topology.device.name,
            layout.tensor,
            layout.pipeline,
        )
        if key not in self.known:
            try:
                self.known[key] = describe(task, layout)
            except ConfigError as error:
                self.known[key] = error
        if isinstance(self.known[key], ConfigError):
            raise self.known[key]
        return self.known[key]


def models(folder):
    """Every config.json of a family that there is."""
    for path in sorted(pathlib.Path(folder).glob("*_config.json")):
        config = json.loads(path.read_text())
        if set(config.get("architectures", ())) & set(ARCHITECTURES):
            yield CheckpointFiles(path, config, {})


def summary(plan):
    memory = plan.memory
    return {
        "tensor": plan.layout.tensor,
        "num_devices": plan.layout.num_devices,
        "fits": memory.fits,
        "free": memory.allowed - memory.weights - memory.pool - memory.temporaries,
        "num_blocks": memory.num_blocks,
        "speed": plan.speed,
        "least_seconds": min(step.seconds for step in plan.steps),
    }


def main():
    files, replicas = list(models(sys.argv[1])), Replicas()
    for topology in (*map(tpu_topology, known_topologies()), gpu_topology("h200", 8)):
        found = {}
        for model in files:
            task = Task(model, topology, EngineConfig(), Workload(), None, "none")
            result = search(task, most_compiled=0, tell=print, described=replicas)
            found[model.path.name] = {
                "plans": list(map(summary, result.plans)),
                "num_refused": len(result.refused),
            }
        print(json.dumps({"topology": topology.name, "models": found}), flush=True)


if __name__ == "__main__":
    main()
