"""The process that `jllm bench startup` starts and times: loads, answers, compiles."""

import json
import sys
import time

TRACE = "/jax/core/compile/jaxpr_trace_duration"
LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILE = "/jax/core/compile/backend_compile_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"


def main() -> None:
    """Prints, as JSON, the times on the monotonic clock at which it got how far."""
    settings = json.loads(sys.argv[1])

    from jax import monitoring

    from jllm.llm import LLM
    from jllm.types import SamplingParams

    stages = {"imported": time.monotonic()}
    seconds = {TRACE: 0.0, LOWER: 0.0, COMPILE: 0.0}
    counts = {COMPILE: 0, CACHE_HIT: 0}

    def note(event: str, duration_secs: float, **_: object) -> None:
        if event in seconds:
            seconds[event] += duration_secs
        if event in counts:
            counts[event] += 1

    def note_hit(event: str, **_: object) -> None:
        if event in counts:
            counts[event] += 1

    monitoring.register_event_duration_secs_listener(note)
    monitoring.register_event_listener(note_hit)
    with LLM(**settings["config"]) as llm:
        stages["loaded"] = time.monotonic()
        prompt = {"prompt_token_ids": [3] * settings["input_len"]}
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        llm.generate(prompt, params, use_tqdm=False)
        stages["first_token"] = time.monotonic()
        llm.wait_until_compiled()
        stages["compiled"] = time.monotonic()
    figures = {
        "trace_seconds": seconds[TRACE],
        "lower_seconds": seconds[LOWER],
        "compile_seconds": seconds[COMPILE],
        "programs": counts[COMPILE],
        "cache_hits": counts[CACHE_HIT],
    }
    print(json.dumps(stages | figures))


if __name__ == "__main__":
    main()
