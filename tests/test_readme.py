"""The README says what the committed results say, and its example runs."""

import re
from pathlib import Path

from routing_jax.evals.readme import stale_blocks
from routing_jax.evals.report import readme_blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_table_is_what_the_results_give():
    stale = stale_blocks(README, readme_blocks(ROOT / "evals" / "results"))
    assert stale == [], "run `routing-jax report`"


def test_every_picture_and_link_is_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert missing == []


def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("[") >= 3  # usage and cost a layer, and eight tokens
