"""Functions of the user in the sampler program, with arguments of each request."""

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.config import EngineConfig
from jllm.engine.arguments import ArgumentTables
from jllm.errors import ConfigError, InvalidRequestError
from jllm.processors import LogitsProcessor
from tests.engines import LLAMA, drain, make_engine, request, run, shared_engine

VOCAB = LLAMA["vocab_size"]
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}
PROMPT = range(3, 40)


def forbid(logits, rows, params):
    ids = jnp.arange(VOCAB)[None, :]
    return jnp.where(ids == params["forbidden"][:, None], -jnp.inf, logits)


def add_bias(logits, rows, params):
    return logits + params["bias"]


def count_up(logits, rows, params):
    """From the fourth token on each is the one before and the one before that, plus."""
    last = rows.last_tokens(2)
    wanted = (last[:, 0] + last[:, 1]) % VOCAB
    is_late = rows.positions >= rows.prompt_lengths + 3
    forced = (params["counts"] & is_late)[:, None]
    others = jnp.arange(VOCAB)[None, :] != wanted[:, None]
    return jnp.where(forced & others, -jnp.inf, logits)


def spoil(logits, rows, params):
    return jnp.where(params["spoils"][:, None], jnp.nan, logits)


PROCESSORS = [
    LogitsProcessor(forbid, {"forbidden": -1}),
    LogitsProcessor(add_bias, {"bias": np.zeros(VOCAB)}),
    LogitsProcessor(count_up, {"counts": False}),
    LogitsProcessor(spoil, {"spoils": False}),
]


@pytest.fixture(scope="module")
def engine():
    engine = make_engine(logits_processors=PROCESSORS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain():
    """Tokens of an engine without processors."""
    items = [request(i, PROMPT[i:], **GREEDY) for i in range(3)]
    return run(shared_engine(), items)


def test_with_the_defaults_nothing_changes(engine, plain):
    items = [request(i, PROMPT[i:], **GREEDY) for i in range(3)]
    assert run(engine, items) == plain


def test_a_forbidden_token_of_one_request(engine, plain):
    before = plain["1", 0]
    items = [request(i, PROMPT[i:], **GREEDY) for i in (0, 2)]
    args = {"forbidden": before[4]}
    tokens = run(engine, [*items, request(1, PROMPT[1:], extra_args=args, **GREEDY)])
    assert before[4] not in tokens["1", 0]
    place = before.index(before[4])
    assert tokens["1", 0][:place] == before[:place]
    assert all(tokens[key, 0] == plain[key, 0] for key in ("0", "2"))


def test_a_bias_is_the_one_of_the_sampling_parameters(engine):
    """Drawn with a seed, alone and beside others, whose biases are others."""
    values = np.random.default_rng(0).normal(size=(2, VOCAB)).round(2) * 3
    params = {"temperature": 0.9, "seed": 7, "max_tokens": 12, "ignore_eos": True}

    def biased(name, index):
        args = {"bias": values[index]}
        return request(name, PROMPT, extra_args=args, **params)

    tokens = run(engine, [biased("a", 0), biased("b", 1), request("c", [3], **GREEDY)])
    assert run(engine, [biased("a", 0)])["a", 0] == tokens["a", 0] != tokens["b", 0]
    for name, index in (("a", 0), ("b", 1)):
        bias = dict(enumerate(values[index].tolist()))
        own = request(name, PROMPT, logit_bias=bias, **params)
        assert run(shared_engine(), [own])[name, 0] == tokens[name, 0]


def test_positions_and_the_tokens_before(engine, plain):
    own = request(0, PROMPT, extra_args={"counts": True}, **GREEDY)
    tokens = run(engine, [own, request(1, PROMPT[1:], **GREEDY)])
    assert tokens["1", 0] == plain["1", 0]
    found = tokens["0", 0]
    assert found[:3] == plain["0", 0][:3]
    for i in range(3, 12):
        assert found[i] == (found[i - 1] + found[i - 2]) % VOCAB


def test_the_rules_of_the_parameters_come_after(engine):
    bias = np.zeros(VOCAB)
    bias[5] = 1e4
    fields = {"extra_args": {"bias": bias}, "logprobs": 0, **GREEDY}
    allowed = request("a", PROMPT, allowed_token_ids=[6, 7], **fields)
    engine.add(request("free", PROMPT, **fields))
    engine.add(allowed)
    outputs = drain(engine)
    tokens = {"a": set(), "free": set()}
    for output in outputs:
        tokens[output.request_id] |= set(output.token_ids)
        # Log-probabilities are those of the model.
        assert output.logprobs[0].logprob < -1e-3
    assert tokens["free"] == {5}
    assert tokens["a"] <= {6, 7}


def test_a_row_that_is_not_a_number_fails_alone(engine, plain):
    engine.add(request("bad", PROMPT, extra_args={"spoils": True}, **GREEDY))
    engine.add(request("0", PROMPT, **GREEDY))
    found = {}
    for output in drain(engine):
        found.setdefault(output.request_id, []).append(output)
    assert found["bad"][-1].finish_reason == "error"
    assert "not finite" in found["bad"][-1].error
    assert [t for own in found["0"] for t in own.token_ids] == plain["0", 0]


def test_two_dispatches_a_step_and_nothing_compiled(engine):
    items = [request(i, [3 + i], **GREEDY) for i in range(3)]
    run(engine, items)
    metrics, compiled = engine.metrics, engine.programs.num_compiled
    before = metrics.steps, metrics.dispatches, metrics.host_to_device_copies
    run(engine, items)
    after = metrics.steps, metrics.dispatches, metrics.host_to_device_copies
    steps, dispatches, uploads = np.subtract(after, before).tolist()
    assert dispatches == 2 * steps
    # The vectors, and perhaps the tables of rules and arguments once.
    assert uploads <= steps + 1 + len(PROCESSORS)
    assert engine.programs.num_compiled == compiled


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"other": 1}, "no argument 'other'; there are: forbidden, bias"),
        ({"bias": np.zeros(3)}, r"'bias' has shape \[3\], must be \[331\]"),
        ({"forbidden": 1.5}, "'forbidden' is float32, must be int32"),
    ],
)
def test_wrong_arguments(engine, args, message):
    with pytest.raises(InvalidRequestError, match=message) as error:
        engine.add(request("a", PROMPT, extra_args=args))
    assert error.value.parameter == "extra_args"
    assert engine.num_open == 0


def test_arguments_without_processors():
    with pytest.raises(InvalidRequestError, match="there are: none"):
        shared_engine().add(request("a", PROMPT, extra_args={"bias": 1}))


@pytest.mark.parametrize(
    ("processors", "message"),
    [
        ([lambda s, r, p: s[:, :5]], r"logits_processors\[0\] gives float32\[3, 5\]"),
        ([add_bias], r"logits_processors\[0\] cannot be traced: 'bias'"),
        ([lambda s, r, p: (s,)], r"\[0\] gives tuple, not an array"),
        (
            [lambda s, r, p: s, lambda s, r, p: s.astype(jnp.bfloat16)],
            r"\[1\] gives bfloat16",
        ),
    ],
)
def test_wrong_results_are_found_before_anything_is_compiled(processors, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(logits_processors=processors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineConfig(logits_processors=forbid), "must be a list"),
        (lambda: EngineConfig(logits_processors=["f"]), "'f' must be a function"),
        (
            lambda: EngineConfig(
                logits_processors=[
                    LogitsProcessor(f, {"a": 1}) for f in (forbid, spoil)
                ]
            ),
            "two of them have an argument 'a'",
        ),
        (lambda: LogitsProcessor(forbid, {"a": "text"}), "default of 'a'"),
        (
            lambda: EngineConfig(logits_processors=[forbid], executables="x"),
            "executables cannot be exported",
        ),
    ],
)
def test_wrong_declarations(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_tables_are_sent_when_a_row_has_changed():
    sent = []

    def upload(table):
        sent.append(table.tolist())
        return jnp.asarray(table)

    default = np.array(3, np.int32)
    tables = ArgumentTables({"a": default}, 3, upload)
    tables.place([0, 2], [(default,), (default,)])
    tables.place([1], [(default,)])
    own = (np.array(5, np.int32),)
    tables.place([2, 0], [own, (default,)])
    tables.place([2], [own])
    tables.place([2], [(default,)])
    assert sent == [[3, 3, 3], [3, 3, 5], [3, 3, 3]]
    assert ArgumentTables({}, 3, upload).place([0], [()]) == ()
