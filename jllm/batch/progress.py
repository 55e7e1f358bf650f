"""How far a job has come, shown in the terminal, and what it costs."""

import time
from typing import Self

from tqdm import tqdm

from jllm.batch.records import Answer

SECONDS_PER_HOUR = 3600
MILLION = 1_000_000


class Progress:
    """A bar over the lines of a job, with speed, and cost where a price is known."""

    def __init__(
        self, total: int, *, is_shown: bool, price_per_hour: float | None = None
    ) -> None:
        """Begins with none of `total` lines.

        Args:
            total: Lines of the job.
            is_shown: Whether there is a bar.
            price_per_hour: Dollars that an hour of this worker costs.
        """
        self._bar = tqdm(
            total=total, disable=not is_shown, desc="lines", dynamic_ncols=True
        )
        self._price_per_hour = price_per_hour
        self._began: float | None = None
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_lines = 0

    def begin(self) -> None:
        """Starts the clock, when the model is loaded."""
        self._began = time.monotonic()
        self._bar.reset(total=self._bar.total)

    def skip(self, count: int) -> None:
        """Counts lines that others have done, or this worker before it was stopped."""
        if not self._bar.disable:
            # The time left is told from the lines of this worker alone.
            self._bar.initial += count
            self._bar.update(count)

    def update(self, answer: Answer) -> None:
        """Counts a line."""
        self.num_prompt_tokens += answer.num_prompt_tokens
        self.num_output_tokens += answer.num_output_tokens
        self.num_lines += 1
        self._bar.set_postfix_str(self.speed, refresh=False)
        self._bar.update(1)

    @property
    def seconds(self) -> float:
        """How long this worker has worked."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def dollars_per_million(self) -> float | None:
        """What a million tokens cost, read and generated ones; None if not known."""
        tokens = self.num_prompt_tokens + self.num_output_tokens
        if self._price_per_hour is None or not tokens:
            return None
        price = self._price_per_hour * self.seconds / SECONDS_PER_HOUR
        return price * MILLION / tokens

    @property
    def speed(self) -> str:
        """Tokens per second, and what they cost, in words."""
        seconds = max(self.seconds, 1e-9)
        text = (
            f"{self.num_prompt_tokens / seconds:.0f} prompt and "
            f"{self.num_output_tokens / seconds:.0f} output tokens/s"
        )
        cost = self.dollars_per_million
        return text if cost is None else f"{text}, ${cost:.4g} per million"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
