"""Offline generation on an engine whose tokens are known."""

import logging
import signal

import pytest

from jllm.config import EngineConfig
from jllm.errors import (
    ConfigError,
    ContextTooLongError,
    EngineStoppedError,
    InvalidRequestError,
)
from jllm.llm import LLM
from jllm.types import RequestOutputKind, SamplingParams
from tests.fakes import BOS, FakeEngine

QUIET = {"use_tqdm": False}


@pytest.fixture
def make(monkeypatch):
    def make(*arguments, options=None, **fake):
        engine = FakeEngine(*arguments, **fake)
        monkeypatch.setattr("jllm.llm.create_engine", lambda config: engine)
        return LLM("model", **options or {}), engine

    return make


def echo(request, index):
    """Answers with the prompt and the number of the sequence."""
    return bytes(i for i in request.prompt_token_ids if i < 256).decode() + str(index)


def texts(outputs):
    return [[completion.text for completion in output.outputs] for output in outputs]


def params(**fields):
    return SamplingParams(**{"max_tokens": None} | fields)


def test_outputs_are_in_the_order_of_the_prompts(make):
    llm, engine = make(echo)
    prompts = ["longest", "b", {"prompt_token_ids": [67]}, [68, 69]]
    outputs = llm.generate(prompts, params(), **QUIET)
    assert texts(outputs) == [["longest0"], ["b0"], ["C0"], ["DE0"]]
    assert all(output.finished for output in outputs)
    assert outputs[0].prompt_token_ids == [BOS, *b"longest"]
    assert outputs[2].prompt is None
    assert not engine.has_unfinished
    assert engine.aborted == []


def test_one_prompt_is_a_list_of_one(make):
    llm, _ = make(echo)
    assert texts(llm.generate("a", params(), **QUIET)) == [["a0"]]
    assert texts(llm.generate([65, 66], params(), **QUIET)) == [["AB0"]]
    assert llm.generate([], params(), **QUIET) == []


def test_sampling_params_and_priority_per_prompt(make):
    llm, engine = make(echo)
    both = [params(max_tokens=1), params(max_tokens=2)]
    outputs = llm.generate(["abc", "abc"], both, priority=[3, 1], **QUIET)
    assert texts(outputs) == [["a"], ["ab"]]
    assert [request.priority for request in engine.added] == [3, 1]


def test_defaults_come_from_the_model(make):
    llm, engine = make(echo)
    llm.generate("a", **QUIET)
    assert engine.added[0].params == SamplingParams(top_k=7)
    assert llm.get_default_sampling_params().top_k == 7


def test_several_sequences_in_one_output(make):
    llm, _ = make(echo)
    outputs = llm.generate("a", params(n=3), **QUIET)
    assert texts(outputs) == [["a0", "a1", "a2"]]


def test_stop_string_ends_sequences_apart(make):
    llm, engine = make(echo)
    (output,) = llm.generate("xyz", params(n=2, stop="z1"), **QUIET)
    assert texts([output]) == [["xyz0", "xy"]]
    assert [c.stop_reason for c in output.outputs] == [None, "z1"]
    assert not engine.has_unfinished
    assert engine.aborted


def test_stop_string_ends_the_request(make):
    llm, engine = make("one two three")
    (output,) = llm.generate("a", params(stop=[" t"]), **QUIET)
    assert texts([output]) == [["one"]]
    assert engine.aborted == [output.request_id]


def test_logprobs(make):
    llm, _ = make("hi")
    asked = params(logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("ab", asked, **QUIET)
    assert output.prompt_logprobs[0] is None
    assert [97 in output.prompt_logprobs[1], len(output.prompt_logprobs)] == [True, 3]
    assert all(len(found) == 3 for found in output.outputs[0].logprobs)
    assert output.num_cached_tokens == 3


@pytest.mark.parametrize(
    ("prompts", "word"),
    [
        (["ok", 5], "prompt 1: "),
        (["ok", {"prompt_token_ids": []}], "prompt 1: the prompt is empty"),
        (["ok", {"prompt_token_ids": [260]}], "prompt 1: .*out of vocabulary"),
        (["ok", [1, -1]], "prompt 1: "),
        (5, "prompt 0: "),
        (None, "prompt 0: "),
        (["ok", {"prompt": 1}], "prompt 1: "),
    ],
)
def test_nothing_is_queued_if_one_prompt_is_wrong(make, prompts, word):
    llm, engine = make(echo)
    with pytest.raises(InvalidRequestError, match=word):
        llm.generate(prompts, params(), **QUIET)
    assert engine.added == []
    assert texts(llm.generate("a", params(), **QUIET)) == [["a0"]]


def test_too_long_keeps_its_type(make):
    llm, engine = make(echo)
    with pytest.raises(ContextTooLongError, match=r"prompt 1: .*128"):
        llm.generate(["ok", "x" * 200], params(), **QUIET)
    assert engine.added == []


@pytest.mark.parametrize(
    ("sampling", "priority", "word"),
    [
        ([SamplingParams()], None, "1 entries, but there are 2"),
        ("hot", None, "SamplingParams"),
        ([SamplingParams(), {}], None, "SamplingParams"),
        (None, [1], "1 entries"),
        (None, "high", "int"),
        (None, True, "int"),
    ],
)
def test_wrong_parameters(make, sampling, priority, word):
    llm, engine = make(echo)
    with pytest.raises(InvalidRequestError, match=word):
        llm.generate(["a", "b"], sampling, priority=priority, **QUIET)
    assert engine.added == []


def test_chat(make):
    llm, _ = make(echo)
    one = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(one, params(), **QUIET)
    assert output.prompt == "<s>user: Hi\nassistant:"
    # The template writes BOS itself.
    assert output.prompt_token_ids == [BOS, *b"user: Hi\nassistant:"]
    two = llm.chat(
        [one, one],
        params(),
        chat_template="T{{ x }}",
        use_tqdm=False,
        chat_template_kwargs={"x": 1},
    )
    assert texts(two) == [["T10"], ["T10"]]
    with pytest.raises(InvalidRequestError, match="unheard"):
        llm.chat(one, unheard=1)
    with pytest.raises(InvalidRequestError, match="messages"):
        llm.chat([])


def test_stream_grows_and_interleaves(make):
    llm, engine = make(echo)
    kind = RequestOutputKind.DELTA
    streams = [llm.stream(p, params(output_kind=kind)) for p in ("abc", "longer")]
    found = ["", ""]
    for _ in range(20):
        for i, stream in enumerate(streams):
            for output in [next(stream, None)]:
                found[i] += output.outputs[0].text if output else ""
    assert found == ["abc0", "longer0"]
    # One step before the second was begun, then both share the steps.
    assert engine.num_steps == 1 + len("longer0") + 1


def test_leaving_a_stream_aborts(make):
    llm, engine = make(echo)
    stream = llm.stream("abc", params())
    assert next(stream).outputs[0].text == "a"
    stream.close()
    assert engine.aborted == ["0"]
    with pytest.raises(InvalidRequestError):
        llm.stream(5)


def test_interrupt_waits_for_the_step_and_aborts_all(make):
    llm, engine = make(echo)
    ended = []

    def interrupt(fake):
        if fake.num_steps == 2:
            signal.raise_signal(signal.SIGINT)
            ended.append("step")

    engine.on_step = interrupt
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "de"], params(), **QUIET)
    assert ended == ["step"]
    assert sorted(engine.aborted) == ["0", "1"]
    assert not engine.has_unfinished
    assert signal.getsignal(signal.SIGINT) is before
    engine.on_step = None
    assert texts(llm.generate("a", params(), **QUIET)) == [["a0"]]


def test_failed_step_leaves_nothing_open(make):
    llm, engine = make(echo, fail_at=2)
    with pytest.raises(RuntimeError, match="device"):
        llm.generate(["abc", "de"], params(), **QUIET)
    assert not engine.has_unfinished


def test_request_that_fails_alone(make, caplog):
    llm, engine = make(echo)
    engine.error_for = "1"
    with caplog.at_level(logging.WARNING, "jllm"):
        outputs = llm.generate(["a", "b"], params(), **QUIET)
    assert [o.outputs[0].finish_reason for o in outputs] == ["stop", "error"]
    assert "prompt 1: not finite" in caplog.text


def test_progress_bar(make, capsys):
    llm, _ = make(echo)
    llm.generate(["a", "b"], params())
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], params(), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_close(make):
    llm, engine = make(echo)
    stream = llm.stream("abc", params())
    next(stream)
    with llm as same:
        assert same is llm
    llm.close()
    assert engine.closed == 1
    with pytest.raises(EngineStoppedError):
        llm.generate("a", **QUIET)


def test_without_a_tokenizer(make):
    llm, _ = make(echo, options={"skip_tokenizer_init": True})
    (output,) = llm.generate([65, 66], params(), **QUIET)
    assert (output.outputs[0].text, output.outputs[0].token_ids[:2]) == ("", [65, 66])
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        llm.get_tokenizer()
    with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
        llm.generate("text", **QUIET)


def test_small_things(make):
    llm, _ = make(echo, options={"gpu_memory_utilization": 0.5})
    assert llm.config == EngineConfig(model="model", memory_utilization=0.5)
    assert LLM.from_engine_config(llm.config).config == llm.config
    assert llm.get_tokenizer().encode("A") == [BOS, 65]
    assert (llm.max_model_len, llm.reset_prefix_cache()) == (128, True)


def test_broken_tokenizer_closes_the_engine(make, monkeypatch, tmp_path):
    _, engine = make(echo)
    with pytest.raises(ConfigError, match="none"):
        LLM("model", chat_template=str(tmp_path / "none"))
    assert engine.closed == 1
