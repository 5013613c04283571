"""The report of `diagnose` as one page that works offline, in any browser, on a phone, and in light and dark.

The plots are SVG, drawn here. The page runs no script and makes no request.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from batchnorm.whole.chance import STABLE, noise
from batchnorm.whole.evidence import Array
from batchnorm.whole.findings import Finding, Profile

__all__ = ["page"]

WIDTH, ROW, LABEL = 400, 22, 140
"""In pixels of a phone; larger screens enlarge the plots."""

LONGEST = 3.0
"""The gap with the longest bar. Larger ones are as long, so that one of them does not hide all others."""

STYLE = """
:root {
  color-scheme: light dark; --line: #8886; --paper: #fff; --text: #16191d; --ink: #2563eb; --mark: #b45309;
  --error: #b91c1c; --warning: #b45309; --info: #0e7490;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111418; --text: #e7eaee; --ink: #6ea0ff; --mark: #f59e0b; --error: #f87171; --warning: #fbbf24;
    --info: #22d3ee;
  }
}
html { background: var(--paper); color: var(--text); }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
section { border-top: 1px solid var(--line); padding-top: .5rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .info { color: var(--info); }
pre { white-space: pre-wrap; background: #8882; padding: .6rem; border-radius: .3rem; font-size: .85rem; }
svg { width: 100%; max-width: 40rem; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
rect { fill: var(--ink); } .limit { stroke: var(--mark); stroke-dasharray: 4 3; } .axis { stroke: var(--line); }
polyline { fill: none; stroke: var(--ink); stroke-width: 1.5; }
details { margin: .3rem 0; } li { margin: .2rem 0; }
"""


def page(summary: str, notes: Sequence[str], groups: Sequence[Sequence[Finding]], layers: Sequence[Profile]) -> str:
    """The page as HTML.

    Args:
        summary: One sentence.
        notes: Further sentences.
        groups: The findings of each check and severity.
        layers: All layers.
    """
    sections = [_findings(groups)] if groups else []
    if any(layer.gap is not None for layer in layers):
        sections.append(_gaps(layers))
    sections.append(_spectra(layers))
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Batch normalization: diagnosis</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Batch normalization: diagnosis</h1>\n<p>{escape(summary)}</p>\n{said}"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _findings(groups: Sequence[Sequence[Finding]]) -> str:
    parts = ["<h2>Findings</h2>"]
    for group in groups:
        first = group[0]
        rows = "".join(
            f"<li><b>{escape(found.layer or 'the model')}</b>: {escape(found.evidence)}"
            f"<pre><code>{escape(found.remedy)}</code></pre></li>"
            for found in group
        )
        is_open = " open" if len(group) <= 3 else ""
        rows = f"<details{is_open}><summary>{len(group)} found</summary><ul>{rows}</ul></details>"
        parts.append(
            f'<section><h3><span class="{first.severity}">{first.severity}</span> {escape(first.check)}</h3>'
            f"<p>{escape(first.cause)}</p>{rows}</section>"
        )
    return "\n".join(parts)


def _gaps(layers: Sequence[Profile]) -> str:
    """A bar for each layer."""
    known = [layer for layer in layers if layer.gap is not None]
    limit = noise(STABLE)
    sizes = [layer.gap if layer.gap is not None and not math.isnan(layer.gap) else math.inf for layer in known]
    scale = (WIDTH - LABEL - 50) / LONGEST
    height = ROW * len(known) + 24
    rows = []
    for i, (name, size) in enumerate(zip(_labels([layer.name for layer in known]), sizes, strict=True)):
        end = LABEL + max(1.0, min(size, LONGEST) * scale)
        number = "∞" if math.isinf(size) else f"{size:.2g}" if size < 100 else f"{size:.0e}"
        rows += [
            f'<text x="0" y="{ROW * i + 15}">{escape(name)}</text>',
            f'<rect x="{LABEL}" y="{ROW * i + 4}" width="{end - LABEL:.1f}" height="{ROW - 8}"></rect>',
            f'<text x="{end + 5:.1f}" y="{ROW * i + 15}">{number}{" →" if size > LONGEST else ""}</text>',
        ]
    x = LABEL + limit * scale
    rows.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"></line>')
    rows.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{limit:.2f}</text>')
    return (
        "<h2>From training to evaluation</h2>\n<p>The distance of each layer's inputs in evaluation from its running "
        f"statistics, in standard deviations. The dashed line is the error of batches of {STABLE} independent values."
        "</p>\n" + _svg(height, "The gap between training and evaluation, layer by layer", rows)
    )


def _spectra(layers: Sequence[Profile]) -> str:
    """Each layer's gammas and variances, from the smallest to the largest."""
    parts = [
        "<h2>Spectra</h2>\n<p>Each layer's |gamma| and running variance, sorted, on a logarithmic scale. A drop at the "
        "left end means that channels are dying.</p>"
    ]
    for layer in layers:
        plots = [
            _spectrum(f"{name} of {layer.name or 'the layer'}", name, np.abs(values))
            for name, values in (("|gamma|", layer.weight), ("variance", layer.var))
            if values is not None
        ]
        if plots:
            heading = f"{escape(layer.name or 'the layer')}, {layer.channels} channels"
            parts.append(
                f"<details{' open' if len(layers) <= 6 else ''}><summary>{heading}</summary>{''.join(plots)}</details>"
            )
    return "\n".join(parts)


def _spectrum(title: str, name: str, values: Array) -> str:
    usable = np.sort(values[np.isfinite(values)])
    if not usable.size:
        return f"<p>{escape(name)}: not finite</p>"
    positive = usable[usable > 0]
    top = math.ceil(math.log10(positive[-1])) if positive.size else 0
    bottom = max(top - 12, math.floor(math.log10(positive[0]))) if positive.size else -1
    bottom = min(bottom, top - 1)
    height, left, right = 110, 50, WIDTH - 10
    logarithms = np.log10(np.maximum(usable, 10.0**bottom))
    step = (right - left) / max(1, len(usable) - 1)
    points = [
        (left + i * step, 8 + (top - value) / (top - bottom) * (height - 30)) for i, value in enumerate(logarithms)
    ]
    if len(points) == 1:
        points.append((right, points[0][1]))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    rows = [f'<text x="0" y="{height - 4}">{escape(name)}</text>', f'<polyline points="{line}"></polyline>']
    for power in (top, bottom):
        y = 8 + (top - power) / (top - bottom) * (height - 30)
        rows.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"></line>')
        rows.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    return _svg(height, title, rows)


def _svg(height: int, title: str, rows: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">\n' + "\n".join(rows) + "\n</svg>"
    )


def _labels(names: Sequence[str]) -> list[str]:
    """What tells layers apart: their names without what all begin and end with, shortened in the middle."""
    parts = [name.split(".") for name in names]
    least = min(map(len, parts)) - 1
    begin = next((i for i in range(least) if len({part[i] for part in parts}) > 1), least)
    end = next((i for i in range(least - begin) if len({part[-1 - i] for part in parts}) > 1), least - begin)
    if len(parts) == 1:
        begin, end = 0, 0
    short = [".".join(part[begin : len(part) - end]) or "the layer" for part in parts]
    return [name if len(name) <= 21 else f"{name[:10]}…{name[-10:]}" for name in short]
