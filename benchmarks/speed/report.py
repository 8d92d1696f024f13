"""The tables and the plot of the stored speed results.

python benchmarks/speed/report.py      # writes benchmarks/README.md and results/speed.svg
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
EXPERIMENTS = ("swap", "mixed_batch", "overhead", "residency", "training", "joint",
               "joint_embedded", "growth", "evaluation", "beginning", "whole_run")  # fmt: skip
BEGIN, END = "<!-- speed: from report.py -->", "<!-- end of speed -->"
PLOT = "speed.svg"


def stored(folder: Path) -> list[dict[str, Any]]:
    """The results in ``folder`` by experiment, those of a CPU first; those without figures of the
    common form are left out."""
    found = []
    for name in EXPERIMENTS:
        paths = [folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json"))]
        found += [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    return [result for result in found if "figures" in result]


def title(result: dict[str, Any]) -> str:
    where, dtypes = result["environment"]["device"], " and ".join(result["settings"]["dtypes"])
    return ", ".join(filter(None, (result["experiment"], dtypes, where)))


def table(result: dict[str, Any]) -> str:
    """One experiment in Markdown."""
    here, load = result["environment"], result["load"]
    small = ", **small model, for trial only**" if result["settings"]["quick"] else ""
    # Older results do not say it.
    busy = ", **on a busy machine: times are too long**" if result.get("busy") else ""
    lines = [
        f"### {title(result)}{small}{busy}",
        "",
        f"`{result['command']}`: {result['seconds']:.0f} s on {here['cores']} cores, "
        f"{here['threads']} thread(s); load {load['before'][0]:.1f} before and "
        f"{load['after'][0]:.1f} after; torch {here['torch']}, transformers "
        f"{here['transformers']}, PEFT {here['peft']}; commit {here['git']}.",
        "",
        "| figure | | ours | PEFT | goal for ours | |",
        "|---|---|---|---|---|---|",
    ]
    for figure in result["figures"]:
        mark = {True: "reached", False: "**missed**", None: ""}[figure["reached"]]
        lines.append(
            f"| {figure['name']} | {figure['unit']} | {_number(figure['ours'])} "
            f"| {_number(figure['peft'])} | {figure['goal'] or ''} | {mark} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def advantage(figure: dict[str, Any]) -> float | None:
    """How many times better ours is than PEFT, below 1 if worse; None without a PEFT figure."""
    ours, peft = figure["ours"], figure["peft"]
    if not ours or not peft or ours < 0 or peft < 0:
        return None
    return float(peft / ours if figure["better"] == "less" else ours / peft)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A plot with a point for each figure that PEFT has too: how many times better ours is."""
    import matplotlib

    matplotlib.use("svg")
    # Fixed, so that the same results give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    panels = []
    for result in results:
        points = [(f["name"], a) for f in result["figures"] if (a := advantage(f)) is not None]
        if points:
            panels.append((title(result), points))
    heights = [len(points) + 2 for _, points in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, squeeze=False, layout="constrained",
        figsize=(8, 0.2 * sum(heights) + 0.5), gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (name, points) in zip(axes[:, 0], panels, strict=True):
        names, values = zip(*points, strict=True)
        colours = ["tab:blue" if value >= 1 else "tab:red" for value in values]
        axis.scatter(values, range(len(names)), c=colours, s=18, zorder=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        if max(values) < 20:  # within a decade or so the ticks between say more
            axis.xaxis.set_minor_formatter("{x:g}")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.grid(axis="x", color="0.9")
        axis.set_title(name, loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("times better than PEFT (right of the line: ours is)")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def section(results: list[dict[str, Any]], image: str) -> str:
    """The text between the two marks of the README."""
    if not results:
        return "Nothing is stored yet."
    goals = [f["reached"] for result in results for f in result["figures"]]
    reached, set_ = goals.count(True), len(goals) - goals.count(None)
    head = f"{reached} of {set_} goals reached.\n\n![How many times better than PEFT]({image})"
    return "\n\n".join([head, *map(table, results)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, default=HERE / "results", help="folder of the stored JSON")
    add("--readme", type=Path, default=HERE / "README.md", help="file to write the tables into")
    flags = parser.parse_args()
    results = stored(flags.results)
    if results:
        plot(results, flags.results / PLOT)
    text = flags.readme.read_text(encoding="utf-8")
    between = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    if not between.search(text):
        parser.error(f"expected the marks {BEGIN} and {END} in {flags.readme}; found none")
    written = f"{BEGIN}\n\n{section(results, f'results/{PLOT}')}\n\n{END}"
    flags.readme.write_text(between.sub(lambda _: written, text), encoding="utf-8")
    print(f"{len(results)} results, written into {flags.readme}")


if __name__ == "__main__":
    main()
