"""Every field of the requests of OpenAI and vLLM does something, or is refused."""

import ast
import pathlib

import pytest

from server.protocol.chat import ChatCompletionRequest
from server.protocol.completions import CompletionRequest
from server.protocol.responses import ResponsesRequest
from server.protocol.unsupported import UNSUPPORTED, UNSUPPORTED_IN_RESPONSES
from server.sampling import COMMON_NAMES, SAMPLING_NAMES
from tests.server.fakes import MODEL

ROOT = pathlib.Path(__file__).parents[2]
COMPLETIONS = """
add_special_tokens allowed_token_ids bad_words best_of cache_salt ec_transfer_params
echo frequency_penalty ignore_eos include_stop_str_in_output kv_transfer_params
length_penalty logit_bias logprob_token_ids logprobs max_tokens min_p min_tokens
mm_payload model n presence_penalty priority prompt prompt_embeds prompt_logprobs
repetition_detection repetition_penalty request_id response_format return_mm_kwargs
return_token_ids return_token_offsets return_tokens_as_token_ids
return_weight_versions routed_experts_prompt_start seed session_id
skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream
stream_interval stream_options structured_outputs suffix temperature
thinking_token_budget top_k top_p truncate_prompt_tokens truncation_side
use_beam_search user vllm_xargs watermarking
"""
CHAT = """
add_generation_prompt add_special_tokens allowed_token_ids audio bad_words
cache_salt chat_template chat_template_kwargs continue_final_message documents
ec_transfer_params echo frequency_penalty function_call functions ignore_eos
include_reasoning include_stop_str_in_output kv_transfer_params length_penalty
logit_bias logprob_token_ids logprobs max_completion_tokens max_tokens
media_io_kwargs messages metadata min_p min_tokens mm_payload mm_processor_kwargs
modalities model moderation n parallel_tool_calls prediction presence_penalty
priority prompt_cache_key prompt_cache_options prompt_cache_retention
prompt_logprobs reasoning_effort repetition_detection repetition_penalty request_id
response_format return_mm_kwargs return_prompt_text return_token_ids
return_token_offsets return_tokens_as_token_ids return_weight_versions
routed_experts_prompt_start safety_identifier seed service_tier session_id
skip_special_tokens spaces_between_special_tokens stop stop_token_ids store stream
stream_interval stream_options structured_outputs temperature thinking_token_budget
tool_choice tools top_k top_logprobs top_p truncate_prompt_tokens truncation_side
use_beam_search user verbosity vllm_xargs watermarking web_search_options
"""
RESPONSES = """
access_programs background background_options cache_salt chat_template_kwargs
context_management conversation ec_transfer_params enable_response_messages
frequency_penalty ignore_eos image include include_reasoning
include_stop_str_in_output input instructions kv_transfer_params logit_bias
max_output_tokens max_tool_calls media_io_kwargs metadata min_p mm_payload
mm_processor_kwargs model moderation parallel_tool_calls presence_penalty
previous_input_messages previous_response_id priority prompt prompt_cache_key
prompt_cache_options prompt_cache_retention reasoning repetition_penalty request_id
return_mm_kwargs safety_identifier seed service_tier session_id skip_special_tokens
spaces_between_special_tokens stop stop_token_ids store stream stream_options
structured_outputs temperature text tool_choice tools top_k top_logprobs top_p
truncation user vllm_xargs watermarking
"""
# For the client's own books, or hints that change no answer; see server/DESIGN.md.
HINTS = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
KINDS = [
    (CompletionRequest, COMPLETIONS),
    (ChatCompletionRequest, CHAT),
    (ResponsesRequest, RESPONSES),
]


@pytest.mark.parametrize(("kind", "names"), KINDS)
def test_every_field_is_known(kind, names):
    refused = set(UNSUPPORTED)
    if kind is ResponsesRequest:
        refused |= set(UNSUPPORTED_IN_RESPONSES)
    assert set(names.split()) - set(kind.model_fields) - refused == set()


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_every_field_that_is_accepted_is_read(kind):
    read = {*SAMPLING_NAMES, *COMMON_NAMES}
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and "protocol" not in path.parts:
                read.add(node.value)
    assert set(kind.model_fields) - read - HINTS == set()


def test_what_cannot_be_honoured_is_refused_by_name(serve):
    async def body(running):
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        for name in UNSUPPORTED:
            status, _, answer = await running.post(
                "/v1/chat/completions", chat | {name: {"some": "thing"}}
            )
            assert (status, answer["error"]["param"]) == (400, name)
        for name in UNSUPPORTED_IN_RESPONSES:
            ask = {"model": MODEL, "input": "hi"}
            status, _, answer = await running.post("/v1/responses", ask | {name: "x"})
            assert (status, answer["error"]["param"]) == (400, name)
            assert (await running.post("/v1/responses", ask | {name: None}))[0] == 200

    serve(body)
