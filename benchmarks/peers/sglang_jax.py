"""sglang-jax on a processor, with its native attention.

Head widths below 128 fail there (its cache is padded, the products are not), and a
step's attention is computed over all rows and all cached tokens at once, so that the
pool is kept small.
"""

from typing import Any

from benchmarks.peers.protocol import Answer, NotInstalledError, Settings, cut

MAX_ROWS = 8


class Engine:
    """`sgl_jax.Engine` cut down to what fits a small machine."""

    def __init__(self, settings: Settings) -> None:
        from sgl_jax.srt.entrypoints.engine import Engine as SglEngine
        from sgl_jax.version import __version__

        self.version = __version__
        rows = min(settings.max_num_seqs, MAX_ROWS)
        self._engine: Any = SglEngine(
            model_path=settings.folder,
            device="cpu",
            attention_backend="native",
            dtype=settings.dtype,
            skip_tokenizer_init=True,
            context_length=settings.max_model_len,
            max_running_requests=rows,
            max_total_tokens=rows * settings.max_model_len,
            max_prefill_tokens=settings.max_model_len,
            chunked_prefill_size=settings.max_model_len,
            precompile_bs_paddings=[1, rows],
            precompile_token_paddings=[settings.max_model_len],
            skip_server_warmup=True,
        )

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """See `Peer`."""
        params = [
            {"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True}
            for length in lengths
        ]
        outputs = self._engine.generate(input_ids=prompts, sampling_params=params)
        return [
            Answer(
                cut(output["output_ids"], length),
                cached=output["meta_info"].get("cached_tokens"),
            )
            for output, length in zip(outputs, lengths, strict=True)
        ]


def open_peer(settings: Settings) -> Engine:
    """Loads the model and compiles its shapes."""
    import importlib.util

    if importlib.util.find_spec("sgl_jax") is None:
        raise NotInstalledError("No module named 'sgl_jax'")
    return Engine(settings)
