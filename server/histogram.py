"""Histograms that are cheap to add to: they are noted with every token."""

import bisect
from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily


class Counts:
    """How many values lie up to each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """Has no values.

        Args:
            bounds: Ascending.
        """
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Takes a value, so many times."""
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(
        self, name: str, text: str, labels: Sequence[str], values: Sequence[str]
    ) -> HistogramMetricFamily:
        """The metric as Prometheus reads it."""
        return make_family(
            name,
            text,
            (labels, values),
            (self._bounds, self._counts, self._sum),
        )


def make_family(
    name: str,
    text: str,
    labels: tuple[Sequence[str], Sequence[str]],
    histogram: tuple[Sequence[float], Sequence[int], float],
) -> HistogramMetricFamily:
    """A histogram as Prometheus reads it: counts are added up.

    Args:
        name: Of the metric.
        text: What it is.
        labels: Names and values of its labels.
        histogram: Bounds, the counts between them and beyond the last, and the sum.
    """
    names, values = labels
    bounds, counts, total = histogram
    family = HistogramMetricFamily(name, text, labels=list(names))
    buckets: list[tuple[str, float]] = []
    count = 0
    marks = [*(str(float(bound)) for bound in bounds), "+Inf"]
    for mark, more in zip(marks, counts, strict=True):
        count += more
        buckets.append((mark, count))
    family.add_metric(list(values), buckets, total)
    return family
