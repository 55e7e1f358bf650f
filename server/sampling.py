"""From the fields of a request to the engine's sampling parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm import RequestOutputKind, SamplingParams, StructuredOutputsParams
from server.errors import bad_request
from server.protocol.base import CommonFields, SamplingFields

SAMPLING_NAMES = tuple(SamplingFields.model_fields)
COMMON_NAMES = ("prompt_logprobs", "logprob_token_ids")
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def make_params(
    fields: SamplingFields, defaults: SamplingParams, **settings: Any
) -> SamplingParams:
    """Merges the model's defaults, the fields given, and what the API decides.

    With `top_p=0` only the best token is left, which is what greedy means.

    Raises:
        InvalidRequestError: A value or a combination is wrong.
    """
    given = _given(fields, SAMPLING_NAMES)
    if isinstance(fields, CommonFields):
        given |= _given(fields, COMMON_NAMES)
        keep = fields.truncate_prompt_tokens
        if keep == 0:
            raise bad_request(
                "truncate_prompt_tokens must be -1 or at least 1",
                "truncate_prompt_tokens",
                "invalid_value",
            )
        given["truncate_prompt_tokens"] = keep
    if given.get("top_p") == 0:
        given |= {"top_p": 1.0, "temperature": 0.0}
    if "logit_bias" in given:
        given["logit_bias"] = {int(k): v for k, v in given["logit_bias"].items()}
    kind = settings.pop("is_stream", False)
    given["output_kind"] = (
        RequestOutputKind.DELTA if kind else RequestOutputKind.FINAL_ONLY
    )
    base = {"max_tokens": None}
    return dataclasses.replace(defaults, **base | given | settings)


def structured_outputs(fields: CommonFields) -> StructuredOutputsParams | None:
    """The form that the output must have, whichever way it is asked for.

    Raises:
        ApiError: More than one is asked for, or an unknown one.
        InvalidRequestError: The form itself is wrong.
    """
    asked: list[Mapping[str, Any] | None] = [fields.structured_outputs]
    if fields.response_format is not None:
        asked.append(format_constraint("response_format", fields.response_format))
    for name, kind in GUIDED.items():
        if getattr(fields, name) is not None:
            asked.append({kind: getattr(fields, name)})
    return one_constraint(*asked)


def constraint_name(fields: CommonFields) -> str:
    """The field that `structured_outputs` reads the form from."""
    names = ("structured_outputs", "response_format", *GUIDED)
    return next((name for name in names if getattr(fields, name) is not None), "tools")


def one_constraint(
    *forms: Mapping[str, Any] | None,
) -> StructuredOutputsParams | None:
    """Makes parameters of the one form that is given; see `structured_outputs`."""
    asked = [form for form in forms if form is not None]
    if len(asked) > 1:
        raise bad_request(
            "only one of response_format and structured_outputs can be given",
            "structured_outputs",
            "invalid_value",
        )
    if not asked:
        return None
    known = {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    for name in asked[0]:
        if name not in known:
            raise bad_request(
                f"structured_outputs has no field {name[:100]!r}",
                f"structured_outputs.{name[:100]}",
                "unknown_parameter",
            )
    return StructuredOutputsParams(**asked[0])


def format_constraint(name: str, value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a response format demands; plain text demands nothing.

    Args:
        name: Of the field, which Responses calls text.format and fills otherwise.
        value: The format.

    Raises:
        ApiError: There is no such format, or its schema is missing.
    """
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        # Responses has the fields of json_schema beside the type.
        inner = value.get("json_schema") if name == "response_format" else value
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if schema is None:
            raise bad_request(
                f"{name}.json_schema must hold a schema",
                f"{name}.json_schema",
                "missing_required_parameter",
            )
        return {"json": schema}
    if kind == "structural_tag":
        return {"structural_tag": dict(value)}
    raise bad_request(
        f"{name}.type must be text, json_object, json_schema or structural_tag",
        f"{name}.type",
        "invalid_value",
    )


def _given(fields: SamplingFields, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(fields, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
