"""The worked example of CONTRIBUTING.md is a method that works."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny

from expunge import registry
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import unlearn
from expunge.rows import Row
from expunge.subjects.language import LanguageModel

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Path]:
    """The example as a file beside the package."""
    file = tmp_path / "floor_ascent.py"
    file.write_text(re.search(r"runs this block -->\n```python\n(.*?)```", GUIDE, re.DOTALL).group(1))
    yield file
    registry._parts["methods"].pop("floor_ascent", None)


def test_it_is_as_short_as_promised_and_passes_our_own_lint(example: Path) -> None:
    promised = int(re.search(r"## Add a method in (\d+) lines", GUIDE).group(1))
    code = [line for line in example.read_text().splitlines() if line.strip()]
    assert len(code) <= promised
    for command in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), str(example)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_it_forgets(example: Path) -> None:
    registry.load_plugin(example)
    part = registry.get("methods", "floor_ascent")
    assert part.resolve({"floor": "0.01"}) == {"floor": 0.01, "retain": "nll", "retain_weight": 1.0}
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model, tokenizer)
    data = {
        side: [Row(id=f"{side}{i}", prompt=f"where was {side} {i} born?", answer=f"Tivin {i}") for i in range(8)]
        for side in ("forget", "retain")
    }
    training = Training(steps=20, batch_size=8, learning_rate=1e-2, guard=None)
    outcome = unlearn(subject, part, {"floor": 0.0}, scope="role:mlp_out", data=data, training=training)
    changed = outcome.delta.apply(subject)
    moved = {
        side: float(changed.score(items).logprob.mean() - subject.score(items).logprob.mean())
        for side, rows in data.items()
        for items in [[((row.id, "answer"), subject.encode(row)) for row in rows]]
    }
    assert moved["forget"] < -0.2 < 0.2 < moved["retain"]


def test_a_floor_above_every_probability_changes_nothing_on_the_forget_side(example: Path) -> None:
    registry.load_plugin(example)
    part = registry.get("methods", "floor_ascent")

    class Forget:
        token_logprob = torch.tensor([-0.1, -5.0], requires_grad=True)

    class Step:
        forget = Forget()

        def retain_term(self, _: str) -> float:
            return 0.0

    part.function(Step(), floor=0.5).backward()
    # Only the likely token (0.90) is pushed: a mean over two tokens, one of them with weight 0.
    assert Forget.token_logprob.grad.tolist() == [0.5, 0.0]


def test_the_command_line_finds_it_in_its_file(example: Path) -> None:
    command = [sys.executable, "-m", "expunge", "card", "floor_ascent", "--plugin", str(example)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not studied" in done.stdout


def test_the_guide_names_targets_and_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in ("CONTRIBUTING.md", "README.md", ".ci/run"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"make ([a-z-]+)", text):
            if target != "nothing":
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document}: make {target}"
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(link).exists(), f"{document} links to {link}"
