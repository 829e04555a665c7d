"""Do two runs of the benchmarks agree? Prints each ratio that they find further apart than they say.

make bench && cp -r build/bench build/bench-before && make bench
python bench/agree.py build/bench-before build/bench
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common


def ratios(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every summary in a benchmark's data, by what it is of."""
    if isinstance(value, dict) and "noise" in value:
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from ratios(part, f"{name} {key}")
    elif isinstance(value, list):
        for row in value:
            if isinstance(row, dict):
                of = {k: v for k, v in row.items() if isinstance(v, str | int) or k in ("guidance", "threshold")}
                yield from ratios(row, f"{name} {' '.join(f'{k}={v}' for k, v in of.items())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder with bench_*.json")
    parser.add_argument("after", type=Path, help="another")
    args = parser.parse_args()
    runs: list[dict[str, dict[str, Any]]] = [
        {name: r for p in sorted(folder.glob("bench_*.json")) for name, r in ratios(json.loads(p.read_text()), p.stem)}
        for folder in (args.before, args.after)
    ]
    before, after = runs
    if missing := sorted(before.keys() ^ after.keys()):
        parser.error(f"{len(missing)} ratios are in one run only, the first: {missing[0]}")
    if not before:
        parser.error(f"{args.before} has no bench_*.json with ratios")
    lines = [["ratio", "before", "after", "apart"]]
    within = noisy = 0
    for name, a in before.items():
        b = after[name]
        apart = abs(a["median"] / b["median"] - 1)
        within += apart <= 0.1
        noisy += common.is_noisy(a) or common.is_noisy(b)
        if all(r["noise"] is not None and apart > max(0.1, r["noise"]) for r in (a, b)):
            lines.append([name, common.ratio_cell(a), common.ratio_cell(b), f"{100 * apart:.0f} %"])
    print(
        f"{len(before)} ratios: {within} are within 10 %; {noisy} are in brackets in one run or both; "
        f"{len(lines) - 1} are further apart than 10 % and than their noise"
    )
    if len(lines) > 1:
        common.print_table(lines, left=1)


if __name__ == "__main__":
    main()
