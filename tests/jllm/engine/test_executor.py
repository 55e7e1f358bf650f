"""The calls of one engine, made again by the executor of another."""

import numpy as np
import pytest

from jllm.distributed.messages import decode, encode
from jllm.errors import ConfigError
from tests.engines import make_engine
from tests.jllm.distributed.workload import outputs_of


class Log:
    """Keeps what other hosts would be sent, and what this one computed."""

    def __init__(self):
        self.calls, self.results, self.closed = [], {}, 0

    def send(self, name, size, arrays):
        self.calls.append(encode(["run", name, size, list(arrays)]))

    def note_launched(self, result):
        self.results[len(self.calls)] = result

    def close(self):
        self.closed += 1


def test_calls_as_they_are_sent_give_the_same_results():
    """Chunks, prefix hits, sampling rules, prompt scores and pooled prompts."""
    first, second = make_engine(), make_engine()
    log = first.executor._peers = Log()
    outputs_of(first)
    names = set()
    for number, message in enumerate(log.calls, 1):
        _, name, size, arrays = decode(message)
        names.add(name)
        result = second.executor.execute(name, size, arrays)
        if result is None:
            assert number not in log.results
            continue
        np.testing.assert_array_equal(
            np.asarray(result), np.asarray(log.results[number])
        )
    assert names >= {"prefill", "rules", "sampler", "prompt_logprobs", "pool"}
    with pytest.raises(ConfigError, match="num_hosts=1"):
        first.update_weights(first.weights)
    first.close()
    second.close()
    assert log.closed == 1
