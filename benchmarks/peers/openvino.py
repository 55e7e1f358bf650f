"""OpenVINO GenAI's continuous batching; the model is exported once per type.

bfloat16 means float16 weights with bfloat16 arithmetic, which is what OpenVINO makes of
such a model; float32 means float32 throughout.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Answer, NotInstalledError, Settings, cut

WEIGHT_FORMATS = {"float32": "fp32", "bfloat16": "fp16"}
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
BLOCK_TOKENS = 32
SPARE_BLOCKS = 64


def export(settings: Settings) -> Path:
    """Writes the model in OpenVINO's format, unless it is there."""
    kind = WEIGHT_FORMATS[settings.dtype]
    folder = Path(settings.cache) / f"{Path(settings.folder).name}-openvino-{kind}"
    if not (folder / "openvino_model.xml").exists():
        command = [
            *(sys.executable, "-m", "optimum.commands.optimum_cli", "export"),
            *("openvino", "--model", settings.folder, "--weight-format", kind),
            *("--task", "text-generation-with-past", str(folder)),
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


class Pipeline:
    """A pipeline stepped by hand."""

    def __init__(self, settings: Settings) -> None:
        import openvino_genai

        self.version = openvino_genai.__version__
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = settings.max_num_seqs
        blocks_per_row = -(-settings.max_model_len // BLOCK_TOKENS) + 1
        scheduler.num_kv_blocks = settings.max_num_seqs * blocks_per_row + SPARE_BLOCKS
        scheduler.enable_prefix_caching = True
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            str(export(settings)),
            scheduler,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": PRECISIONS[settings.dtype],
                "INFERENCE_NUM_THREADS": settings.threads,
            },
        )

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """See `Peer`."""
        import numpy as np
        import openvino as ov
        import openvino_genai

        handles: list[Any] = []
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            config = openvino_genai.GenerationConfig(
                max_new_tokens=length, ignore_eos=True, do_sample=False
            )
            ids = ov.Tensor(np.array([prompt], np.int64))
            handles.append(self._pipeline.add_request(number, ids, config))
        answers = [Answer([]) for _ in handles]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.monotonic()
            for handle, answer in zip(handles, answers, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        answer.tokens += list(output.generated_ids)
                    answer.first = answer.first or now
                    answer.end = now
        for answer, length in zip(answers, lengths, strict=True):
            answer.tokens = cut(answer.tokens, length)
        return answers


def open_peer(settings: Settings) -> Pipeline:
    """Exports the model if need be, and loads it."""
    try:
        import openvino_genai  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(str(error)) from error
    return Pipeline(settings)
