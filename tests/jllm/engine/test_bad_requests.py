"""Bad requests are refused before they are queued, and hurt nobody else."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from jllm.errors import ConfigError, ContextTooLongError, InvalidRequestError
from jllm.types import SamplingParams
from pallas_kernels.ragged_attention import blocked
from tests.engines import drain, make_engine, request, run, shared_engine, tokens_of

VOCAB = 331


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ((), {}, "empty"),
        ((3, VOCAB), {}, "out of vocabulary"),
        ((3, -1), {}, "out of vocabulary"),
        (range(3, 3 + 256), {}, "max_model_len"),
        ((3,), {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ((3,), {"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ((3,), {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ((3,), {"logprob_token_ids": [VOCAB]}, "logprob_token_ids"),
        ((3,), {"bad_words_token_ids": ((VOCAB,),)}, "bad_words"),
        ((3,), {"logprobs": 21}, "max_logprobs=20"),
        ((3,), {"logprobs": -1}, "max_logprobs=20"),
        ((3,), {"prompt_logprobs": 21}, "max_logprobs=20"),
    ],
)
def test_refused_and_nothing_queued(prompt, params, word):
    engine = shared_engine()
    with pytest.raises(InvalidRequestError, match=word):
        engine.add(request("bad", prompt, **params))
    assert not engine.has_unfinished
    assert engine.num_open == 0
    run(engine, [request("good", (3, 4, 5), temperature=0, max_tokens=2)])


def test_an_id_in_use_is_refused():
    engine = shared_engine()
    engine.add(request("same", (3, 4), max_tokens=3))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(request("same", (3, 4), max_tokens=3))
    drain(engine)


def test_a_request_that_can_never_fit_is_refused():
    engine = make_engine(num_blocks=4)
    assert engine.limits.max_model_len == 64
    with pytest.raises(ContextTooLongError):
        engine.add(request("long", range(3, 70)))
    engine.close()


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.inf}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "a", "detokenize": False}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": -2}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"output_kind": "all"}, "output_kind"),
    ],
)
def test_parameters_out_of_range_name_their_field(params, field):
    with pytest.raises(InvalidRequestError, match=f"^{field}=") as error:
        SamplingParams(**params)
    assert error.value.parameter == field


def test_a_row_that_is_not_finite_fails_alone():
    """Poisons the embedding of one token; only requests that contain it fail."""
    engine = make_engine()
    good = request("good", range(3, 40), temperature=0, max_tokens=8, ignore_eos=True)
    expected = run(engine, [good])
    poisoned = 300
    weights = dict(engine.weights)
    weights["embed"] = weights["embed"].at[poisoned].set(jnp.nan)
    engine.executor.weights = weights
    engine.add(request("bad", [*range(50, 90), poisoned, 5, 6], max_tokens=8))
    engine.add(good)
    outputs = drain(engine)
    assert tokens_of(outputs)[("good", 0)] == expected[("good", 0)]
    (failed,) = [output for output in outputs if output.request_id == "bad"]
    assert failed.finish_reason == "error"
    assert "finite" in failed.error
    # Its blocks were freed, not cached, and do no harm to whoever gets them next.
    hits = engine.scheduler.num_prefix_hits
    again = request("again", [*range(50, 90), 7], temperature=0, max_tokens=8)
    for item in (again, dataclasses.replace(good, cache_salt="other")):
        engine.add(item)
        assert all(output.finish_reason != "error" for output in drain(engine))
    assert engine.scheduler.num_prefix_hits == hits
    engine.scheduler.check_integrity()
    assert engine.scheduler.num_free_blocks == 256
    engine.close()


@pytest.mark.parametrize("attention", ["gpu_triton", "gpu_mosaic", "tpu"])
def test_kernels_of_another_device_are_refused(attention):
    with pytest.raises(ConfigError, match=f"attention='{attention}' needs a .* a CPU"):
        make_engine(attention=attention)


def test_a_forced_kernel_that_cannot_run_the_model_is_named(monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("head width 24 is odd")

    monkeypatch.setattr(blocked, "ragged_attention_blocked", refuse)
    with pytest.raises(ConfigError, match=r"'blocked' cannot run .*: head width 24"):
        make_engine(attention="blocked")
