"""transformers' `generate`: static batches, padded on the left to one length."""

import time
from typing import Any

from benchmarks.peers.protocol import Answer, NotInstalledError, Settings, cut


def load_model(settings: Settings) -> tuple[Any, str]:
    """The model of a checkpoint and the library's version."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise NotInstalledError(str(error)) from error
    torch.set_num_threads(settings.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.folder, dtype=getattr(torch, settings.dtype)
    )
    # The model's own would forbid end tokens, where the others ignore them.
    model.generation_config = transformers.GenerationConfig()
    return model.eval(), f"{transformers.__version__}, torch {torch.__version__}"


class Generate:
    """Batches of at most `max_num_seqs` prompts, each run to its longest output."""

    def __init__(self, settings: Settings) -> None:
        self._model, self.version = load_model(settings)
        self._max_num_seqs = settings.max_num_seqs

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        """See `Peer`; surplus tokens of the shorter requests are dropped."""
        answers: list[Answer] = []
        for start in range(0, len(prompts), self._max_num_seqs):
            batch = slice(start, start + self._max_num_seqs)
            answers += self._batch(prompts[batch], lengths[batch])
        return answers

    def _batch(self, prompts: list[list[int]], lengths: list[int]) -> list[Answer]:
        import torch

        width, longest = max(map(len, prompts)), max(lengths)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=longest,
                pad_token_id=0,
            )
        ended = time.monotonic()
        return [
            Answer(cut(row[width : width + length].tolist(), length), end=ended)
            for row, length in zip(out, lengths, strict=True)
        ]


def open_peer(settings: Settings) -> Generate:
    """Loads the model."""
    return Generate(settings)
