"""Trials: one function over many settings, each result kept as soon as it is there.

A trial is a function at the top of a module that takes plain JSON values and returns plain JSON values. Its result is a
file under the hash of what it was asked, so that a killed command goes on where it stopped. Trials share no state: they
run in as many processes as there are cores, one thread each, which small models use better than one process with many.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from . import registry
from .errors import ParameterError
from .files import write_text
from .tables.store import content_key

Progress = Callable[[int, int], None]
Result = dict[str, Any]


def run_trials(
    function: Callable[..., Result],
    grid: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    version: int = 1,
    workers: int | None = None,
    engine: str = "processes",
    progress: Progress | None = None,
) -> list[Result]:
    """`function(**settings)` for all settings of the grid, in its order.

    Args:
        folder: one JSON file a finished trial; what is there is not run again.
        version: raised when the same settings would give another result.
        workers: processes; as many as cores by default, 1 runs in this process.
        engine: `processes`, or `ray` for a cluster that `ray.init` finds.

    Raises:
        ParameterError: an unknown engine, or ray is not installed.
        Whatever a trial raises; those that were finished are kept.
    """
    name = _name(function)
    paths = _paths(function, grid, folder, version)
    open_ = [i for i, path in enumerate(paths) if not path.is_file()]
    # Equal settings are one trial.
    open_ = list({paths[i]: i for i in reversed(open_)}.values())[::-1]
    done = len(grid) - len(open_)

    def keep(i: int, answer: tuple[Result, float]) -> None:
        nonlocal done
        result, seconds = answer
        record = {"trial": name, "settings": dict(grid[i]), "seconds": round(seconds, 2), "result": result}
        write_text(paths[i], json.dumps(record, ensure_ascii=False))
        done += 1
        if progress:
            progress(done, len(grid))

    if progress:
        progress(done, len(grid))
    workers = min(workers or os.cpu_count() or 1, max(1, len(open_)))
    if engine == "ray":
        _on_ray(function, grid, open_, keep)
    elif engine != "processes":
        raise ParameterError(f"engine {engine!r} is not known; expected processes or ray")
    elif workers == 1:
        for i in open_:
            keep(i, _timed(function, dict(grid[i])))
    else:
        _in_processes(function, grid, open_, workers, keep)
    return [json.loads(path.read_text(encoding="utf-8"))["result"] for path in paths]


def spent(
    function: Callable[..., Result], grid: Sequence[Mapping[str, Any]], folder: Path, *, version: int = 1
) -> float:
    """Seconds that these finished trials took, each counted once, whenever it ran."""
    paths = dict.fromkeys(_paths(function, grid, folder, version))
    return sum(float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) for path in paths)


def _name(function: Callable[..., Result]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _paths(
    function: Callable[..., Result], grid: Sequence[Mapping[str, Any]], folder: Path, version: int
) -> list[Path]:
    return [folder / f"{content_key(_name(function), version, dict(settings))}.json" for settings in grid]


def _timed(function: Callable[..., Result], settings: dict[str, Any]) -> tuple[Result, float]:
    # CPU time: what a trial costs, whatever else the machine does.
    began = time.process_time()
    result = function(**settings)
    return result, time.process_time() - began


def _alone(plugins: Sequence[Path]) -> None:
    import torch

    torch.set_num_threads(1)
    for plugin in plugins:
        registry.load_plugin(plugin)


def _elsewhere(
    plugins: Sequence[Path], function: Callable[..., Result], settings: dict[str, Any]
) -> tuple[Result, float]:
    """A trial in a process that may have run others before."""
    _alone(plugins)
    return _timed(function, settings)


def _in_processes(
    function: Callable[..., Result],
    grid: Sequence[Mapping[str, Any]],
    open_: Sequence[int],
    workers: int,
    keep: Callable[[int, tuple[Result, float]], None],
) -> None:
    # Spawned, not forked: a forked child inherits locks of torch's thread pool.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_alone, initargs=(registry.plugins,))
    try:
        running = {pool.submit(_timed, function, dict(grid[i])): i for i in open_}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                keep(running.pop(future), future.result())
    finally:
        # Ctrl-C and a failed trial stop the others: their results would be thrown away or waited for in vain.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(
    function: Callable[..., Result],
    grid: Sequence[Mapping[str, Any]],
    open_: Sequence[int],
    keep: Callable[[int, tuple[Result, float]], None],
) -> None:
    try:
        import ray
    except ImportError:
        raise ParameterError("engine ray needs the package ray: pip install 'expunge[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        remote = ray.remote(num_cpus=1)(_elsewhere)
        running = {remote.remote(registry.plugins, function, dict(grid[i])): i for i in open_}
        while running:
            finished, _ = ray.wait(list(running))
            for future in finished:
                keep(running.pop(future), ray.get(future))
    finally:
        if started:
            ray.shutdown()
