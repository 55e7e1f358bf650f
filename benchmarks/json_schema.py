"""Measures structured outputs against the JSON Schema test suite.

    python -m benchmarks.json_schema SUITE [--samples N] [--max-tokens N] [--no-record]
    python -m benchmarks.json_schema SUITE --costs FOLDER

SUITE is a checkout of JSON-Schema-Test-Suite with `tests` and `remotes`. Three figures
per draft, one line each in `results/json_schema.jsonl`:

- accepted: the share of schemas that compile, and which keyword or reason the others
  are refused for;
- right: of the suite's instances of accepted schemas, how many the grammar judges as
  the suite does. An instance that is valid and refused restricts the model more than
  the schema does; an invalid one that is taken would be wrong output;
- valid: outputs sampled from the embedded model at temperature 1 that the `jsonschema`
  library finds valid. Outputs cut off by the token budget are counted apart.

With `--costs`, instead of the last: microseconds on the host per compile, and per token
pushed with the mask after it, for the tokenizer in a folder. Run that on an idle
machine.
"""

import argparse
import collections
import json
import re
import statistics
import time
from pathlib import Path

import jsonschema
import referencing
import referencing.jsonschema

from benchmarks.record import append
from jllm import LLM, InvalidRequestError, SamplingParams, StructuredOutputsParams
from jllm.sampling.grammar import Matcher
from jllm.text.structured import compile_grammar, make_vocabulary
from jllm.text.tokenizer import load_tokenizer

DRAFTS = {
    "draft7": jsonschema.Draft7Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft2020-12": jsonschema.Draft202012Validator,
}
REMOTE = "http://localhost:1234/"
PROMPT = "Once upon a time"


def read_cases(suite, draft):
    """Every schema of a draft: `(file, description, schema, tests)`."""
    cases = []
    for path in sorted((suite / "tests" / draft).rglob("*.json")):
        name = str(path.relative_to(suite / "tests" / draft))
        cases += [
            (name, case["description"], case["schema"], case["tests"])
            for case in json.loads(path.read_text())
        ]
    return cases


def read_remotes(suite):
    """The documents that schemas of the suite refer to."""
    resources = []
    for path in (suite / "remotes").rglob("*.json"):
        uri = REMOTE + str(path.relative_to(suite / "remotes"))
        resource = referencing.Resource.from_contents(
            json.loads(path.read_text()),
            default_specification=referencing.jsonschema.DRAFT202012,
        )
        resources.append((uri, resource))
    return referencing.Registry().with_resources(resources)


def reasons_of(error):
    """The keywords that an error names, or what it says."""
    text = str(error)
    keys = re.search(r"Unimplemented keys: \[(.*)\]", text)
    if keys:
        return [key.strip(' "') for key in keys[1].split(",")]
    text = re.sub(r"^structured_outputs\.json (is refused|cannot be read): ", "", text)
    return [re.sub(r"[:(\"'\[].*", "", text).strip() or text]


def takes(grammar, tokens, text):
    """Whether a text is in a grammar."""
    matcher = grammar.copy()
    ids = tokens.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def judge_instances(cases, grammars, tokens):
    """Counts how the grammars judge the instances of the suite."""
    counts = collections.Counter()
    wrong = []
    for (name, description, _, tests), grammar in zip(cases, grammars, strict=True):
        if grammar is None:
            continue
        for test in tests:
            text = json.dumps(test["data"], ensure_ascii=False)
            taken = takes(grammar, tokens, text)
            kind = "valid" if test["valid"] else "invalid"
            counts[f"{kind} {'taken' if taken else 'refused'}"] += 1
            if taken and not test["valid"]:
                wrong.append(f"{name}: {description}: {test['description']}")
    return counts, wrong


def compile_all(cases, vocabulary):
    """A grammar or None per case, reasons of refusal, and microseconds per compile."""
    grammars, reasons, micros = [], collections.Counter(), []
    for _, _, schema, _ in cases:
        began = time.perf_counter()
        try:
            constraint = StructuredOutputsParams(json=json.dumps(schema))
            grammars.append(compile_grammar(constraint, vocabulary))
            micros.append((time.perf_counter() - began) * 1e6)
        except InvalidRequestError as error:
            grammars.append(None)
            reasons.update(reasons_of(error))
    return grammars, reasons, micros


def sample_outputs(llm, cases, grammars, samples, max_tokens):
    """Outputs of the model, as `(case, output)`."""
    kept = [c for c, grammar in zip(cases, grammars, strict=True) if grammar]
    params = [
        SamplingParams(
            n=samples,
            seed=i,
            temperature=1.0,
            max_tokens=max_tokens,
            structured_outputs={"json": json.dumps(schema)},
        )
        for i, (_, _, schema, _) in enumerate(kept)
    ]
    results = llm.generate([PROMPT] * len(kept), params)
    return [
        (case, output)
        for case, result in zip(kept, results, strict=True)
        for output in result.outputs
    ]


def judge_outputs(outputs, validator_class, registry):
    """Counts valid, invalid and cut outputs; lists the invalid ones."""
    counts, bad = collections.Counter(), []
    for (name, description, schema, _), output in outputs:
        if output.finish_reason != "stop":
            counts[output.finish_reason] += 1
            continue
        try:
            validator = validator_class(
                schema, registry=registry, format_checker=validator_class.FORMAT_CHECKER
            )
            validator.validate(json.loads(output.text))
            counts["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            counts["invalid"] += 1
            reason = str(error).splitlines()[0]
            bad.append(f"{name}: {description}: {output.text!r}: {reason}")
        except (referencing.exceptions.Unresolvable, re.error) as error:
            counts[f"not judged: {type(error).__name__}"] += 1
    return counts, bad


def mask_micros(grammars, vocabulary):
    """Microseconds per token pushed with the next mask, along instances that fit."""
    micros = []
    vocab_size = vocabulary.tokens.vocab_size
    for grammar, tests in grammars:
        for test in tests:
            text = json.dumps(test["data"], ensure_ascii=False)
            if grammar is None or not takes(grammar, vocabulary.tokens, text):
                continue
            matcher = Matcher(grammar, vocab_size, end_ids=(), may_end=False)
            matcher.mask()
            for token in vocabulary.tokens.tokenize_str(text):
                began = time.perf_counter()
                done = matcher.push(token)
                micros.append((time.perf_counter() - began) * 1e6)
                if done:
                    break
    return micros


def quantiles(values):
    """Median, 99th percentile and maximum."""
    cuts = statistics.quantiles(values, n=100)
    return {
        "p50": round(statistics.median(values), 1),
        "p99": round(cuts[98], 1),
        "max": round(max(values), 1),
    }


def main():
    """Runs all drafts and records one row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--draft", choices=DRAFTS, action="append")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--costs", type=Path, help="folder of a tokenizer to time")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    registry = read_remotes(options.suite)
    llm = None if options.costs else LLM(max_num_seqs=32)
    folder = options.costs or llm.model_path
    vocabulary = make_vocabulary(load_tokenizer(folder))
    rows = []
    for draft in options.draft or DRAFTS:
        cases = read_cases(options.suite, draft)
        grammars, reasons, micros = compile_all(cases, vocabulary)
        judged, wrong = judge_instances(cases, grammars, vocabulary.tokens)
        tests = [case[3] for case in cases]
        row = {
            "draft": draft,
            "vocabulary": vocabulary.tokens.vocab_size,
            "schemas": len(cases),
            "accepted": sum(grammar is not None for grammar in grammars),
            "refused_by": dict(reasons.most_common()),
            "instances": dict(judged),
            "wrongly_taken": wrong,
        }
        if llm is None:
            steps = mask_micros(zip(grammars, tests, strict=True), vocabulary)
            row |= {
                "tokenizer": folder.name,
                "compile_us": quantiles(micros),
                "push_and_mask_us": quantiles(steps),
            }
        else:
            outputs = sample_outputs(
                llm, cases, grammars, options.samples, options.max_tokens
            )
            counts, bad = judge_outputs(outputs, DRAFTS[draft], registry)
            row |= {
                "samples_per_schema": options.samples,
                "max_tokens": options.max_tokens,
                "outputs": dict(counts),
                "invalid_outputs": bad,
            }
        print(json.dumps(row, indent=2))
        rows.append(row)
    if not options.no_record:
        append("json_schema", rows)


if __name__ == "__main__":
    main()
