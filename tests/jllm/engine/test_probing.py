"""Requests that capture and edit activations: whose they are, and what they cost."""

import dataclasses

import numpy as np
import pytest

from jllm.engine.admission import validate
from jllm.engine.capture import CapturedTokens
from jllm.engine.probed_steps import EditPoint, ProbeSet
from jllm.engine.probing import MAX_SETS, Probing
from jllm.errors import InvalidRequestError
from jllm.probes import MAX_ARGUMENT_SIZE, Edit, make_probes, probes_each
from jllm.text.activations import join_activations
from tests.engines import LLAMA, drain, request, shared_engine, tokens_of

NAMES = ("layers.0.resid", "layers.1.attn.probs")
WIDTH = LLAMA["hidden_size"]
GREEDY = {"temperature": 0, "ignore_eos": True}
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(2, WIDTH)).astype(np.float32)


def steer(x, vector):
    return x + vector[None]


def probed(request_id, prompt, capture=NAMES, edit=None, **params):
    plain = request(request_id, prompt, **GREEDY, **params)
    return dataclasses.replace(plain, probes=make_probes(capture, edit))


def run(engine, requests, *, preempts=False):
    """Tokens and activations of each request, some of which lose their rows."""
    steps = []

    def preempt(_):
        steps.append(1)
        if preempts and len(steps) in (2, 9, 14):
            engine.scheduler.preempt(engine.scheduler.running[-1])

    engine.prepare(requests)
    for item in requests:
        engine.add(item)
    outputs = drain(engine, preempt)
    tokens = {key[0]: value for key, value in tokens_of(outputs).items()}
    pieces = {}
    for output in outputs:
        pieces.setdefault(output.request_id, []).extend(output.activations)
    lengths = {item.request_id: len(item.prompt_token_ids) for item in requests}
    return tokens, {
        key: join_activations(own, lengths[key] + len(tokens[key]) - 1)
        for key, own in pieces.items()
        if own
    }


EDIT = {"layers.0.resid": Edit(steer, VECTORS[0])}


@pytest.fixture(scope="module")
def engine():
    """One set for all tests, which a request that is never added keeps open."""
    engine = shared_engine()
    engine.prepare([probed("keeper", [3], NAMES, EDIT)])
    yield engine
    engine.release("keeper")


def same(got, expected):
    assert list(got) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, atol=1e-5, err_msg=name)


def test_the_same_alone_in_chunks_beside_others_and_after_a_preemption(engine):
    prompts = [range(3 + i, 43 + 13 * i) for i in range(4)]
    items = [probed(i, prompt, max_tokens=30) for i, prompt in enumerate(prompts)]
    alone = [run(engine, [item]) for item in items]
    for i, (tokens, activations) in enumerate(alone):
        length = len(prompts[i]) + 29
        assert len(tokens[str(i)]) == 30
        assert activations[str(i)]["layers.0.resid"].shape == (length, WIDTH)
        probs = activations[str(i)]["layers.1.attn.probs"]
        assert probs.shape == (length, 8, length)
        np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
        assert not np.triu(probs.transpose(1, 0, 2), 1).any()
    others = [request(f"p{i}", range(9, 30), max_tokens=9, **GREEDY) for i in range(3)]
    tokens, activations = run(engine, [*others, *items])
    before = engine.scheduler.num_preemptions
    resumed, resumed_activations = run(engine, items, preempts=True)
    assert engine.scheduler.num_preemptions > before
    engine.scheduler.check_integrity()
    for i, (own_tokens, own_activations) in enumerate(alone):
        key = str(i)
        assert tokens[key] == resumed[key] == own_tokens[key]
        same(activations[key], own_activations[key])
        same(resumed_activations[key], own_activations[key])


def test_others_run_the_same_programs_with_the_same_dispatches(engine, monkeypatch):
    plain = [request(i, range(3, 40 + i), max_tokens=20, **GREEDY) for i in range(3)]
    expected, _ = run(engine, plain)
    ran, metrics = [], engine.metrics
    step = engine.programs.step
    monkeypatch.setattr(
        engine.programs, "step", lambda **kind: ran.append(kind) or step(**kind)
    )
    counts = engine.programs.num_compiled, engine._probing.num_compiled
    steps, dispatches = metrics.steps, metrics.dispatches
    tokens, _ = run(engine, [*plain, probed("short", range(5, 15), max_tokens=4)])
    assert {key: tokens[key] for key in expected} == expected
    assert metrics.dispatches - dispatches == metrics.steps - steps
    # The prompt and three tokens are computed for it, and perhaps one token too many.
    assert metrics.steps - steps - len(ran) in (4, 5)
    assert len(ran) > 10
    assert not any(kind["has_rules"] for kind in ran)
    assert (engine.programs.num_compiled, engine._probing.num_compiled) == counts
    assert engine._probing.num_open == 1


def test_arguments_of_several_requests_in_one_batch(engine):
    prompt = range(3, 40)
    plain = request("plain", prompt, max_tokens=10, **GREEDY)
    expected, _ = run(engine, [plain])
    before = engine._probing.num_compiled

    def steered(request_id, vector, **fields):
        edit = {"layers.0.resid": Edit(steer, vector, **fields)}
        return probed(request_id, prompt, NAMES[:1], edit, max_tokens=10)

    items = [
        steered("a", VECTORS[0]),
        steered("b", VECTORS[1]),
        steered("late", VECTORS[0], positions=range(37, 1000)),
        steered("none", 0 * VECTORS[0]),
    ]
    tokens, activations = run(engine, [items[0], plain, *items[1:]])
    assert engine._probing.num_compiled == before
    assert tokens["plain"] == tokens["none"] == expected["plain"]
    assert len({tuple(tokens[key]) for key in ("a", "b", "plain")}) == 3
    for key, vector in (("a", VECTORS[0]), ("b", VECTORS[1])):
        moved = activations[key]["layers.0.resid"][:37]
        moved = moved - activations["none"]["layers.0.resid"][:37]
        np.testing.assert_allclose(moved, np.tile(vector, (37, 1)), atol=1e-5)
    late = activations["late"]["layers.0.resid"]
    same({"": late[:37]}, {"": activations["none"]["layers.0.resid"][:37]})
    assert tokens["late"][0] == expected["plain"][0]
    if tokens["late"][0] == tokens["none"][0]:
        moved = late[37] - activations["none"]["layers.0.resid"][37]
        np.testing.assert_allclose(moved, VECTORS[0], atol=1e-5)
    # Other arrays later, and alone: the same program.
    again, _ = run(engine, [steered("b", VECTORS[1])])
    assert again["b"] == tokens["b"]
    assert engine._probing.num_compiled == before


def test_prefixes_are_shared_neither_with_nor_among_edited_requests(engine):
    prompt = range(60, 130)
    edit = {"layers.0.resid": Edit(steer, VECTORS[1])}

    def cached(item):
        engine.add(item)
        return {output.num_cached_tokens for output in drain(engine)}

    edited = [probed(i, prompt, (), edit, max_tokens=1) for i in range(2)]
    assert [cached(item) for item in edited] == [{0}, {0}]
    plain = [request(i, prompt, max_tokens=1, **GREEDY) for i in range(2)]
    assert [cached(item) for item in plain] == [{0}, {64}]
    assert cached(probed("c", prompt, max_tokens=1)) == {0}
    assert cached(edited[0]) == {0}


def test_sequences_of_one_request(engine):
    params = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 6}
    item = dataclasses.replace(
        request("n", range(3, 20), ignore_eos=True, **params),
        probes=make_probes(NAMES, None),
    )
    engine.add(item)
    found = {}
    for output in drain(engine):
        found.setdefault(output.index, []).extend(output.activations)
    joined = [join_activations(found[i], 22)["layers.0.resid"] for i in (0, 1)]
    assert [len(own) for own in joined] == [22, 22]
    np.testing.assert_allclose(joined[0][:17], joined[1][:17], atol=1e-5)


def test_captured_beside_log_probabilities(engine):
    plain = request("a", range(3, 90), max_tokens=3, prompt_logprobs=1, **GREEDY)
    engine.add(dataclasses.replace(plain, probes=make_probes(NAMES, None)))
    outputs = drain(engine)
    assert len(outputs[0].prompt_logprobs) == 86
    pieces = [piece for output in outputs for piece in output.activations]
    assert join_activations(pieces, 89)["layers.0.resid"].shape == (89, WIDTH)


def test_what_is_refused(engine):
    names = [({"capture": ("layers.7.resid",)}, "capture='layers.7.resid'")]
    names += [({"edit": {"nothing": steer}}, "edit='nothing'")]
    for fields, message in names:
        item = probed("a", [3, 4], **{"capture": None, **fields})
        with pytest.raises(InvalidRequestError, match=message):
            engine.add(item)
    wrong = probed("a", [3, 4], None, {"embed": lambda x: x[:, :5]})
    with pytest.raises(ValueError, match=r"edit\['embed'\] makes float32\[1, 5\]"):
        engine.add(wrong)
    assert (engine.num_open, engine._probing.num_open) == (0, 1)
    assert len(run(engine, [probed("b", [3, 4], max_tokens=3)])[0]["b"]) == 3


def test_an_engine_without_activations(engine):
    limits = dataclasses.replace(engine.limits, activations=())
    with pytest.raises(InvalidRequestError, match="neither captures nor edits"):
        validate(probed("a", [3]), limits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_probes([3], None), "capture"),
        (lambda: make_probes(None, [steer]), "edit=.*must map"),
        (lambda: make_probes(None, {"a": 3}), "edit=3 must be a function"),
        (lambda: Edit(steer, positions=range(0, 9, 2)), "positions=.*step 1"),
        (lambda: Edit(steer, "text"), "argument='text' must be an array"),
        (lambda: Edit(steer, np.zeros(MAX_ARGUMENT_SIZE + 1)), "at most"),
        (lambda: probes_each([("a",), None], None, 3), "capture has 2 entries"),
    ],
)
def test_wrong_forms(make, message):
    with pytest.raises(InvalidRequestError, match=message):
        make()


def test_one_for_all_or_one_each():
    assert probes_each(None, None, 2) == [None, None]
    assert [own.capture for own in probes_each("a", None, 2)] == [("a",), ("a",)]
    first, second = probes_each([("a", "b"), None], [None, {"c": steer}], 2)
    assert (first.capture, dict(first.edit)) == (("a", "b"), {})
    assert (second.capture, second.edit["c"].function) == ((), steer)


def test_sets_cover_others():
    one, two = (EditPoint(name, steer, (3,), "float32") for name in "ab")
    large = ProbeSet(("x", "y"), ((one, two), (two,)))
    assert large.covers(ProbeSet(("y",), ((two,),)))
    assert not large.covers(ProbeSet(("z",)))
    # The order of edits counts.
    assert not large.covers(ProbeSet((), ((two, one),)))


def test_a_set_is_kept_while_it_is_open_and_its_programs_for_later(engine, monkeypatch):
    compiled = []

    class Recorded:
        def __init__(self, _builder, _options, probes):
            self.probes = probes
            compiled.append(probes.capture)

    monkeypatch.setattr("jllm.engine.probing.ProbedPrograms", Recorded)
    names = ("a", "b", "c")
    probing = Probing(
        lambda: None, engine._probing._options, names, engine._executor.upload
    )

    def prepare(request_id, *capture):
        probing.prepare([probed(request_id, [3], capture)])

    prepare("1", "a")
    prepare("2", "c")
    assert compiled == [("a",), ("a", "c")]
    probing.release("1")
    prepare("3", "a")
    assert len(compiled) == 2  # covered by what is open
    for request_id in ("2", "3"):
        probing.release(request_id)
    prepare("4", "a")
    assert len(compiled) == 2  # kept from before
    assert probing._current.probes.capture == ("a",)
    for i in range(MAX_SETS):
        probing.release(str(4 + i))
        prepare(str(5 + i), *names[: 1 + i % 2], *names[2 : i // 2 + 2])
    assert len(probing._kept) <= MAX_SETS


def test_a_position_is_claimed_once():
    tokens = CapturedTokens(("a",))
    assert tokens.claim(0, 4) == range(4)
    assert not tokens.claim(0, 3)
    assert tokens.claim(2, 6) == range(4, 6)
    tokens.add({"a": np.zeros((2, 1))})
    assert len(tokens.take()) == 1
    assert tokens.take() == ()
