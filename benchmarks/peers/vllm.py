"""vLLM, its engine in the worker's process."""

import os
from typing import Any

from benchmarks.peers.protocol import Answer, NotInstalledError, Settings, cut

GIB_OF_CACHE = 2


class Engine:
    """`vllm.LLM` with its defaults: prefix cache on."""

    def __init__(self, settings: Settings) -> None:
        # Otherwise a core is kept free, which on a small machine is half of it.
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{settings.threads - 1}"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(GIB_OF_CACHE)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        import vllm

        self.version = vllm.__version__
        self._llm: Any = vllm.LLM(
            model=settings.folder,
            dtype=settings.dtype,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            skip_tokenizer_init=True,
            disable_log_stats=False,
        )

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """See `Peer`."""
        import vllm

        params = [
            vllm.SamplingParams(
                temperature=0, max_tokens=length, ignore_eos=True, detokenize=False
            )
            for length in lengths
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [
            Answer(
                cut(list(output.outputs[0].token_ids), length),
                first=getattr(output.metrics, "first_token_ts", None),
                end=getattr(output.metrics, "last_token_ts", None),
                cached=output.num_cached_tokens,
            )
            for output, length in zip(outputs, lengths, strict=True)
        ]


def open_peer(settings: Settings) -> Engine:
    """Loads and compiles the model."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise NotInstalledError("No module named 'vllm'")
    return Engine(settings)
