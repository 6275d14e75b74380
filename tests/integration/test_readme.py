"""What the README shows, run as it stands there."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_first_hit_is_the_example(pool, monkeypatch, capsys):
    """The README's five lines are the example's, and hit."""
    example = ROOT / "examples/first_hit.py"
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown.group(1) == example.read_text()

    import kvpool

    original = kvpool.Client
    node = pool.socket_path(next(iter(pool.nodes)))
    monkeypatch.setattr(kvpool, "Client", lambda _: original(pool.address, node=node))
    runpy.run_path(str(example))
    assert "prefix=4, ok=[True, True, True, True]" in capsys.readouterr().out


def test_every_command_shown_exists():
    """Make targets and commands that the README names are there."""
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z0-9-]+)", text)) <= targets
    scripts = set(re.findall(r"^(kvpool[a-z-]*) =", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert set(re.findall(r"^(kvpool[a-z-]*) ", text, re.MULTILINE)) <= scripts
