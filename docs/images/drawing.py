"""What the drawings share: one look, and the few shapes. ``python docs/images/draw_all.py`` draws them all."""

from __future__ import annotations

from pathlib import Path

BLUE, PALE, GREEN, RED, GREY = "#3b6fb6", "#c5d5ea", "#5a9a5a", "#c0504d", "#ececec"
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#555}.title{font-size:13px;font-weight:600;fill:#222}.name{font-weight:600;fill:#222}"
    ".middle{text-anchor:middle}.end{text-anchor:end}.light{fill:#fff}.frame{fill:none;stroke:#999}.line{stroke:#777;fill:none}"
    ".arrow{stroke:#777;fill:none;marker-end:url(#tip)}"
)
TIP = '<marker id="tip" markerWidth="7" markerHeight="6" refX="6" refY="3" orient="auto"><polygon points="0 0 7 3 0 6"/></marker>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {more}/>'


def box(x: float, y: float, width: float, height: float, fill: str, name: str, *lines: str) -> str:
    """A rounded box with a name, and lines below it."""
    middle, light = x + width / 2, " light" if fill in (BLUE, GREEN, RED) else ""
    top = y + height / 2 + 4 - 7 * len(lines)
    words = [text(middle, top, name, "name middle" + light)]
    words += [text(middle, top + 15 * (n + 1), line, "middle" + light) for n, line in enumerate(lines)]
    return rect(x, y, width, height, fill, 'rx="5"') + "".join(words)


def arrow(x0: float, y0: float, x1: float, y1: float, label: str = "", above: float = 6) -> str:
    words = text((x0 + x1) / 2, (y0 + y1) / 2 - above, label, "middle") if label else ""
    return f'<path class="arrow" d="M{x0:g} {y0:g}L{x1:g} {y1:g}"/>{words}'


def write(name: str, width: float, height: float, *parts: str, style: str = "") -> None:
    """docs/images/NAME.svg."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
    ground = f"<style>{STYLE}{style}</style><defs>{TIP}</defs><rect width='100%' height='100%' fill='#fff'/>"
    Path(__file__).with_name(f"{name}.svg").write_text(f"{head}{ground}{''.join(parts)}</svg>\n")
