"""All rules together: exact probabilities, independence of the batch, collectives."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jllm.sampling.logprobs import ResultLayout
from jllm.sampling.rules import RowRules
from jllm.sampling.sampler import SamplerOptions, draw, sample
from jllm.sampling.transforms import ThresholdSearch
from tests.jllm.sampling import oracle
from tests.jllm.sampling.oracle import Spec

VOCAB = 50
NUM_ROWS = 2048
NUM_BATCHES = 10
TOP = 3
METHODS = ["inverse_cdf", "gumbel"]
LOGITS = (np.random.default_rng(7).normal(size=VOCAB) * 2).astype(np.float32)

ALONE = {
    "neutral": Spec(),
    "temperature": Spec(temperature=0.7),
    "hot": Spec(temperature=2.0),
    "top_k": Spec(top_k=7),
    "top_p": Spec(top_p=0.8),
    "min_p": Spec(min_p=0.1),
    "presence": Spec(output=(9, 9, 4, 17), presence=1.5),
    "frequency": Spec(output=(9, 9, 4, 17), frequency=0.8),
    "repetition": Spec(prompt=(1, 2, 40), output=(9, 4), repetition=1.7),
    "bias": Spec(rules=RowRules(logit_bias={3: 4.0, 9: -100.0, 11: 2.5})),
    "allowed": Spec(rules=RowRules(allowed_token_ids=(0, 3, 9, 33, 49))),
    "bad_words": Spec(
        output=(5, 6), rules=RowRules(bad_words_token_ids=((5, 6, 9), (9, 3), (4,)))
    ),
    "min_tokens": Spec(min_tokens=3, rules=RowRules(stop_token_ids=(9, 4))),
}
TOGETHER = {
    "filters": Spec(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    "penalties": Spec(
        prompt=(1, 2, 3),
        output=(9, 9, 4),
        presence=0.5,
        frequency=0.3,
        repetition=1.2,
        temperature=0.8,
    ),
    "everything": Spec(
        prompt=(1, 2, 3),
        output=(9, 9, 4),
        temperature=1.5,
        presence=0.5,
        frequency=-0.3,
        repetition=1.2,
        top_k=15,
        top_p=0.95,
        min_p=0.01,
        min_tokens=5,
        rules=RowRules(
            logit_bias={7: 3.0},
            allowed_token_ids=(*range(0, VOCAB, 2), 9, 7),
            stop_token_ids=(2,),
            bad_words_token_ids=((9, 4, 6), (8,)),
        ),
    ),
}
RULES = {**ALONE, **TOGETHER}


@partial(jax.jit, static_argnums=(5,))
def sample_many(logits, rows, history, rules, first, method):
    """One specification at many positions: all of its inputs but one are repeated."""

    def repeat(x):
        return jnp.broadcast_to(x[:1], (NUM_ROWS, *x.shape[1:]))

    logits, rows, rules = jax.tree.map(repeat, (logits, rows, rules))
    steps = jnp.arange(NUM_ROWS, dtype=jnp.int32)
    rows = dataclasses.replace(rows, position=rows.position + first + steps)
    history = dataclasses.replace(
        history,
        block_tables=repeat(history.block_tables),
        lengths=repeat(history.lengths),
    )
    options = SamplerOptions(TOP, method)
    return sample(logits, rows, history, rules, options).tokens


@pytest.fixture
def empirical(make_rows, make_history, make_rules):
    def run(spec, method):
        # Positions lie far beyond the context; `min_tokens` is moved along.
        shift = 10**6 if spec.min_tokens else 0
        rows = make_rows([spec])
        rows = dataclasses.replace(rows, min_tokens=rows.min_tokens + shift)
        history = make_history([spec], vocab_size=VOCAB)
        rules = make_rules([spec], vocab_size=VOCAB)
        counts = np.zeros(VOCAB, int)
        for batch in range(NUM_BATCHES):
            first = jnp.int32(batch * NUM_ROWS)
            logits = jnp.asarray(LOGITS[None])
            tokens = sample_many(logits, rows, history, rules, first, method)
            counts += np.bincount(np.asarray(tokens), minlength=VOCAB)
        return counts

    return run


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "inverse_cdf") for name in RULES),
        # The rules know nothing of the method, so that a few are enough for this one.
        *((name, "gumbel") for name in ("temperature", "bias", *TOGETHER)),
    ],
)
def test_frequencies_are_the_exact_probabilities(name, method, empirical):
    counts = empirical(RULES[name], method)
    expected = oracle.softmax(oracle.final_scores(LOGITS, RULES[name])) * counts.sum()
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    observed, expected = (
        np.append(x[likely], x[~likely].sum()) for x in (counts, expected)
    )
    present = expected > 1e-9
    result = scipy.stats.chisquare(observed[present], expected[present])
    assert result.pvalue > 1e-3


def mixed_batch():
    """Specifications of eight rows and their logits."""
    specs = [Spec(temperature=0.9), Spec(temperature=0.0), *list(RULES.values())[3:9]]
    logits = np.random.default_rng(1).normal(size=(8, VOCAB)).astype(np.float32) * 2
    return specs, logits


@pytest.mark.slow
def test_rows_do_not_see_each_other(make_rows, make_history, make_rules):
    specs, logits = mixed_batch()
    run = jax.jit(partial(sample, options=SamplerOptions(TOP)))
    plain = jax.jit(draw)
    positions = range(1000, 1008)

    def tokens(rows):
        history = make_history([specs[row] for row in rows], vocab_size=VOCAB)
        rules = make_rules([specs[row] for row in rows], vocab_size=VOCAB)
        chosen = jnp.asarray(logits[list(rows)])
        found, plainly = [], []
        for position in positions:
            parameters = make_rows(
                [specs[row] for row in rows], position=[position] * len(rows)
            )
            found.append(run(chosen, parameters, history, rules).tokens)
            plainly.append(plain(chosen, parameters))
        return np.stack(found), np.stack(plainly)

    together, plainly = tokens(range(8))
    # The first two have no rules: the second program changes nothing for them.
    np.testing.assert_array_equal(together[:, :2], plainly[:, :2])
    assert (together[:, 1] == logits[1].argmax()).all()
    for rows in ([7, 0], [5]):
        alone, _ = tokens(rows)
        np.testing.assert_array_equal(alone, together[:, rows])


def test_greedy_rows_obey_the_rules(make_rows, make_history, make_rules):
    best = int(LOGITS.argmax())
    specs = [
        Spec(temperature=0.0),
        Spec(temperature=0.0, rules=RowRules(bad_words_token_ids=((best,),))),
        Spec(temperature=0.0, rules=RowRules(logit_bias={3: 50.0})),
        Spec(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0),
        # All banned: the best of those that were banned.
        Spec(rules=RowRules(allowed_token_ids=(best,), bad_words_token_ids=((best,),))),
        *[Spec(temperature=0.0)] * 3,
    ]
    result = jax.jit(partial(sample, options=SamplerOptions(TOP)))(
        jnp.tile(jnp.asarray(LOGITS), (len(specs), 1)),
        make_rows(specs),
        make_history(specs, vocab_size=VOCAB),
        make_rules(specs, vocab_size=VOCAB),
    )
    second = int(np.argsort(-LOGITS)[1])
    assert np.asarray(result.tokens).tolist() == [best, second, 3, *[best] * 5]
    entries = ResultLayout(TOP).unpack(np.asarray(result.packed))
    np.testing.assert_array_equal(entries["token"], result.tokens)
    # Log-probabilities are those of the model, before any rule.
    exact = oracle.log_softmax(LOGITS)
    expected = exact[np.asarray(result.tokens)]
    np.testing.assert_allclose(entries["logprob"], expected, atol=1e-5)
    assert entries["rank"][1] == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_row_fails_alone(value, make_rows, make_history, make_rules):
    specs, logits = mixed_batch()
    bad = logits.copy()
    bad[4] = value
    rows = make_rows(specs)
    history = make_history(specs, vocab_size=VOCAB)
    rules = make_rules(specs, vocab_size=VOCAB)
    run = jax.jit(partial(sample, options=SamplerOptions(TOP)))
    good, hurt = (
        np.asarray(run(jnp.asarray(x), rows, history, rules).packed)
        for x in (logits, bad)
    )
    others = np.arange(8) != 4
    np.testing.assert_array_equal(good[others], hurt[others])
    entry = ResultLayout(TOP).unpack(hurt[4])
    assert entry["flags"] == 0
    assert 0 <= entry["token"] < VOCAB


def test_padding_of_the_vocabulary_is_never_drawn(make_rows):
    logits = np.full((8, 640), -np.inf, np.float32)
    logits[:, :5] = 0.0
    rows = make_rows([Spec(temperature=2.0)] * 8, position=range(8))
    for method in METHODS:
        tokens = jax.jit(partial(draw, method=method))(jnp.asarray(logits), rows)
        assert (np.asarray(tokens) < 5).all()


def collectives(program):
    """Sizes of the results of all operations that move data between devices."""
    names = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    sizes = []
    for line in program.as_text().splitlines():
        if match := re.search(rf"= (.*?) (?:{names})(?:-start)?\(", line):
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            sizes += [math.prod(map(int, filter(None, s.split(",")))) for s in shapes]
    return sizes


def over_vocabulary(logits):
    """Logits shared by eight devices."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    return jax.device_put(logits, place)


@pytest.mark.parametrize("method", METHODS)
def test_no_logits_move_in_draw(method, make_rows):
    rows = make_rows([Spec()] * 8)
    logits = jax.random.normal(jax.random.key(0), (8, 4096))
    step = jax.jit(lambda x: draw(x, rows, method))
    program = step.lower(over_vocabulary(logits)).compile()
    sizes = collectives(program)
    assert sizes
    assert max(sizes) <= 8 * 128
    np.testing.assert_array_equal(program(over_vocabulary(logits)), step(logits))


def test_no_logits_move_in_sample(make_rows, make_history, make_rules):
    specs = [Spec()] * 8
    rows, history = make_rows(specs), make_history(specs, vocab_size=4096)
    rules = make_rules(specs, vocab_size=4096)
    logits = over_vocabulary(jax.random.normal(jax.random.key(0), (8, 4096)))
    options = SamplerOptions(20, search=ThresholdSearch("reference"))
    step = jax.jit(lambda x: sample(x, rows, history, rules, options).packed)
    assert max(collectives(step.lower(logits).compile())) <= logits.size / 8
