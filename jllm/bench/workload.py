"""What is asked of an engine: prompts of token ids and the lengths of their outputs."""

import csv
import dataclasses
import datetime as dt
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jllm.errors import InvalidRequestError

DatasetName = Literal["random", "prefix_repetition", "azure", "timed_trace"]
FIRST_TOKEN = 3
"""Smaller ids are often special."""


@dataclasses.dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request.

    Attributes:
        prompt_token_ids: Its prompt.
        max_tokens: Tokens that it generates, whatever they are.
        arrival: Seconds at which it came in a trace; None without one.
    """

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    arrival: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        name: Of the dataset, with its lengths.
        requests: At least one.
        num_cut: Requests shortened to the longest context.
    """

    name: str
    requests: tuple[BenchRequest, ...]
    num_cut: int = 0

    @property
    def digest(self) -> str:
        """Hash of all prompts and lengths."""
        digest = hashlib.blake2b(digest_size=8)
        for request in self.requests:
            digest.update(repr((request.prompt_token_ids, request.max_tokens)).encode())
        return digest.hexdigest()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that all requests generate."""
        return sum(request.max_tokens for request in self.requests)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """Which requests; flags are made from the fields.

    Attributes:
        dataset_name: random: lengths given below; prefix_repetition: groups that share
            a prefix; azure: CSV of the Azure LLM inference traces; timed_trace: JSONL
            with the hashes of shared blocks, as Mooncake's traces.
        dataset_path: File of a trace.
        num_prompts: Number of requests; of a trace, the first so many.
        random_input_len: Mean prompt tokens.
        random_output_len: Mean output tokens.
        random_range_ratio: Lengths are uniform within this share of the mean.
        random_prefix_len: Tokens that all prompts share, besides their own.
        prefix_repetition_prefix_len: Tokens shared within a group.
        prefix_repetition_suffix_len: Tokens of each prompt's own.
        prefix_repetition_num_prefixes: Groups.
        prefix_repetition_output_len: Output tokens.
        timed_trace_chunk_hash_size: Tokens that one hash of the trace stands for.
        length_scale: Factor of all lengths of a trace.
        seed: Of the tokens, lengths and arrivals.
    """

    dataset_name: DatasetName = "random"
    dataset_path: str | None = None
    num_prompts: int = 64
    random_input_len: int = 128
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 128
    prefix_repetition_num_prefixes: int = 4
    prefix_repetition_output_len: int = 128
    timed_trace_chunk_hash_size: int = 512
    length_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges; raises `InvalidRequestError` naming field and bound."""
        at_least = {"random_prefix_len": 0, "seed": 0}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), at_least.get(field.name, 1)
            if field.type is int and value < low:
                raise InvalidRequestError(
                    f"{field.name}={value} must be at least {low}"
                )
        if not 0 <= self.random_range_ratio < 1:
            raise InvalidRequestError(
                f"random_range_ratio={self.random_range_ratio} must be in [0, 1)"
            )
        if not self.length_scale > 0:
            raise InvalidRequestError(
                f"length_scale={self.length_scale} must be above 0"
            )
        is_trace = self.dataset_name in ("azure", "timed_trace")
        if is_trace and self.dataset_path is None:
            raise InvalidRequestError(
                f"dataset_name={self.dataset_name!r} needs dataset_path"
            )
        if not is_trace and self.dataset_path is not None:
            raise InvalidRequestError(
                f"dataset_path is not read for dataset_name={self.dataset_name!r}"
            )


def make_workload(
    options: WorkloadOptions,
    *,
    vocab_size: int,
    max_model_len: int | None = None,
    repetition: int = 0,
) -> Workload:
    """Makes the requests.

    Each repetition has the same lengths with other tokens, so that no prefix cache
    knows them from the one before.

    Raises:
        InvalidRequestError: The trace cannot be read, or has a malformed row.
    """
    tokens = _Tokens(vocab_size, options.seed, repetition)
    makers = {
        "random": _random,
        "prefix_repetition": _prefix_repetition,
        "azure": _azure,
        "timed_trace": _timed_trace,
    }
    requests = makers[options.dataset_name](options, tokens)
    if not requests:
        raise InvalidRequestError(f"dataset_path={options.dataset_path!r} has no row")
    cut = [_cut(request, max_model_len) for request in requests]
    return Workload(
        name=_name(options),
        requests=tuple(cut),
        num_cut=sum(a is not b for a, b in zip(cut, requests, strict=True)),
    )


class _Tokens:
    """Draws token ids; the same for the same name, seed and repetition."""

    def __init__(self, vocab_size: int, seed: int, repetition: int) -> None:
        self._ids = range(min(FIRST_TOKEN, vocab_size - 1), vocab_size)
        self._stream = f"{seed}/{repetition}"

    def draw(self, name: str, count: int) -> tuple[int, ...]:
        return tuple(
            random.Random(f"{self._stream}/{name}").choices(self._ids, k=count)
        )


def _random(options: WorkloadOptions, tokens: _Tokens) -> list[BenchRequest]:
    rng = random.Random(options.seed)
    prefix = tokens.draw("prefix", options.random_prefix_len)
    requests: list[BenchRequest] = []
    for number in range(options.num_prompts):
        num_input = _draw_length(rng, options.random_input_len, options)
        num_output = _draw_length(rng, options.random_output_len, options)
        own = tokens.draw(f"own {number}", num_input)
        requests.append(BenchRequest(prefix + own, num_output))
    return requests


def _draw_length(rng: random.Random, mean: int, options: WorkloadOptions) -> int:
    reach = int(mean * options.random_range_ratio)
    return max(1, rng.randint(mean - reach, mean + reach))


def _prefix_repetition(options: WorkloadOptions, tokens: _Tokens) -> list[BenchRequest]:
    """Groups of equal size, one request of each in turn."""
    num_groups = options.prefix_repetition_num_prefixes
    prefixes = [
        tokens.draw(f"prefix {group}", options.prefix_repetition_prefix_len)
        for group in range(num_groups)
    ]
    return [
        BenchRequest(
            prefixes[number % num_groups]
            + tokens.draw(f"own {number}", options.prefix_repetition_suffix_len),
            options.prefix_repetition_output_len,
        )
        for number in range(options.num_prompts)
    ]


def _azure(options: WorkloadOptions, tokens: _Tokens) -> list[BenchRequest]:
    """Rows of TIMESTAMP, ContextTokens, GeneratedTokens; the prompts share nothing."""
    requests: list[BenchRequest] = []
    path = _path(options)
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                if number == options.num_prompts:
                    break
                count = _scaled(int(row["ContextTokens"]), options)
                when = dt.datetime.fromisoformat(row["TIMESTAMP"][:26])
                requests.append(
                    BenchRequest(
                        tokens.draw(f"own {number}", count),
                        _scaled(int(row["GeneratedTokens"]), options),
                        when.replace(tzinfo=dt.UTC).timestamp(),
                    )
                )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise _unreadable(path, len(requests) + 2, error) from error
    return requests


def _timed_trace(options: WorkloadOptions, tokens: _Tokens) -> list[BenchRequest]:
    """Objects with timestamp (ms), input_length, output_length and hash_ids.

    Equal hashes stand for equal blocks of tokens; the last block may be cut.
    """
    requests: list[BenchRequest] = []
    path = _path(options)
    size = max(1, round(options.timed_trace_chunk_hash_size * options.length_scale))
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number == options.num_prompts:
                    break
                row = json.loads(line)
                count = _scaled(int(row["input_length"]), options)
                prompt = _blocks(row["hash_ids"], number, count, size, tokens)
                requests.append(
                    BenchRequest(
                        prompt,
                        _scaled(int(row["output_length"]), options),
                        float(row["timestamp"]) / 1000,
                    )
                )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise _unreadable(path, len(requests) + 1, error) from error
    return requests


def _blocks(
    hashes: Sequence[Any], number: int, count: int, size: int, tokens: _Tokens
) -> tuple[int, ...]:
    """The blocks that the hashes stand for; what they leave open is the row's own."""
    prompt: tuple[int, ...] = ()
    for value in hashes:
        prompt += tokens.draw(f"block {value}", size)
    missing = max(0, count - len(prompt))
    return prompt[:count] + tokens.draw(f"own {number}", missing)


def _path(options: WorkloadOptions) -> Path:
    assert options.dataset_path is not None
    return Path(options.dataset_path).expanduser()


def _unreadable(path: Path, line: int, error: Exception) -> InvalidRequestError:
    kind = type(error).__name__
    return InvalidRequestError(
        f"dataset_path={str(path)!r}, line {line}, is no such trace: {kind}: {error}"
    )


def _scaled(length: int, options: WorkloadOptions) -> int:
    return max(1, round(length * options.length_scale))


def _cut(request: BenchRequest, max_model_len: int | None) -> BenchRequest:
    """Shortens the output, then the prompt, to what a context holds."""
    prompt = request.prompt_token_ids
    if max_model_len is None or len(prompt) + request.max_tokens <= max_model_len:
        return request
    num_output = min(request.max_tokens, max(1, max_model_len // 2))
    num_output = max(num_output, min(request.max_tokens, max_model_len - len(prompt)))
    return dataclasses.replace(
        request,
        prompt_token_ids=prompt[: max_model_len - num_output],
        max_tokens=num_output,
    )


def _name(options: WorkloadOptions) -> str:
    if options.dataset_name == "random":
        shared = f"{options.random_prefix_len}+" if options.random_prefix_len else ""
        ratio = options.random_range_ratio
        around = f" +-{100 * ratio:g} %" if ratio else ""
        lengths = f"{options.random_input_len}/{options.random_output_len}"
        return f"random {shared}{lengths}{around}"
    if options.dataset_name == "prefix_repetition":
        return (
            f"{options.prefix_repetition_num_prefixes} prefixes of "
            f"{options.prefix_repetition_prefix_len}+"
            f"{options.prefix_repetition_suffix_len}/"
            f"{options.prefix_repetition_output_len}"
        )
    scale = f" x {options.length_scale:g}" if options.length_scale != 1 else ""
    return f"{_path(options).name}{scale}"
