"""Counters of the engine as plain values; no exporter here."""

import bisect
import dataclasses
import enum

STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the classes that steps are counted in."""


@dataclasses.dataclass(slots=True)
class StepTokens:
    """Steps counted by how many tokens they compute.

    Attributes:
        counts: Steps per class of `STEP_TOKEN_BOUNDS`, and those above all.
        total: Tokens of all steps.
    """

    counts: list[int] = dataclasses.field(
        default_factory=lambda: [0] * (len(STEP_TOKEN_BOUNDS) + 1)
    )
    total: int = 0

    def observe(self, num_tokens: int) -> None:
        """Counts a step."""
        self.counts[bisect.bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1
        self.total += num_tokens


@dataclasses.dataclass(slots=True)
class EngineMetrics:
    """What an engine has done since it was made.

    Attributes:
        steps: Steps launched.
        dispatches: Compiled programs called.
        host_to_device_copies: Arrays sent to the device.
        device_to_host_copies: Arrays read back.
        mixed_steps: Steps with tokens of prompts as well as sampled ones.
        scheduled_rows: Rows of all steps.
        scheduled_tokens: Tokens computed, prompt and output.
        padded_tokens: The same with the padding of the programs that ran.
        idle_stage_steps: Stages without a microbatch, summed over the steps; the rest
            of `steps` times the stages did something.
        launch_seconds: Host time spent packing and dispatching.
        grammar_seconds: Host time spent on the grammars of structured outputs.
        kernel_fallbacks: Kernels of the accelerator that could not be used, each
            reason once; the log names them.
        step_tokens: Steps by how many tokens they compute.
    """

    steps: int = 0
    dispatches: int = 0
    host_to_device_copies: int = 0
    device_to_host_copies: int = 0
    mixed_steps: int = 0
    scheduled_rows: int = 0
    scheduled_tokens: int = 0
    padded_tokens: int = 0
    idle_stage_steps: int = 0
    launch_seconds: float = 0.0
    grammar_seconds: float = 0.0
    kernel_fallbacks: int = 0
    step_tokens: StepTokens = dataclasses.field(default_factory=StepTokens)


class BlockState(enum.IntEnum):
    """What a KV block is used for."""

    FREE = 0
    CACHED = 1
    """In no request, but found again by a prompt that begins with its content."""
    USED = 2
    SHARED = 3
    """By more than one request."""


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing and has done, to look at from any thread.

    Attributes:
        num_running: Sequences in the steps.
        num_waiting: Sequences that wait for their turn.
        block_states: `BlockState` of each KV block, those of layers that see the whole
            context first, then those of each window.
        kv_bytes: Bytes of the KV blocks of all layers, on one device of each replica.
        kv_bytes_used: Bytes of those that requests hold.
        num_prefix_queries: Prompt tokens looked for in the prefix cache.
        num_prefix_hits: Those found.
        num_preemptions: How often a sequence gave its blocks up.
        block_size: Tokens per KV block.
        step_counts: Steps by tokens; see `StepTokens`.
        step_tokens: Tokens of all steps.
    """

    num_running: int = 0
    num_waiting: int = 0
    block_states: bytes = b""
    kv_bytes: int = 0
    kv_bytes_used: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    block_size: int = 0
    step_counts: tuple[int, ...] = ()
    step_tokens: int = 0
