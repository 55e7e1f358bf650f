"""How far a batch of prompts has come, shown in the terminal."""

import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from jllm.text.embedding import Stream


class Progress:
    """A bar over the prompts, with the speed in tokens per second."""

    def __init__(self, total: int, *, is_shown: bool) -> None:
        """Begins with none of `total` prompts."""
        self._bar = tqdm(
            total=total, disable=not is_shown, desc="prompts", dynamic_ncols=True
        )
        self._began = time.perf_counter()
        self._num_tokens = 0

    def update(self, ended: Sequence[Stream]) -> None:
        """Counts prompts that ended."""
        if ended:
            self._num_tokens += sum(stream.num_tokens for stream in ended)
            speed = self._num_tokens / (time.perf_counter() - self._began)
            self._bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
            self._bar.update(len(ended))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
