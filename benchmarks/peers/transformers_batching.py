"""transformers' continuous batching over a paged cache."""

from typing import Any

from benchmarks.peers.protocol import Answer, Settings, cut
from benchmarks.peers.transformers_generate import load_model

TIMEOUT = 600
BLOCK_SIZE = 16


class ContinuousBatching:
    """One manager for all passes, fed by `add_request`."""

    def __init__(self, settings: Settings) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        model, self.version = load_model(settings)
        blocks_per_row = -(-settings.max_model_len // BLOCK_SIZE) + 1
        self._manager: Any = model.init_continuous_batching(
            GenerationConfig(
                do_sample=False, eos_token_id=-1, max_new_tokens=settings.max_model_len
            ),
            ContinuousBatchingConfig(
                num_blocks=settings.max_num_seqs * blocks_per_row,
                block_size=BLOCK_SIZE,
                max_batch_tokens=512,
            ),
        )
        self._manager.start()

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """See `Peer`."""
        ids = [
            self._manager.add_request(
                prompt, max_new_tokens=length, eos_token_id=-1, record_timestamps=True
            )
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        outputs: dict[str, Any] = {}
        while len(outputs) < len(ids):
            output = self._manager.get_result(timeout=TIMEOUT)
            if output is None or output.error:
                raise RuntimeError(f"no result: {output and output.error}")
            if output.is_finished():
                outputs[output.request_id] = output
        return [
            Answer(cut(outputs[key].generated_tokens, length))
            for key, length in zip(ids, lengths, strict=True)
        ]


def open_peer(settings: Settings) -> ContinuousBatching:
    """Loads the model and starts its thread."""
    return ContinuousBatching(settings)
