"""The page that `diagnose` writes, in a browser: on a desk and on a phone, in light and in dark, without a network."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from browser import Opened, in_browser

from batchnorm.whole.findings import Finding, Profile
from batchnorm.whole.report import Report

LAYERS = 24
NAMES = [f"backbone.stages.{i}.blocks.0.downsample.normalization" for i in range(LAYERS)]
FOUND = [("error", "train-eval-gap"), ("warning", "dead-channel"), ("info", "bias-before-norm")]


def report() -> Report:
    """A deep network of long names, with findings of each severity, and values at the ends of the scales."""
    generator = np.random.default_rng(0)
    profiles = [
        Profile(
            name, 64, float("inf") if i == 3 else 0.0 if i == 4 else 0.1 * i,
            np.append(generator.normal(size=62), [0.0, np.nan]), 10.0 ** generator.uniform(-9, 3, 64),
        )
        for i, name in enumerate(NAMES)
    ]  # fmt: skip
    remedy = "import torch; w = model.get_submodule('x').weight.data; w[[" + ", ".join(map(str, range(60))) + "]] = 1"
    found = [
        Finding(name, check, severity, "a measured number", "Why it is so.", remedy)  # type: ignore[arg-type]
        for severity, check in FOUND
        for name in NAMES[: 1 if severity == "error" else 8]
    ]
    return Report(tuple(found), tuple(profiles), "20 batches (640 samples) read", ("A note.",))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report().to_html(), encoding="utf-8")
    with in_browser(path, ready="svg") as open_at:
        yield open_at


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)])
def test_everything_is_seen_and_nothing_sticks_out(opened: Opened, width: int, height: int) -> None:
    tab, said = opened(width, height)
    assert said == [], "it asks for nothing and complains of nothing"
    tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sizes = tab.eval_on_selector_all(
        "svg", "plots => plots.map(p => p.getBoundingClientRect()).map(r => [r.width, r.height, r.left, r.right])"
    )
    assert len(sizes) == 1 + 2 * LAYERS
    assert all(w > 300 and h > 60 and left >= 0 and right <= width for w, h, left, right in sizes)
    outside = """plots => plots.flatMap(plot => {
        const box = plot.getBoundingClientRect();
        return [...plot.querySelectorAll('text, rect, polyline')].map(part => part.getBoundingClientRect()).filter(
            r => r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1);
    }).length"""
    assert tab.eval_on_selector_all("svg", outside) == 0, "no label is cut"
    bars = tab.eval_on_selector_all("rect", "bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert len(bars) == LAYERS
    assert all(bar > 0 for bar in bars)
    assert max(bars) == bars[3], "what is infinite is the longest"
    small = tab.eval_on_selector_all("svg text", "texts => texts.map(t => t.getBoundingClientRect().height)")
    assert min(small) >= 9, "letters can be read on a phone"
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(opened: Opened, scheme: str) -> None:
    """By the contrast that WCAG 2.1 wants: 4.5 for text, 3 for what is drawn."""
    tab, _ = opened(1200, 900, color_scheme=scheme)
    colors = tab.evaluate("""() => {
        const look = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
        return [look('html', 'backgroundColor'), look('body', 'color'), look('.error', 'color'),
            look('.warning', 'color'), look('.info', 'color'), look('svg text', 'fill'), look('rect', 'fill'),
            look('polyline', 'stroke'), look('.limit', 'stroke')];
    }""")
    paper, *others = (luminance(color) for color in colors)
    assert (paper < 0.05) == (scheme == "dark")
    contrasts = [(max(paper, other) + 0.05) / (min(paper, other) + 0.05) for other in others]
    assert all(contrast >= 4.5 for contrast in contrasts[:5]), contrasts
    assert all(contrast >= 3 for contrast in contrasts[5:]), contrasts
    tab.context.close()


def luminance(color: str) -> float:
    """The relative luminance of a colour, as WCAG 2.1 defines it."""
    assert color.startswith("rgb("), "opaque"
    parts: Any = np.array([float(part) for part in color[4:-1].split(",")]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
