"""The snippets of README and docs run as they stand."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[1]


def snippets(path: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets("README.md")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert (tmp_path / "apple.png").stat().st_size > 1000
    assert names["handle"].stats.skipped_count > 20
    assert "tolerance 0.1" in capsys.readouterr().out


def test_the_ops() -> None:
    (snippet,) = snippets("docs/using.md")
    names: dict[str, Any] = {"mx": mx, "w": mx.ones((4, 4))}
    exec(snippet, names)
    x, cached = mx.ones((2, 4)), mx.zeros((2, 4))
    assert mx.array_equal(names["step"](x, cached), mx.tanh(x @ names["w"]))
    assert mx.array_equal(names["step"](x * 0.01, cached), cached)


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md"])
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
