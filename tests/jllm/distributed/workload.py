"""What several hosts compute in tests, and what one process computes to compare."""

import numpy as np

from jllm.pooling import PoolingParams
from tests.engines import drain, request

PARAMS = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 0.8, "seed": 6, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 0, "logit_bias": {7: 100.0}},
)


def requests():
    """Prompts of several chunks, with and without the second program of a step."""
    rng = np.random.default_rng(2)
    made = [
        request(
            i, rng.integers(3, 331, 7 + 17 * i), max_tokens=12, ignore_eos=True, **p
        )
        for i, p in enumerate(PARAMS)
    ]
    pooling = PoolingParams(pooling="mean")
    made.append(request("e", range(5, 90), max_tokens=1, pooling=pooling))
    return made


def outputs_of(engine):
    """What callers are told, as JSON has it; twice, the second time from the cache."""
    found = []
    for _ in range(2):
        for item in requests():
            engine.add(item)
        told = {}
        for output in drain(engine):
            entry = told.setdefault(output.request_id, {"tokens": [], "ends": []})
            entry["tokens"] += output.token_ids
            entry["ends"].append(output.finish_reason)
            for at in output.logprobs or ():
                entry.setdefault("tops", []).append(list(at.top_ids))
                entry.setdefault("logprobs", []).extend(at.top_logprobs)
            if output.pooled is not None:
                entry["pooled"] = output.pooled.tolist()
        found.append(told)
    return found


def assert_same(found, expected):
    """Tokens are equal; sums over devices may be made in another order."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, entry in theirs.items():
            for field in ("tokens", "ends", "tops"):
                assert mine[name].get(field) == entry.get(field)
            for field in ("logprobs", "pooled"):
                np.testing.assert_allclose(
                    mine[name].get(field, []), entry.get(field, []), atol=1e-4
                )


def endless(engine):
    """Works until the process is ended."""
    while True:
        for item in requests():
            engine.add(item)
        drain(engine)
