"""Answers of /v1/models and of the routes that tell about the server."""

from typing import Literal

from server.protocol.base import AnswerModel


class ModelCard(AnswerModel):
    """One name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(AnswerModel):
    """All names."""

    object: Literal["list"]
    data: list[ModelCard]


class StatusResponse(AnswerModel):
    """Where the process is in its life."""

    status: str


class VersionResponse(AnswerModel):
    """The release that runs."""

    version: str


class BlockCounts(AnswerModel):
    """KV blocks by what they are used for."""

    free: int
    cached: int
    used: int
    shared: int


class EngineState(AnswerModel):
    """What the engine is doing, for a live view."""

    status: str
    model: str
    running: int
    waiting: int
    blocks: BlockCounts
    block_size: int
    block_map: str
    prompt_tokens_total: int
    generation_tokens_total: int
    tokens_per_second: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int
    seconds_since_step: float
    time: float
