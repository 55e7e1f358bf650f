"""Prompt log-probabilities: what they hold in memory, and where they begin."""

import pytest

from jllm.engine.memory import sampler_bytes
from jllm.errors import InvalidRequestError
from tests.engines import LLAMA, drain, make_engine, request, shared_engine

LARGE_VOCABULARY = {**LLAMA, "vocab_size": 20_000, "max_position_embeddings": 4096}


@pytest.mark.slow
def test_tokens_times_vocabulary_is_never_in_memory():
    """Of the logits a fixed number of rows, however many tokens a step has."""
    temporaries = []
    for num_tokens in (512, 2048):
        engine = make_engine(LARGE_VOCABULARY, max_num_batched_tokens=num_tokens)
        program = engine.programs.prompt_logprobs()
        bound = sampler_bytes(engine.programs._builder.logits(8))
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
        engine.close()
        assert temporaries[-1] < bound
    assert bound < 2048 * 20_000 * 4 / 4
    # What grows are hidden states and the packed results.
    assert temporaries[1] - temporaries[0] < (2048 - 512) * 4 * 512


def test_they_begin_where_asked():
    """What lies before comes from the prefix cache, and is not scored."""
    engine = shared_engine()
    engine.reset_prefix_cache()
    prompt = [int(token) for token in range(3, 180)]
    whole = request("whole", prompt, prompt_logprobs=2, temperature=0, max_tokens=1)
    engine.add(whole)
    (expected,) = [o.prompt_logprobs for o in drain(engine) if o.prompt_logprobs]
    assert len(expected) == len(prompt) - 1
    for start in (1, 2, 100, 128, 129, len(prompt) - 1):
        hits = engine.scheduler.num_prefix_hits
        engine.add(
            request(
                start,
                prompt,
                prompt_logprobs=2,
                prompt_logprobs_start=start,
                temperature=0,
                max_tokens=1,
            )
        )
        (output,) = drain(engine)
        assert len(output.prompt_logprobs) == len(prompt) - start
        for entry, own in zip(
            expected[start - 1 :], output.prompt_logprobs, strict=True
        ):
            assert own.token_id == entry.token_id
            assert own.logprob == pytest.approx(entry.logprob, abs=1e-5)
        hits = engine.scheduler.num_prefix_hits - hits
        assert hits == min(start - 1, len(prompt) // 16 * 16)


@pytest.mark.parametrize("start", [0, -1, 20, 1.5])
def test_a_wrong_begin(start):
    item = request("a", range(3, 23), prompt_logprobs=1, prompt_logprobs_start=start)
    with pytest.raises(InvalidRequestError, match=f"prompt_logprobs_start={start}"):
        shared_engine().add(item)
