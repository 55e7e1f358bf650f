"""Engine options: one frozen dataclass, validated before anything is loaded."""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jllm.errors import ConfigError
from jllm.processors import make_processors

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "random"]
AttentionImplementation = Literal[
    "auto", "reference", "blocked", "gpu_triton", "gpu_mosaic", "tpu"
]


MAX_HOST_TIMEOUT = 60.0
"""Seconds within which all hosts end once one is lost."""


def _option(default: Any, text: str, short: str | None = None) -> Any:
    metadata = {"help": text, "short": short}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How the hosts of one engine find each other, and when they give each other up.

    Attributes:
        coordinator: HOST:PORT of the first host; JAX's own service takes the port after
            it.
        num_hosts: Processes that share the engine, one per host.
        host_id: Number of this one; 0 schedules and serves, the others do as it says.
        secret_file: File with the secret that all hosts share, at least 16 bytes.
        timeout: Seconds without a sign of life or progress of a host, after which all
            end; at most 60.
        start_timeout: Seconds that hosts wait for each other while they start.
    """

    coordinator: str
    num_hosts: int
    host_id: int
    secret_file: str
    timeout: float = 45.0
    start_timeout: float = 1800.0

    def __post_init__(self) -> None:
        """Checks types and ranges; raises `ConfigError` naming field and bound."""
        host, _, port = self.coordinator.rpartition(":")
        # JAX takes the port after it.
        if not host or not port.isdecimal() or not 1 <= int(port) < 2**16 - 1:
            raise ConfigError(
                f"coordinator={self.coordinator!r} must be HOST:PORT, with a port "
                f"from 1 to {2**16 - 2}"
            )
        if self.num_hosts < 1:
            raise ConfigError(f"num_hosts={self.num_hosts} must be at least 1")
        if not 0 <= self.host_id < self.num_hosts:
            raise ConfigError(
                f"host_id={self.host_id} must be at least 0 and below "
                f"num_hosts={self.num_hosts}"
            )
        if not 0 < self.timeout <= MAX_HOST_TIMEOUT:
            raise ConfigError(
                f"host timeout={self.timeout} must be above 0 and at most "
                f"{MAX_HOST_TIMEOUT:g}"
            )
        if not self.start_timeout > 0:
            raise ConfigError(f"start_timeout={self.start_timeout} must be above 0")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def jax_address(self) -> str:
        """HOST:PORT of JAX's own service."""
        host, _, port = self.coordinator.rpartition(":")
        return f"{host}:{int(port) + 1}"

    @property
    def heartbeat(self) -> float:
        """Seconds between two signs of life."""
        return min(1.0, self.timeout / 8)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All options of the engine; the command line's flags are made from the fields."""

    model: str | None = _option(
        None, "directory or Hugging Face id; none is the embedded model"
    )
    tokenizer: str | None = _option(None, "directory or id of the tokenizer, if other")
    skip_tokenizer_init: bool = _option(False, "token ids in, token ids out")
    chat_template: str | None = _option(None, "file that replaces the model's template")
    revision: str | None = _option(None, "branch, tag or commit of a Hugging Face id")
    generation_config: Literal["auto", "vllm"] = _option(
        "auto", "auto takes sampling defaults from the model, vllm the neutral ones"
    )
    dtype: Dtype = _option(
        "auto", "type of weights, activations and KV; auto: as saved"
    )
    load_format: LoadFormat = _option("auto", "random makes weights from config.json")
    seed: int = _option(0, "seed of random weights and of requests without a seed")
    max_model_len: int | None = _option(
        None, "longest context in tokens; none takes the model's"
    )
    max_num_seqs: int | None = _option(
        None, "most requests running at once; none is 32 on CPU, 256 elsewhere"
    )
    max_num_batched_tokens: int | None = _option(
        None, "token budget of one step; none is 512 on CPU, 4096 elsewhere"
    )
    block_size: int | None = _option(
        None, "tokens per KV block; none is 128 on TPU, 16 elsewhere"
    )
    num_blocks: int | None = _option(
        None, "KV blocks in the pool; none fills the memory allowed"
    )
    memory_utilization: float | None = _option(
        None,
        "share of the device's memory for weights, KV pool and temporaries; "
        "none is 0.3 on CPU, 0.9 elsewhere",
    )
    enable_prefix_caching: bool = _option(True, "share the KV of equal prompt starts")
    overlap: bool = _option(True, "launch a step before the last one's tokens are read")
    max_logprobs: int = _option(20, "most logprobs per token; -1 is the vocabulary")
    attention: AttentionImplementation = _option(
        "auto", "attention implementation; a forced one never falls back"
    )
    tensor_parallel_size: int = _option(1, "devices that share each layer", "-tp")
    pipeline_parallel_size: int = _option(
        1, "stages that share the stack of layers, each on devices of its own", "-pp"
    )
    data_parallel_size: int = _option(1, "independent replicas of the model", "-dp")
    compile_ahead: bool = _option(
        True, "compile all sizes in the background; off: two sizes serve everything"
    )
    compilation_cache_dir: str | None = _option(
        None, "folder of compiled programs; none is the user's cache folder"
    )
    executables: str | None = _option(
        "auto",
        "folder of exported executables, filled by the first start and loaded by the "
        "next ones, which then trace and compile nothing; its files are run, so that "
        "it must be the user's own; auto loads what `jllm compile` left beside the "
        "model and exports nothing; none does neither, nor does auto with several "
        "hosts or logits_processors",
    )
    # Its own fields are flags.
    hosts: HostConfig | None = dataclasses.field(default=None, metadata={"flag": False})
    # Functions over the scores of every token; in Python only.
    logits_processors: Sequence[Any] = dataclasses.field(
        default=(), metadata={"flag": False}
    )

    def __post_init__(self) -> None:
        """Checks types and ranges; raises `ConfigError` naming field and bound."""
        for field in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "num_blocks",
        ):
            if getattr(self, field) is not None:
                self._check_integer(field, 1)
        for field in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
        ):
            self._check_integer(field, 1)
        self._check_integer("seed", 0)
        self._check_integer("max_logprobs", -1)
        for field in (
            "skip_tokenizer_init",
            "enable_prefix_caching",
            "overlap",
            "compile_ahead",
        ):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(
                    f"{field}={getattr(self, field)!r} must be true or false"
                )
        share = self.memory_utilization
        if share is not None and (
            isinstance(share, bool)
            or not isinstance(share, (int, float))  # pyright: ignore[reportUnnecessaryIsInstance]
            or not 0 < share <= 1
        ):
            raise ConfigError(
                f"memory_utilization={share!r} must be above 0 and at most 1"
            )
        self._check_choice("dtype", Dtype)
        self._check_choice("load_format", LoadFormat)
        self._check_choice("attention", AttentionImplementation)
        self._check_choice("generation_config", Literal["auto", "vllm"])
        self._check_hosts()
        self._check_processors()

    def _check_processors(self) -> None:
        processors = make_processors(self.logits_processors)
        object.__setattr__(self, "logits_processors", processors)
        if processors and self.executables not in (None, "auto"):
            raise ConfigError(
                "executables cannot be exported with logits_processors: a file cannot "
                "tell whether a function is still the same"
            )
        if processors and self.hosts is not None and self.hosts.num_hosts > 1:
            raise ConfigError("logits_processors need num_hosts=1")

    @property
    def is_follower(self) -> bool:
        """Whether this process only does what the first host tells it."""
        return self.hosts is not None and self.hosts.host_id > 0

    def _check_hosts(self) -> None:
        hosts = self.hosts
        if hosts is None:
            return
        if not isinstance(hosts, HostConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"hosts={hosts!r} must be a HostConfig")
        if hosts.num_hosts == 1:
            return
        if self.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size={self.data_parallel_size} must be 1 with several "
                "hosts: start each replica with hosts of its own"
            )
        if self.executables not in (None, "auto"):
            raise ConfigError("executables cannot be exported by several hosts")

    def _check_integer(self, field: str, low: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{field}={value!r} must be an integer, at least {low}")

    def _check_choice(self, field: str, choices: Any) -> None:
        value = getattr(self, field)
        if value not in choices.__args__:
            names = ", ".join(choices.__args__)
            raise ConfigError(f"{field}={value!r} must be one of {names}")


@dataclasses.dataclass(frozen=True, slots=True)
class WindowPool:
    """The pool of the layers that see the newest positions only.

    Attributes:
        window: Newest positions that a token sees, itself included.
        num_blocks: Blocks in the pool.
    """

    window: int
    num_blocks: int

    def __post_init__(self) -> None:
        """Raises ConfigError for a number below 1."""
        if self.window < 1 or self.num_blocks < 1:
            raise ConfigError(
                f"window={self.window} and its num_blocks={self.num_blocks} must be "
                f"at least 1"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler needs to know; all counts, no arrays.

    Attributes:
        max_num_seqs: Rows of the device table: most requests running at once.
        token_budget: Most tokens of one step.
        block_size: Tokens per KV block.
        num_blocks: Blocks in the pool of the layers that see the whole context.
        max_model_len: Most tokens of one sequence, prompt and output.
        max_block_appends: Most table entries that one step can carry.
        max_block_copies: Most copy-on-write block copies of one step.
        enable_prefix_caching: Whether full blocks are shared by content.
        max_preemptions: Most preemptions of one sequence; a sequence that has reached
            it starts only when all blocks that it can need are reserved for it.
        window_pools: The pools of the other layers, one for each window.
        num_stages: Steps that a row is on its way; it is scheduled once in so many.
    """

    max_num_seqs: int
    token_budget: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_block_appends: int
    max_block_copies: int = 8
    enable_prefix_caching: bool = True
    max_preemptions: int = 8
    window_pools: tuple[WindowPool, ...] = ()
    num_stages: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError for a limit below 1."""
        limits = {name: getattr(self, name) for name in self.__slots__}
        for name in ("max_preemptions", "enable_prefix_caching", "window_pools"):
            del limits[name]
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


def options_of(config: EngineConfig) -> dict[str, Any]:
    """The fields as keywords, `make_config` takes them back."""
    return {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }


def make_config(model: Any, options: Mapping[str, Any]) -> EngineConfig:
    """Makes the options from keywords as users write them.

    `gpu_memory_utilization` is another name of `memory_utilization`, and
    `trust_remote_code` may be given as False, which it always is.

    Raises:
        ConfigError: An option is unknown, given twice, or has a wrong value.
    """
    options = dict(options)
    if options.pop("trust_remote_code", False) is not False:
        raise ConfigError("trust_remote_code must be False: no code of a model is run")
    if "gpu_memory_utilization" in options:
        if "memory_utilization" in options:
            raise ConfigError(
                "gpu_memory_utilization and memory_utilization are the same; give one"
            )
        options["memory_utilization"] = options.pop("gpu_memory_utilization")
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    for name in options:
        if name not in fields or name == "model":
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} is no engine option{hint}")
    options["model"] = model
    for name, value in options.items():
        if fields[name].type == str | None:
            if isinstance(value, os.PathLike):
                options[name] = value = os.fspath(value)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}={value!r} must be a string")
    return EngineConfig(**options)
