"""Per-request tables that few requests need, packed into one int32 row each.

The tables of all rows of the device form one matrix `[R, X]`, so that they reach the
device in a single copy. Everything about the layout follows from the vocabulary size.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jllm.errors import InvalidRequestError
from jllm.types import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS, MAX_STOP_TOKEN_IDS

NO_TOKEN = 2**31 - 1
"""Fills unused places: past every vocabulary, so that scatters drop it."""
MAX_EOS_TOKEN_IDS = 64
"""Places for the model's own stop tokens, besides those of the request."""
MAX_BAD_WORD_TOKENS = 1024
"""Tokens of all bad words of a request."""
BITS = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowRules:
    """The rules of one request as the host knows them; the default has none.

    Attributes:
        logit_bias: Added to the scores of these ids.
        allowed_token_ids: The only ids that may be sampled; None allows all.
        stop_token_ids: Banned until the request has its least number of tokens.
        bad_words_token_ids: Token sequences that must not appear in the output.
        logprob_token_ids: Ids whose log-probabilities are returned, in this order.
    """

    logit_bias: Mapping[int, float] = dataclasses.field(
        default_factory=dict[int, float]
    )
    allowed_token_ids: Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    logprob_token_ids: Sequence[int] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of the rows of a step on the device.

    Attributes:
        allowed: Bit `i % 32` of word `i // 32` is set where id `i` may be sampled.
        bias_ids: Ids with a bias; unused places hold `NO_TOKEN`, as in all ids here.
        bias_values: What is added to their scores.
        stop_ids: Ids that are banned for the first tokens of the output.
        bad_tokens: Tokens of all bad words, one word after the other.
        bad_distances: How far each lies before the last token of its word.
        bad_ends: Index of the last token of its word.
        logprob_ids: Ids whose log-probabilities are returned.
    """

    allowed: Int[Array, "S A"]
    bias_ids: Int[Array, "S N"]
    bias_values: Float[Array, "S N"]
    stop_ids: Int[Array, "S C"]
    bad_tokens: Int[Array, "S W"]
    bad_distances: Int[Array, "S W"]
    bad_ends: Int[Array, "S W"]
    logprob_ids: Int[Array, "S L"]


@dataclasses.dataclass(frozen=True)
class RuleLayout:
    """Where each table lies in a packed row.

    Attributes:
        vocab_size: Width of the logits.
    """

    vocab_size: int

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Length of each section, in order."""
        ids = self.vocab_size  # no id is listed twice
        return {
            "allowed": math.ceil(self.vocab_size / BITS),
            "bias_ids": min(MAX_LOGIT_BIAS, ids),
            "bias_values": min(MAX_LOGIT_BIAS, ids),
            "stop_ids": min(MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS, ids),
            "bad_tokens": MAX_BAD_WORD_TOKENS,
            "bad_places": MAX_BAD_WORD_TOKENS,
            "logprob_ids": MAX_LOGPROB_TOKEN_IDS,
        }

    @cached_property
    def size(self) -> int:
        """Length `X` of a packed row."""
        return sum(self.sizes.values())

    @cached_property
    def sections(self) -> dict[str, slice]:
        """Place of each section."""
        ends = np.cumsum(list(self.sizes.values())).tolist()
        starts = [0, *ends[:-1]]
        return {
            name: slice(start, end)
            for name, start, end in zip(self.sizes, starts, ends, strict=True)
        }


def pack_rules(layout: RuleLayout, spec: RowRules) -> np.ndarray:
    """Packs the rules of one request into an int32 row of `layout.size`.

    Raises:
        InvalidRequestError: An id lies outside the vocabulary, or a table is too long.
    """
    packed = np.full(layout.size, NO_TOKEN, np.int32)
    view = {name: packed[place] for name, place in layout.sections.items()}
    view["allowed"][:] = _allowed_words(layout, spec.allowed_token_ids)
    bias = spec.logit_bias
    values = np.zeros(len(view["bias_values"]), np.float32)
    _put_ids(view["bias_ids"], layout, "logit_bias", list(bias))
    values[: len(bias)] = list(bias.values())
    view["bias_values"][:] = values.view(np.int32)
    stop_ids = list(dict.fromkeys(spec.stop_token_ids))
    _put_ids(view["stop_ids"], layout, "stop_token_ids", stop_ids)
    words = [word for word in spec.bad_words_token_ids if word]
    tokens = [token for word in words for token in word]
    _put_ids(view["bad_tokens"], layout, "bad_words", tokens)
    view["bad_places"][:] = 0
    view["bad_places"][: len(tokens)] = _bad_places(words)
    _put_ids(
        view["logprob_ids"], layout, "logprob_token_ids", list(spec.logprob_token_ids)
    )
    return packed


def unpack_rules(layout: RuleLayout, packed: Int[Array, "S X"]) -> Rules:
    """Splits packed rows on the device, by static slices."""
    part = {name: packed[:, place] for name, place in layout.sections.items()}
    return Rules(
        allowed=part["allowed"],
        bias_ids=part["bias_ids"],
        bias_values=jax.lax.bitcast_convert_type(part["bias_values"], jnp.float32),
        stop_ids=part["stop_ids"],
        bad_tokens=part["bad_tokens"],
        bad_distances=part["bad_places"] // MAX_BAD_WORD_TOKENS,
        bad_ends=part["bad_places"] % MAX_BAD_WORD_TOKENS,
        logprob_ids=part["logprob_ids"],
    )


def restrict(
    layout: RuleLayout, packed: Int[Array, "S X"], allowed: Int[Array, "S A"]
) -> Int[Array, "S X"]:
    """Takes from packed rows, on the device, the ids that `allowed` does not allow.

    Args:
        layout: Where the tables lie.
        packed: Packed rules of each row.
        allowed: Bit set per row, as in `Rules`; all ones change nothing.
    """
    place = layout.sections["allowed"]
    return packed.at[:, place].set(packed[:, place] & allowed)


def _put_ids(
    section: np.ndarray, layout: RuleLayout, field: str, ids: list[int]
) -> None:
    """Writes ids to the front of a section after checking number and range."""
    _check_ids(layout, field, ids)
    if len(ids) > len(section):
        message = f"{field} holds {len(ids)} token ids, at most {len(section)} fit"
        raise InvalidRequestError(message, parameter=field)
    section[: len(ids)] = ids


def _check_ids(layout: RuleLayout, field: str, ids: Sequence[int]) -> None:
    for token in ids:
        if not 0 <= token < layout.vocab_size:
            raise InvalidRequestError(
                f"{field} holds {token}, which is out of vocabulary: ids are between "
                f"0 and {layout.vocab_size - 1}",
                parameter=field,
            )


def _allowed_words(layout: RuleLayout, allowed: Sequence[int] | None) -> np.ndarray:
    """Bit set of the allowed ids as int32 words, all ones without restriction."""
    num_words = layout.sizes["allowed"]
    if allowed is None:
        return np.full(num_words, -1, np.int32)
    _check_ids(layout, "allowed_token_ids", allowed)
    bits = np.zeros(num_words * BITS, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def _bad_places(words: Sequence[Sequence[int]]) -> list[int]:
    """Distance and index of the last token of its word, for each token, in one int."""
    places: list[int] = []
    for word in words:
        end = len(places) + len(word) - 1
        places += [
            distance * MAX_BAD_WORD_TOKENS + end
            for distance in reversed(range(len(word)))
        ]
    return places
