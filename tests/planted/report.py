"""Planted bugs x checks x result; README's table comes from it.   python tests/planted/report.py [--write]

A bug counts as caught when the check that names it says so, points at it, and passes the same thing without the bug.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from llmkit.check import runner

TESTS = Path(__file__).resolve().parents[1]
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- check table -->", "<!-- end -->"
CAUGHT = "caught"


def result_of(item: Any) -> str:
    """`caught`, or what went wrong."""
    found = []
    for is_planted in (False, True):
        with runner.quiet(), tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            try:
                subject = item.build(is_planted, patch, Path(folder))
                found.append(runner.run_one(runner.get_check(item.caught_by), subject))
            except Exception as error:
                return f"could not be planted: {type(error).__name__}: {str(error).split(chr(10))[0]}"
    clean, planted = found
    if planted.status != item.status:
        return f"missed: {planted.status}: {planted.measured}"
    if item.evidence.lower() not in f"{planted.measured} {planted.evidence}".lower():
        return f"missed: {item.evidence!r} is not pointed at"
    return CAUGHT if clean.status == "pass" else f"false alarm on the twin: {clean.status}: {clean.measured}"


def table(checks: list[runner.Check], results: dict[Any, str]) -> str:
    """Markdown: check, what it finds, tier, caught / planted."""
    lines = ["| check | what it finds | tier | caught / planted |", "|---|---|---|---|"]
    for item in checks:
        own = [result for plant, result in results.items() if plant.caught_by == item.id]
        count = f"{own.count(CAUGHT)} / {len(own)}" if own else "none planted"
        title = item.title.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{item.id}` | {title} | {item.tier} | {count} |")
    caught = list(results.values()).count(CAUGHT)
    lines.append(f"| **{len(checks)} checks** | | | **{caught} / {len(results)}** |")
    return "\n".join(lines)


def with_table(text: str, markdown: str) -> str:
    """The README with the table between its two marks. Raises SystemExit where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README.name}: has no {BEGIN} ... {END} for the table to go between")
    return f"{before}{begin}\n{markdown}\n{end}{after}"


def main(words: list[str]) -> int:
    sys.path.insert(0, str(TESTS))
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    import conftest  # noqa: F401  offline, one thread

    from planted.plant import all_plants

    if unknown := [word for word in words if word != "--write"]:
        raise SystemExit(f"{unknown[0]!r}: unknown; allowed: --write")
    if "--write" in words:
        with_table(README.read_text(encoding="utf-8"), "")  # complains before the minute of work
    plants = all_plants()
    width, results, started = max(map(len, plants)), {}, time.perf_counter()
    for name, item in plants.items():
        results[item] = result_of(item)
        print(f"{item.bug:<4} {name:<{width}}  {item.caught_by:<34} {results[item]}", flush=True)
    markdown = table(runner.all_checks(), results)
    print(f"\n{markdown}\n\n{time.perf_counter() - started:.0f} s")
    if "--write" in words:
        README.write_text(with_table(README.read_text(encoding="utf-8"), markdown), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
