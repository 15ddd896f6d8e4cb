"""Pictures for light and for dark pages; ``python -m benchmarks.pictures`` draws those of docs/diagrams, by ``dot``."""

from __future__ import annotations

import subprocess
from pathlib import Path

DIAGRAMS = Path(__file__).parent.parent / "docs" / "diagrams"
STYLE = {
    "-G": ("bgcolor=transparent", "pad=0.1"),
    "-N": ("shape=box", "style=rounded", "fontname=sans-serif", "fontsize=13", "color=#777777", "margin=0.2,0.1"),
    "-E": ("fontname=sans-serif", "fontsize=12", "color=#777777", "arrowsize=0.7"),
}


def dark(svg: str) -> str:
    """Turn the ink of a picture light, and take its paper away."""
    svg = svg.replace("#000000", "#d7dae0").replace("#ffffff", "none").replace('stroke="black"', 'stroke="#d7dae0"')
    head, start, rest = svg.partition("<svg")
    attributes, end, body = rest.partition(">")
    return f"{head}{start}{attributes}{end}<style>text {{ fill: #d7dae0 }}</style>{body}"


def write_dark(path: Path) -> None:
    """Write the dark picture beside a light one: ``-dark.svg``."""
    path.with_name(f"{path.stem}-dark.svg").write_text(dark(path.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    """Draw each diagram, twice."""
    style = [f"{kind}{value}" for kind, values in STYLE.items() for value in values]
    for source in sorted(DIAGRAMS.glob("*.dot")):
        path = source.with_suffix(".svg")
        subprocess.run(["dot", "-Tsvg", *style, f"-o{path}", source], check=True)  # noqa: S603, S607
        write_dark(path)


if __name__ == "__main__":
    main()
