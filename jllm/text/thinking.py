"""The reasoning of a model in tokens: what its budget counts, what ends it."""

from collections.abc import Sequence

from jllm.errors import ConfigError, InvalidRequestError
from jllm.sampling.thinking import Thinking
from jllm.text.parsers.harmony import Harmony
from jllm.text.parsers.registry import reasoning_format
from jllm.text.tokenizer import Tokenizer
from jllm.types import SamplingParams

_MAX_TAIL = 64
"""Tokens at the end of a prompt that tell whether it ends within reasoning."""


def make_thinking(
    tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]
) -> Thinking | None:
    """What bounds the reasoning of an output.

    Args:
        tokenizer: Of the model.
        params: Their `reasoning_parser` is set.
        prompt_token_ids: The prompt, which may end within reasoning.

    Returns:
        None where nothing has to be done about it.

    Raises:
        InvalidRequestError: There is no such parser, or it cannot have a budget
            together with structured output.
    """
    budget = params.thinking_token_budget
    budget = None if budget == -1 else budget
    has_grammar = params.structured_outputs is not None
    if budget is None and not has_grammar:
        return None
    try:
        form = reasoning_format(str(params.reasoning_parser))
    except ConfigError as error:
        raise InvalidRequestError(str(error), parameter="reasoning_parser") from error
    if isinstance(form, Harmony) and has_grammar:
        # Behind its reasoning stands the head of the next message, no answer yet; a
        # grammar for this format describes messages.
        if budget is not None:
            raise InvalidRequestError(
                f"thinking_token_budget={budget} cannot be had with structured output "
                f"in the format {params.reasoning_parser}",
                parameter="thinking_token_budget",
            )
        return None
    is_open = form.opened_by(
        tokenizer.decode(prompt_token_ids[-_MAX_TAIL:], skip_special=False)
    )
    if is_open is None and not isinstance(form, Harmony) and form.opens_by_default:
        is_open = True

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    return Thinking(
        start_ids=ids(form.opener),
        end_ids=ids(form.closer),
        other_ends=tuple(ids(opener) for opener in sorted(form.call_openers)),
        budget=budget,
        is_open=is_open,
    )
