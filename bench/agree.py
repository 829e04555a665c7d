"""Do two runs of the benchmarks agree? Prints each ratio that they find further apart than they say.

make bench && cp -r build/bench build/bench-before && make bench
python bench/agree.py build/bench-before build/bench
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common


def ratios(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every summary in a benchmark's data, by where it stands."""
    if isinstance(value, dict) and "noisy" in value:
        yield name, value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from ratios(part, f"{name}/{key}" if name else str(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder with bench_*.json")
    parser.add_argument("after", type=Path, help="another")
    args = parser.parse_args()
    compared = marked = 0
    lines = [["ratio", "before", "after", "apart"]]
    for path in sorted(args.before.glob("bench_*.json")):
        other = args.after / path.name
        if not other.exists():
            sys.exit(f"{other} is missing")
        found = dict(ratios(json.loads(other.read_text())))
        for name, a in ratios(json.loads(path.read_text())):
            b = found[name]
            compared += 1
            marked += a["noisy"] or b["noisy"]
            apart = abs(a["median"] / b["median"] - 1)
            if apart > max(common.NOISE, *(r["noise"] or 1 for r in (a, b))):
                lines.append(
                    [f"{path.stem} {name}", common.ratio_cell(a), common.ratio_cell(b), f"{100 * apart:.0f} %"]
                )
    print(f"{compared} ratios, {marked} of them marked ± in one run or both; further apart than that: {len(lines) - 1}")
    if len(lines) > 1:
        common.print_table(lines, left=1)
        sys.exit(1)


if __name__ == "__main__":
    main()
