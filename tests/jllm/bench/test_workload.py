"""Workloads: lengths, shared blocks, repetitions, and traces as they are published."""

import json

import pytest

from jllm.bench.workload import WorkloadOptions, make_workload
from jllm.errors import InvalidRequestError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""


def make(vocab_size=1000, max_model_len=None, repetition=0, **fields):
    return make_workload(
        WorkloadOptions(**fields),
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        repetition=repetition,
    )


def lengths(workload):
    return [(len(r.prompt_token_ids), r.max_tokens) for r in workload.requests]


def common(a, b):
    pairs = zip(a.prompt_token_ids, b.prompt_token_ids, strict=False)
    count = 0
    for left, right in pairs:
        if left != right:
            break
        count += 1
    return count


def test_fixed_lengths():
    workload = make(num_prompts=5, random_input_len=7, random_output_len=3)
    assert lengths(workload) == [(7, 3)] * 5
    assert len({request.prompt_token_ids for request in workload.requests}) == 5
    ids = {i for request in workload.requests for i in request.prompt_token_ids}
    assert min(ids) >= 3
    assert max(ids) < 1000
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (35, 15)


def test_random_lengths():
    workload = make(
        num_prompts=2000,
        random_input_len=100,
        random_output_len=10,
        random_range_ratio=0.5,
    )
    inputs, outputs = zip(*lengths(workload), strict=True)
    assert (min(inputs), max(inputs)) == (50, 150)
    assert (min(outputs), max(outputs)) == (5, 15)
    assert sum(inputs) / 2000 == pytest.approx(100, rel=0.03)


def test_repetitions_have_other_tokens():
    """The same lengths, so that they compare; no common start, for no cache."""
    options = {"num_prompts": 20, "random_range_ratio": 0.5, "random_prefix_len": 8}
    first, again, second = (
        make(**options),
        make(**options),
        make(repetition=1, **options),
    )
    assert first.digest == again.digest != second.digest
    assert lengths(first) == lengths(second)
    pairs = zip(first.requests, second.requests, strict=True)
    assert max(common(a, b) for a, b in pairs) < 3
    assert min(common(first.requests[0], r) for r in first.requests) >= 8
    assert make(seed=1, **options).digest != first.digest


def test_groups_of_prefixes():
    workload = make(
        dataset_name="prefix_repetition",
        num_prompts=6,
        prefix_repetition_prefix_len=32,
        prefix_repetition_suffix_len=8,
        prefix_repetition_num_prefixes=2,
        prefix_repetition_output_len=4,
    )
    a, b, c, *_ = workload.requests
    assert lengths(workload) == [(40, 4)] * 6
    assert 32 <= common(a, c) < 40
    assert common(a, b) < 8


def test_azure(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    options = {"dataset_name": "azure", "dataset_path": str(path)}
    workload = make(**options)
    assert lengths(workload) == [(374, 44), (396, 109), (879, 55)]
    times = [
        request.arrival - workload.requests[0].arrival for request in workload.requests
    ]
    assert times == pytest.approx([0, 4.314579, 4.541877], abs=1e-5)
    assert lengths(make(num_prompts=1, **options)) == [(374, 44)]
    assert lengths(make(length_scale=0.25, **options)) == [
        (94, 11),
        (99, 27),
        (220, 14),
    ]


def test_cut_to_the_context(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    workload = make(dataset_name="azure", dataset_path=str(path), max_model_len=400)
    assert lengths(workload) == [(356, 44), (291, 109), (345, 55)]
    assert workload.num_cut == 3
    assert make(num_prompts=2, max_model_len=256).num_cut == 0


def trace_line(length, hashes, **fields):
    row = {"timestamp": 0, "input_length": length, "output_length": 5}
    return json.dumps({**row, "hash_ids": hashes, **fields}) + "\n"


def test_shared_blocks(tmp_path):
    """Equal hashes are equal blocks; the last one is cut."""
    path = tmp_path / "trace.jsonl"
    path.write_text(
        trace_line(20, [0, 1, 2])
        + trace_line(17, [0, 1, 3], timestamp=2500)
        + trace_line(16, [4, 1])
    )
    options = {"dataset_name": "timed_trace", "dataset_path": str(path)}
    workload = make(timed_trace_chunk_hash_size=8, **options)
    first, second, third = workload.requests
    assert lengths(workload) == [(20, 5), (17, 5), (16, 5)]
    assert 16 <= common(first, second) <= 17
    assert common(first, third) < 8
    assert first.prompt_token_ids[8:16] == third.prompt_token_ids[8:16]
    assert [r.arrival for r in workload.requests] == [0.0, 2.5, 0.0]
    half = make(timed_trace_chunk_hash_size=8, length_scale=0.5, **options)
    assert lengths(half) == [(10, 2), (8, 2), (8, 2)]
    assert common(*half.requests[:2]) == 8


def test_published_traces(shared_data):
    folder = shared_data / "data" / "traces"
    azure = folder / "azure2023" / "AzureLLMInferenceTrace_code.csv"
    workload = make(dataset_name="azure", dataset_path=str(azure), num_prompts=3)
    assert lengths(workload) == [(4808, 10), (3180, 8), (110, 27)]
    mooncake = folder / "mooncake" / "conversation_trace.jsonl"
    workload = make(
        dataset_name="timed_trace", dataset_path=str(mooncake), num_prompts=2
    )
    assert lengths(workload) == [(6758, 500), (7322, 490)]
    assert 512 <= common(*workload.requests) < 520


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"random_range_ratio": 1.0}, "random_range_ratio=1.0"),
        ({"length_scale": 0.0}, "length_scale=0.0"),
        ({"dataset_name": "azure"}, "needs dataset_path"),
        ({"dataset_path": "x"}, "dataset_path"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options(fields, word):
    with pytest.raises(InvalidRequestError, match=word):
        WorkloadOptions(**fields)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no row"),
        ("azure", "a,b\n1,2\n", "line 2"),
        ("azure", AZURE + "2023-11-16 18:15:51.22,many,5\n", "line 5"),
        ("timed_trace", '{"timestamp": 0}\n', "line 1"),
        ("timed_trace", trace_line(3, [1]) + "nonsense\n", "line 2"),
    ],
)
def test_malformed_traces(tmp_path, name, text, word):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=word):
        make(dataset_name=name, dataset_path=str(path))


def test_missing_trace(tmp_path):
    with pytest.raises(InvalidRequestError, match="No such file"):
        make(dataset_name="azure", dataset_path=str(tmp_path / "none.csv"))
