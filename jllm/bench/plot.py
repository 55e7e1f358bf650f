"""Pictures of results, with matplotlib (extra `plot`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm.errors import ConfigError, InvalidRequestError


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One diagram.

    Attributes:
        title: Above it.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        series: Label to points.
        style: "line", "points" or "bars" (of which only y is used, x are labels).
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[Any, float]]]
    style: str = "line"


def check_plot(path: str | None) -> None:
    """Refuses a picture that could not be made, before anything is measured.

    Raises:
        InvalidRequestError: The file is no PNG.
        ConfigError: matplotlib is not installed.
    """
    if path is None:
        return
    if Path(path).suffix != ".png":
        raise InvalidRequestError(f"plot={path!r} must end with .png")
    _pyplot()


def distribution_panel(title: str, samples: Mapping[str, Sequence[float]]) -> Panel:
    """Share of samples at most so long; samples in seconds, drawn in milliseconds."""
    series: dict[str, list[tuple[Any, float]]] = {}
    for label, values in samples.items():
        ordered = sorted(values)
        series[label] = [
            (1000 * value, (i + 1) / len(ordered)) for i, value in enumerate(ordered)
        ]
    return Panel(title, "ms", "share of samples", series)


def draw(path: str, panels: Sequence[Panel]) -> None:
    """Writes a PNG with the panels side by side."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for label, points in panel.series.items():
            xs, ys = [x for x, _ in points], [y for _, y in points]
            if panel.style == "bars":
                axis.bar(xs, ys, label=label)
            else:
                mark = {"line": "-", "points": "o-"}[panel.style]
                axis.plot(xs, ys, mark, label=label)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axis.grid(visible=True, alpha=0.3)
        if len(panel.series) > 1:
            axis.legend()
    figure.tight_layout()
    figure.savefig(Path(path).expanduser(), dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError(
            "plot needs matplotlib, which is not installed: pip install 'jllm[plot]'"
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
