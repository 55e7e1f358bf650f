"""The microbatches in the stages of a pipeline, as the host knows them."""

import collections

from jllm.engine.admission import Job
from jllm.scheduler.plan import NO_DECODE_ROWS, StepPlan

NO_PLAN = StepPlan(0, NO_DECODE_ROWS, (), 0)
"""What a stage has that nothing has come to yet."""


class Stages:
    """What each stage computes in the step that is being launched.

    A program must hold what any of them has. With one stage that is the step's own
    plan, which goes in and comes out at once.
    """

    def __init__(self, num_stages: int) -> None:
        """Starts empty."""
        nothing: list[Job] = []
        self._held: collections.deque[tuple[StepPlan, list[Job]]] = collections.deque(
            [(NO_PLAN, nothing)] * (num_stages - 1)
        )

    def enter(self, plan: StepPlan, jobs: list[Job]) -> None:
        """Gives the first stage a plan, with the sequences of its rows."""
        self._held.append((plan, jobs))

    def leave(self) -> None:
        """Takes it from the last stage what comes out of it in this step."""
        self._held.popleft()

    @property
    def oldest(self) -> tuple[StepPlan, list[Job]]:
        """What the last stage has: its tokens come out of the step."""
        return self._held[0]

    @property
    def are_busy(self) -> bool:
        """Whether any has something to compute."""
        return any(plan.num_rows for plan, _ in self._held)

    @property
    def num_idle(self) -> int:
        """Stages that have nothing to compute."""
        return sum(not plan.num_rows for plan, _ in self._held)

    @property
    def decode_only(self) -> bool:
        """Whether every row of all of them computes the token that it sampled last."""
        return all(plan.is_decode for plan, _ in self._held)

    @property
    def most_rows(self) -> int:
        """Rows of the largest plan."""
        return max(plan.num_rows for plan, _ in self._held)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest plan."""
        return max(plan.num_tokens for plan, _ in self._held)
