"""Grammars in the engine: every way through a step gives tokens of the grammar.

The grammar is a list of sets of tokens, so that what must come out is plain.
"""

import dataclasses

import numpy as np
import pytest

from jllm.errors import InvalidRequestError
from tests.engines import drain, make_engine, request, run, shared_engine, tokens_of
from tests.fakes import SetsGrammar

VOCAB = 331
EOS = 2
RNG = np.random.default_rng(5)
SETS = [set(RNG.integers(3, VOCAB, 4).tolist()) for _ in range(24)]
CHOICE = {"choice": ["anything"]}


def constrained(name, prompt, sets=SETS, **params):
    params = {"structured_outputs": CHOICE, "max_tokens": 64} | params
    item = request(name, prompt, **params)
    return dataclasses.replace(item, grammar=SetsGrammar(sets, VOCAB))


def plain(name, length):
    prompt = np.random.default_rng(length).integers(3, VOCAB, length)
    return request(name, prompt, max_tokens=30, seed=length, ignore_eos=True)


def plain_requests():
    return [plain(f"plain {i}", 11 * i + 3) for i in range(4)]


def grammar_requests(**params):
    return [
        constrained(f"grammar {i}", range(3, 20 + 9 * i), seed=i, **params)
        for i in range(4)
    ]


def follow(tokens, sets=SETS):
    return len(tokens) == len(sets) and all(
        token in allowed for token, allowed in zip(tokens, sets, strict=True)
    )


@pytest.fixture(scope="module")
def alone():
    """Tokens of each request by itself, without overlap."""
    engine = make_engine(overlap=False)
    tokens = {}
    for item in (*plain_requests(), *grammar_requests()):
        tokens |= run(engine, [item])
    engine.close()
    return tokens


def test_alone_follows_the_grammar(alone):
    for key, tokens in alone.items():
        assert follow(tokens) == key[0].startswith("grammar")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": False},
        {"max_num_batched_tokens": 16},
        {"num_blocks": 14, "max_model_len": 160},
        {"enable_prefix_caching": False, "compile_ahead": True},
    ],
    ids=["overlap", "no overlap", "chunks", "preemption", "all programs"],
)
def test_same_tokens_in_every_batch(alone, options):
    engine = make_engine(**options)
    mixed = [*plain_requests(), *grammar_requests()]
    assert run(engine, mixed[::2] + mixed[1::2]) == alone
    if "num_blocks" in options:
        assert engine.scheduler.num_preemptions > 3
    # With the prompts in the prefix cache.
    assert run(engine, mixed) == alone
    engine.scheduler.check_integrity()
    engine.close()


def test_complete_is_a_stop_with_all_tokens():
    outputs = []
    engine = shared_engine()
    engine.add(constrained("a", range(3, 9), sets=SETS[:3]))
    outputs = drain(engine)
    assert follow(tokens_of(outputs)["a", 0], SETS[:3])
    last = outputs[-1]
    assert (last.finish_reason, last.stop_reason, last.is_complete) == (
        "stop",
        None,
        True,
    )


def test_stop_comes_before_length():
    engine = shared_engine()
    engine.add(constrained("a", range(3, 9), sets=SETS[:3], max_tokens=3))
    engine.add(constrained("b", range(3, 9), sets=SETS[:4], max_tokens=3))
    ends = {o.request_id: o for o in drain(engine) if o.finish_reason}
    assert ends["a"].finish_reason == "stop"
    assert (ends["b"].finish_reason, ends["b"].is_complete) == ("length", False)


def test_the_end_token_only_where_the_grammar_accepts():
    bias = {"logit_bias": {EOS: 100.0}}
    sets = [*SETS[:5], {7, None}, {8}]
    engine = shared_engine()
    tokens = run(engine, [constrained("a", range(3, 9), sets=sets, **bias)])["a", 0]
    assert follow(tokens[:5], SETS[:5])
    assert tokens[5:] == [EOS]
    item = constrained("b", range(3, 9), sets=sets, ignore_eos=True, **bias)
    assert run(engine, [item])["b", 0][5:] == [7, 8]
    item = constrained("c", range(3, 9), sets=sets, min_tokens=7, **bias)
    assert run(engine, [item])["c", 0][5:] == [7, 8]


def test_completion_comes_before_min_tokens():
    engine = shared_engine()
    item = constrained("a", range(3, 9), sets=SETS[:3], min_tokens=20)
    assert len(run(engine, [item])["a", 0]) == 3


@pytest.mark.parametrize(
    "params",
    [
        {"n": 3},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"top_k": 3, "top_p": 0.9},
        {"temperature": 0},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0},
        {"bad_words_token_ids": tuple((t,) for s in SETS[:3] for t in s)},
    ],
    ids=lambda params: next(iter(params)),
)
def test_with_every_other_parameter(params):
    engine = shared_engine()
    # The engine's own default is one log-probability per vocabulary rank at most.
    tokens = run(engine, [constrained("a", range(3, 50), seed=3, **params)])
    assert len(tokens) == params.get("n", 1)
    assert all(follow(found) for found in tokens.values())
    if "n" in params:
        assert len({tuple(found) for found in tokens.values()}) > 1


def test_a_user_stop_token_ends_it():
    engine = shared_engine()
    stops = sorted(SETS[4])
    item = constrained("a", range(3, 9), stop_token_ids=stops)
    assert len(run(engine, [item])["a", 0]) == 5


def test_allowed_ids_restrict_further():
    engine = shared_engine()
    allowed = [max(s) for s in SETS]
    item = constrained("a", range(3, 9), allowed_token_ids=allowed)
    tokens = run(engine, [item])["a", 0]
    assert follow(tokens)
    assert set(tokens) <= set(allowed)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("sets", "params", "words"),
    [
        ([*SETS[:4], "too complex"], {}, "too complex"),
        (["too complex"], {}, "too complex"),
        (SETS, {"allowed_token_ids": sorted(SETS[0])}, "none of the tokens"),
    ],
    ids=["later", "at once", "nothing allowed"],
)
def test_a_failing_grammar_fails_alone(alone, overlap, sets, params, words):
    engine = make_engine(overlap=overlap)
    for item in (*plain_requests(), *grammar_requests()[:2]):
        engine.add(item)
    engine.add(constrained("bad", range(3, 30), sets=sets, **params))
    outputs = drain(engine)
    (end,) = [o for o in outputs if o.request_id == "bad" and o.finish_reason]
    assert end.finish_reason == "error"
    assert words in end.error
    assert end.error.startswith("structured_outputs")
    tokens = tokens_of(outputs)
    del tokens["bad", 0]
    assert tokens == {key: alone[key] for key in tokens}
    assert len(tokens) == 6
    engine.scheduler.check_integrity()
    assert not engine.scheduler.has_unfinished
    engine.close()


def test_aborted_while_a_step_is_on_its_way(alone):
    engine = shared_engine()
    for item in (*plain_requests(), *grammar_requests()):
        engine.add(item)
    outputs = []
    for step in range(1000):
        if not engine.has_unfinished:
            break
        outputs += engine.step()
        if step in (4, 9):
            engine.abort(f"grammar {step // 5}")
    tokens = tokens_of(outputs)
    for key in alone:
        if key[0] not in ("grammar 0", "grammar 1"):
            assert tokens[key] == alone[key]
    engine.scheduler.check_integrity()


def test_one_more_small_copy_per_step_with_grammars():
    engine = shared_engine()
    engine.programs.wait()
    run(engine, [plain("first", 5), constrained("second", range(3, 9))])
    metrics = engine.metrics
    before = dataclasses.replace(metrics)
    run(engine, [plain("plain", 20), constrained("a", range(3, 9))])
    steps = metrics.steps - before.steps
    dispatches = metrics.dispatches - before.dispatches
    uploads = metrics.host_to_device_copies - before.host_to_device_copies
    downloads = metrics.device_to_host_copies - before.device_to_host_copies
    assert steps >= 30
    assert downloads == steps
    # The step in flight when the grammar is complete has one too.
    assert 24 <= dispatches - steps <= 26
    assert 24 <= uploads - steps <= 27
    assert metrics.grammar_seconds > before.grammar_seconds


def test_a_constraint_without_its_grammar_is_refused():
    engine = shared_engine()
    item = request("a", range(3, 9), structured_outputs=CHOICE)
    with pytest.raises(InvalidRequestError, match="compiled to a grammar"):
        engine.add(item)
