"""Obvious float64 versions of the sampling rules, one row at a time."""

import dataclasses

import numpy as np

from jllm.sampling.rules import RowRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One row: its context and its parameters, neutral by default."""

    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    rules: RowRules = dataclasses.field(default_factory=RowRules)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def add_bias(scores, spec):
    scores = scores.copy()
    for token, value in spec.rules.logit_bias.items():
        scores[token] += value
    return scores


def penalize(scores, spec):
    scores = scores.copy()
    for token in set(spec.prompt) | set(spec.output):
        if scores[token] > 0:
            scores[token] /= spec.repetition
        else:
            scores[token] *= spec.repetition
    for token in set(spec.output):
        scores[token] -= spec.frequency * spec.output.count(token) + spec.presence
    return scores


def mask(scores, spec):
    scores = scores.copy()
    rules = spec.rules
    if rules.allowed_token_ids is not None:
        banned = set(range(len(scores))) - set(rules.allowed_token_ids)
        scores[list(banned)] = -np.inf
    if len(spec.output) < spec.min_tokens:
        scores[list(rules.stop_token_ids)] = -np.inf
    for *prefix, last in rules.bad_words_token_ids:
        start = len(spec.output) - len(prefix)
        if start >= 0 and list(spec.output[start:]) == prefix:
            scores[last] = -np.inf
    return scores


def rescue(scores, masked):
    if (masked > -np.inf).any():
        return masked
    return np.where(scores == scores.max(), scores, -np.inf)


def top_k(scores, k):
    if not 0 < k < len(scores):
        return scores
    least = np.sort(scores)[::-1][k - 1]
    return np.where(scores < least, -np.inf, scores)


def mass_of_better(scores):
    """Probability of all tokens with a strictly larger score, for each token."""
    probabilities = softmax(scores)
    return np.array([probabilities[scores > score].sum() for score in scores])


def top_p(scores, p):
    if p >= 1:
        return scores
    return np.where(mass_of_better(scores) < p, scores, -np.inf)


def min_p(scores, share):
    probabilities = softmax(scores)
    return np.where(probabilities < share * probabilities.max(), -np.inf, scores)


def final_scores(logits, spec):
    scores = penalize(add_bias(np.asarray(logits, np.float64), spec), spec)
    scores = rescue(scores, mask(scores, spec))
    if spec.temperature >= 1e-5:
        scores = scores / spec.temperature
    return min_p(top_p(top_k(scores, spec.top_k), spec.top_p), spec.min_p)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    best = logits.max()
    return logits - best - np.log(np.exp(logits - best).sum())
