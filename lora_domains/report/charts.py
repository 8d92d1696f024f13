"""Charts of a report as SVG: numbers in, markup out; colours and fonts come from the page.

Charts need no script and no file of their own. An interval bar repeats the figures beside it and is
hidden from screen readers; every other chart has a title and a table of its figures near it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lora_domains.report.text import SIGNS

WIDTH, HEIGHT = 420, 300
NARROW = 1e-300
"""Divisions by a smaller width overflow."""
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
Scale = Callable[[float], float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within ``low`` and ``high``."""
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= about)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def span(values: Sequence[float], room: float = 0.08) -> tuple[float, float]:
    """The smallest and the largest of ``values`` with some room around; never of zero width."""
    low, high = min(values), max(values)
    width = (high - low) or abs(high)
    margin = room * (width if width > NARROW else 1.0)
    return low - margin, high + margin


def _scale(domain: tuple[float, float], low: float, high: float) -> Scale:
    (start, end) = domain
    return lambda x: round(low + (x - start) / (end - start) * (high - low), 1)


def _short(x: float, signed: bool = False) -> str:
    return f"{x:+.4g}" if signed and abs(x) > 1e-12 else f"{x + 0.0:.4g}"


# ── An interval beside its figure ───────────────────────────────────────────────────────────────


def bar(
    fields: Mapping[str, Any], domain: tuple[float, float], threshold: float, verdict: str
) -> Markup:
    """A dot with its bounds and a threshold: ``fields`` holds difference, lower and upper."""
    x = _scale(domain, 4, 156)

    def at(value: float | None, end: float) -> float:
        # A missing bound runs to the edge.
        return x(min(max(end if value is None else value, domain[0]), domain[1]))

    low, high = at(fields["lower"], domain[0]), at(fields["upper"], domain[1])
    return Markup(
        '<svg class="bar {verdict}" viewBox="0 0 160 20" aria-hidden="true" focusable="false">'
        '<line class="limit" x1="{t}" x2="{t}" y1="1" y2="19"/>'
        '<line class="bounds" x1="{low}" x2="{high}" y1="10" y2="10"/>'
        '<circle cx="{dot}" cy="10" r="4.5"/></svg>'
    ).format(verdict=verdict, t=x(threshold), low=low, high=high, dot=at(fields["difference"], 0))


# ── Gain against retention ──────────────────────────────────────────────────────────────────────


def gain_and_retention(
    marks: Sequence[Mapping[str, Any]], margin: float | None, title: str
) -> Markup:
    """Each adapter's gain in its domain against its change in general knowledge, in points.

    A mark holds ``number``, ``name``, ``verdict``, and ``gain`` and ``kept``, each (value, lower,
    upper). ``margin`` (points, above 0) is the largest loss that retention allows, drawn as a line.
    """
    xs = [v for mark in marks for v in mark["gain"] if v is not None]
    ys = [v for mark in marks for v in mark["kept"] if v is not None]
    across = span([0.0, *xs])
    up = span([0.0, *([-margin * 1.2] if margin else []), *ys], 0.15)
    x, y = _scale(across, LEFT, WIDTH - RIGHT), _scale(up, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, across, up, "gain over the base, points", "general knowledge, points")]
    floor = y(max(-margin, up[0])) if margin else y(0)
    parts.append(
        Markup('<rect class="good" x="{}" y="{}" width="{}" height="{}"/>').format(
            x(0), TOP, round(WIDTH - RIGHT - x(0), 1), round(floor - TOP, 1)
        )
    )
    parts.append(_rule(x(0), x(0), TOP, HEIGHT - BOTTOM, "zero"))
    parts.append(_rule(LEFT, WIDTH - RIGHT, y(0), y(0), "zero"))
    if margin:
        parts.append(_rule(LEFT, WIDTH - RIGHT, floor, floor, "limit"))
        label = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">limit −{}</text>')
        parts.append(label.format(WIDTH - RIGHT - 4, floor + 13, _short(margin)))
    # Adapters that fail come first in the page; they are drawn last, over the others.
    parts += [_mark(mark, x, y, across, up) for mark in reversed(marks)]
    return _figure("group", title, Markup("").join(parts))


def _mark(
    mark: Mapping[str, Any], x: Scale, y: Scale,
    across: tuple[float, float], up: tuple[float, float],
) -> Markup:  # fmt: skip
    (gain, gain_low, gain_high), (kept, kept_low, kept_high) = mark["gain"], mark["kept"]

    def end(value: float | None, edge: float) -> float:
        return edge if value is None else value

    cx, cy = x(gain), y(kept)
    shape = Markup('<circle cx="{}" cy="{}" r="9"/>').format(cx, cy)
    if mark["verdict"] == "fail":
        shape = Markup('<rect x="{}" y="{}" width="17" height="17"/>').format(cx - 8.5, cy - 8.5)
    return Markup(
        '<a href="#{anchor}" class="mark {verdict}"><title>{number}. {name}: {sign} {verdict}, '
        "gain {gain:+.1f}, general {kept:+.1f} points</title>"
        '<line x1="{x1}" x2="{x2}" y1="{cy}" y2="{cy}"/><line x1="{cx}" x2="{cx}" y1="{y1}" '
        'y2="{y2}"/>{shape}<text x="{cx}" y="{ty}" text-anchor="middle">{number}</text></a>'
    ).format(
        anchor=mark["anchor"], verdict=mark["verdict"], number=mark["number"], name=mark["name"],
        sign=SIGNS[mark["verdict"]], gain=gain, kept=kept, cx=cx, cy=cy, ty=round(cy + 4, 1),
        x1=x(end(gain_low, across[0])), x2=x(end(gain_high, across[1])),
        y1=y(end(kept_low, up[0])), y2=y(end(kept_high, up[1])), shape=shape,
    )  # fmt: skip


# ── Training curves ─────────────────────────────────────────────────────────────────────────────


def curves(
    lines: Mapping[str, Sequence[float]], epochs: Sequence[int], best: int | None, what: str,
    title: str,
) -> Markup:  # fmt: skip
    """One line for each of ``lines`` over ``epochs``; the best epoch is marked."""
    along = (min(epochs) - 0.25, max(epochs) + 0.25)
    up = span([v for values in lines.values() for v in values])
    x, y = _scale(along, LEFT, WIDTH - RIGHT), _scale(up, HEIGHT - BOTTOM, TOP + 18)
    whole = sorted({round(t) for t in ticks(*along, 8)} & set(epochs)) or list(epochs)
    parts = [_axes(x, y, along, up, "epoch", what, whole)]
    if best is not None and along[0] <= best <= along[1]:
        parts.append(_rule(x(best), x(best), TOP + 18, HEIGHT - BOTTOM, "limit"))
        anchor = "end" if best > sum(along) / 2 else "start"
        # Away from the lines: above them when they have fallen, else below.
        ends = [values[-1] for values in lines.values()]
        above = max(ends) < sum(up) / 2
        level = TOP + 30 if above else HEIGHT - BOTTOM - 6
        nudge = -5 if anchor == "end" else 5
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">epoch {} kept</text>').format(
                x(best) + nudge, level, anchor, best
            )
        )
    for place, (name, values) in enumerate(lines.items()):
        path = " ".join(f"{x(e)},{y(v)}" for e, v in zip(epochs, values, strict=True))
        dots = Markup("").join(
            Markup('<circle cx="{}" cy="{}" r="3"/>').format(x(e), y(v))
            for e, v in zip(epochs, values, strict=True)
        )
        parts.append(_line(place, name, path, dots))
    return _figure("img", title, Markup("").join(parts))


# ── One share against another ───────────────────────────────────────────────────────────────────


def traces(
    lines: Mapping[str, Sequence[tuple[float, float]]], below: str, beside: str, title: str
) -> Markup:
    """One line for each of ``lines`` through its points (x, y), both shares."""
    along = (0.0, 1.0)
    up = (0.0, min(1.0, 1.08 * max(y for points in lines.values() for _, y in points)) or 1.0)
    x, y = _scale(along, LEFT, WIDTH - RIGHT), _scale(up, HEIGHT - BOTTOM, TOP + 18)
    parts = [_axes(x, y, along, up, below, beside)]
    for place, (name, points) in enumerate(lines.items()):
        parts.append(_line(place, name, " ".join(f"{x(a)},{y(b)}" for a, b in points)))
    return _figure("img", title, Markup("").join(parts))


# ── Shared parts ────────────────────────────────────────────────────────────────────────────────


def _axes(
    x: Scale, y: Scale, across: tuple[float, float], up: tuple[float, float], below: str,
    beside: str, tick_values: Sequence[float] | None = None,
) -> Markup:  # fmt: skip
    parts = []
    for value in tick_values or ticks(*across, 6):
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x(value), HEIGHT - BOTTOM + 16, _short(value)
            )
        )
    for value in ticks(*up):
        parts.append(_rule(LEFT, WIDTH - RIGHT, y(value), y(value), "grid"))
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                LEFT - 6, y(value) + 4, _short(value)
            )
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return Markup("").join(parts) + Markup(
        '<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>'
        '<text class="axis" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, below, middle, beside)


def _line(place: int, name: str, path: str, dots: Markup | None = None) -> Markup:
    """A line and its key: solid for the first of a chart, dashed for the second."""
    key = LEFT + place * 150
    return Markup(
        '<g class="line line{n}"><polyline points="{path}"/>{dots}<line x1="{k1}" '
        'x2="{k2}" y1="{ky}" y2="{ky}"/><text x="{kt}" y="{kty}">{name}</text></g>'
    ).format(
        n=place, path=path, dots=dots or "", k1=key, k2=key + 18, ky=TOP, kt=key + 24,
        kty=TOP + 4, name=name,
    )  # fmt: skip


def _rule(x1: float, x2: float, y1: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, x1, x2, y1, y2)


def _figure(role: str, title: str, body: Markup) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="{}" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, role, title, body)
