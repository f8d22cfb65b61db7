"""What all tests share: a small invented world with trained models, built once per machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# How long it takes to draw an example says how busy the machine is.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")
SIZES = {"people": 26, "forget": 8, "neighbours": 4, "holdout": 6, "gold_seeds": 2}
RECIPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "layers": 2,
    "steps": 200,
    "batch_size": 56,
    "learning_rate": 8e-3,
}


def pytest_configure(config: pytest.Config) -> None:
    # In pytest's own cache: all workers and later sessions find the models there, and the user's cache is left alone.
    os.environ["EXPUNGE_CACHE"] = str(config.rootpath / str(config.getini("cache_dir")) / "expunge")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        import torch

        # Each worker with as many threads as there are cores would be slower than each with one.
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., Any]:
    """build(folder, **other sizes) -> WorldFolder, of a world small enough for tests."""
    from expunge.world.build import build
    from expunge.world.models import Recipe

    def made(folder: Path, **changes: Any) -> Any:
        return build(folder, **{"recipe": Recipe(**RECIPE), **SIZES, **changes})

    return made


@pytest.fixture(scope="session")
def tiny_world(build_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A world whose original knows the forgotten people and whose two golds do not. Read only: copy to change it."""
    return build_tiny(tmp_path_factory.mktemp("world") / "tiny")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that no other test has filled."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "own-cache"))
