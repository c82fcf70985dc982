"""What `make bench` keeps, to be read: the overview (what is demanded, and what was measured), then
every group."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from demands import DEMANDS, Demand

RESULTS = Path(__file__).parent / "results" / "cpu.json"
CHANGED = "kernels changed since"

Row = dict[str, Any]
Kept = dict[str, Any]  # {"machine": facts, "parts": {name: {..., "rows": [Row]}}}
UNITS = {"min_ms": "ms", "extra_mib": "MiB", "peak_mib": "MiB", "gradient_error": ""}


def grid(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def all_rows(kept: Kept) -> list[Row]:
    return [row for part in kept["parts"].values() for row in part["rows"]]


def circumstances(kept: Kept) -> str:
    facts, parts = kept["machine"], kept["parts"].values()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    commits = ", ".join(sorted({part["commit"] for part in parts}))
    dates = ", ".join(sorted({part["date"] for part in parts}))
    busy = max(part["busy"] for part in parts)
    minutes = sum(part["seconds"] for part in parts) / 60
    return (
        f"{facts['cpu']} ({facts['capability']}), {facts['cores']} cores, Python "
        f"{facts['python']}, {versions}; commit {commits}; {dates}; recorded in "
        f"{minutes:.0f} minutes. Others used at most {busy:.0%} of the machine just before a part."
    )


def found(rows: list[Row], demand: Demand, contestant: str) -> Row:
    """The row that a demand speaks of. Its `problem` says why there is no value."""
    for row in rows:
        facts = {**demand.facts, "contestant": contestant}
        if all(row.get(key) == value for key, value in facts.items()):
            return row
    return {"problem": "not measured"}


def unchanged(row: Row) -> bool:
    return True


def judged(
    rows: list[Row], demand: Demand, current: Callable[[Row], bool] = unchanged
) -> tuple[str, str, str, str]:
    """What, measured, out of which values, demanded and whether it is met. `current` tells of a row
    whether its kernels are still those that were measured."""
    names = [demand.of] + ([demand.over] if demand.over else [])
    parts = [found(rows, demand, name) for name in names]
    bound = demand.at_most if demand.at_most is not None else demand.at_least
    sign = "≤" if demand.at_most is not None else "≥"
    demanded = "-" if bound is None else f"{sign} {number(bound)}{demand.unit}"
    for part in parts:
        if "problem" in part:
            return demand.what, part["problem"], demanded, "-" if bound is None else "no"
    values = [part[demand.value] for part in parts]
    value = values[0] / values[1] if demand.over else values[0]
    close = bound is not None and number(value) == number(bound)  # more digits tell the side
    measured = f"{f'{value:.5g}' if close else number(value)}{demand.unit}"
    if demand.over:
        measured += f" ({number(values[0])} / {number(values[1])} {UNITS[demand.value]}".rstrip()
        measured += ")"
    if not all(current(part) for part in parts):
        measured += f"; {CHANGED}"
    met = "-"
    if bound is not None:
        met = "yes" if (value <= bound if sign == "≤" else value >= bound) else "no"
    return demand.what, measured, demanded, met


def overview(kept: Kept | None, current: Callable[[Row], bool] = unchanged) -> str:
    if kept is None:
        return "No run is recorded yet: `make bench` on a quiet machine writes this table.\n"
    rows = all_rows(kept)
    lines = [
        circumstances(kept),
        "",
        "One thread unless said otherwise; D=512, scale 100; minima of rounds in which all take",
        "turns in one process. Faster than: the peer's time over ours.",
        "",
        *grid(("", "measured", "demanded", "met"), (judged(rows, one, current) for one in DEMANDS)),
    ]
    return "\n".join(lines) + "\n"


def group_table(rows: list[Row]) -> list[str]:
    """One group: a line a contestant, its times over those of the first and of the floor."""
    first = rows[0]
    floor = next((row for row in rows if row["contestant"] == "floor"), None)
    extra = [
        key for key in ("extra_mib", "peak_mib", "gradient_error") if any(key in r for r in rows)
    ]
    titles = {"extra_mib": "extra MiB", "peak_mib": "peak MiB", "gradient_error": "gradient error"}

    def over(row: Row, base: Row) -> str:
        return number(row["min_ms"] / base["min_ms"]) if "min_ms" in base else "-"

    head = ["contestant", "setting", "threads", *(titles[key] for key in extra), "min ms",
            "median ms", "rounds", f"over {first['contestant']}"]  # fmt: skip
    head += ["over the floor"] if floor else []
    lines = []
    for row in rows:
        cells = [row["contestant"], row["setting"] or "-", str(row["threads"])]
        if "problem" in row:
            cells += [row["problem"].replace("|", "\\|")] + ["-"] * (len(head) - 4)
        else:
            cells += [number(row.get(key)) for key in extra]
            cells += [number(row["min_ms"]), number(row["median_ms"]), str(row["rounds"])]
            cells += [over(row, first)] + ([over(row, floor)] if floor else [])
        lines.append(cells)
    return grid(head, lines)


def page(kept: Kept) -> str:
    lines = [
        "# Operators on a CPU", "", "Generated by `make bench`; nothing here is typed.", "",
        overview(kept),
    ]  # fmt: skip
    groups: dict[str, list[Row]] = {}
    for row in all_rows(kept):
        groups.setdefault(row["group"], []).append(row)
    for name, rows in groups.items():
        lines += [f"## {name}", "", *group_table(rows), ""]
    parts = ([name, f"{part['seconds']:.0f}", f"{part['busy']:.0%}", part["outcome"]]
             for name, part in kept["parts"].items())  # fmt: skip
    lines += [
        "## Parts of the run",
        "",
        *grid(("part", "seconds", "used by others before", ""), parts),
        "",
    ]
    return "\n".join(lines)
