"""Several processes of one launch (`accelerate launch`, `torchrun`): who is first, what all agree on, work shared out.

Every process carries out the same run from the same seeds. What touches the outside world (files, ledger, terminal) the
first one does alone; passes over rows are shared out (`shared`), and training shares out each step (methods/optimise).
In one process, and wherever nothing was launched, everything here is a plain call.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, NoReturn, TypeVar

from .errors import LaunchError

W = TypeVar("W", bound=Sized)
R = TypeVar("R")

HOURS = 2
"""So long processes wait for one another: the first one writes deltas and reports while the others wait."""
FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "FSDP_OFFLOAD_PARAMS": "FSDP with parameters offloaded to the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "FSDP with activation checkpointing (training.micro_tokens bounds activations)",
}
"""What `accelerate launch` can be asked for and nothing here would heed."""


def launched() -> tuple[int, int]:
    """(rank, processes) as the launcher says; (0, 1) without one."""
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Join the other processes of the launch, if there are any and this was not done before.

    Raises:
        LaunchError: the launcher was asked for what would not be heeded; there are more processes than devices.
    """
    if launched()[1] == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        return
    for name, meaning in FOREIGN.items():
        if _true(name):
            raise LaunchError(
                f"launched with {meaning}, which expunge does not use; launch with --multi_gpu or --use_fsdp"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise LaunchError(
            f"launched with --mixed_precision {precision}, but the type of numbers is the request's: write dtype: "
            "bfloat16 there and launch with --mixed_precision no"
        )
    gpu = torch.cuda.is_available() and not _true("ACCELERATE_USE_CPU")
    if gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise LaunchError(
                f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; launch one process for each"
            )
        torch.cuda.set_device(local)
    from datetime import timedelta

    # Objects go through gloo, on the CPU, also beside NCCL.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=HOURS))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def end() -> None:
    """Wait for all processes of the launch and leave them."""
    if count() > 1:
        import torch

        once(lambda: None)
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process, with the others of its launch if it has any.

    Taking the interpreter apart under threads that still serve the other processes may abort, after all is written.
    """
    if launched()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _end_with(parent: int) -> None:
    """A killed launcher leaves its processes behind; they would hold the run's folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _joined() -> bool:
    # Whoever has not imported torch has joined nobody.
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def count() -> int:
    """Processes that carry out this run."""
    return sys.modules["torch"].distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """This process's number, 0 for the first."""
    return sys.modules["torch"].distributed.get_rank() if _joined() else 0


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def sharding() -> bool:
    """Whether the launch asks for weights in training to lie in parts over the processes (FSDP)."""
    return count() > 1 and _true("ACCELERATE_USE_FSDP")


def once(do: Callable[[], R]) -> R:
    """What `do` gives in the first process, in every process; its error too. All processes must come here."""
    if count() == 1:
        return do()
    import torch

    answer: list[Any] = [None, None]
    error: Exception | None = None
    if first():
        try:
            answer[0] = do()
        except Exception as raised:
            error, answer[1] = raised, _portable(raised)
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise error or answer[1]
    return answer[0]  # type: ignore[no-any-return]


def shared(
    work: Sequence[W],
    do: Callable[[W], R],
    *,
    of: Any = None,
    device: Any = None,
    progress: Callable[[int, int], None] | None = None,
    through: Callable[[Callable[[W], R], Sequence[W]], Iterable[R]] = map,
) -> list[R]:
    """`[do(item) for item in work]`, each process doing every n-th item and getting all results.

    An item is done by one process exactly as it would be without the others, so results do not depend on how many there
    are. An error in one process is raised in all.

    Args:
        work: the same in every process; items are sized, progress counts their elements.
        of: what the work is about, as anything whose `repr` says so: processes compare it.
        device: where results' tensors are wanted; None leaves them on the CPU where they came from another process.
        through: as `map`, which does one item after another.

    Raises:
        RuntimeError: processes came with different work.
    """
    processes, total = count(), sum(len(item) for item in work)
    mine: list[R] = []
    error: Exception | None = None
    done = 0
    try:
        own = work[rank() :: processes]
        for item, found in zip(own, through(do, own)):
            mine.append(found)
            done += processes * len(item)
            if progress:
                progress(min(done, total), total)
    except Exception as raised:
        if processes == 1:
            raise
        error = raised
    if processes == 1:
        return mine
    import torch
    from accelerate.utils import send_to_device

    key = hashlib.sha256(repr(of).encode()).hexdigest()
    parts: list[Any] = [None] * processes
    torch.distributed.all_gather_object(parts, (key, error and _portable(error), send_to_device(mine, "cpu")))
    for number, (other, failed, _) in enumerate(parts):
        if failed is not None:
            raise error if number == rank() and error is not None else failed
        if other != key:
            raise RuntimeError(f"process {number} came to another pass than process {rank()}")
    every = [parts[i % processes][2][i // processes] for i in range(len(work))]
    return every if device is None else send_to_device(every, device)  # type: ignore[no-any-return]


def same(what: str, value: Any) -> None:
    """Make sure that all processes have the same value.

    Raises:
        LaunchError: one has another.
    """
    if count() == 1:
        return
    import torch

    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    odd = next((i for i, other in enumerate(values) if other != values[0]), None)
    if odd is not None:
        raise LaunchError(
            f"process {odd} does not find the same {what} as process 0; all processes need the same files"
        )


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, in a form that reaches other processes."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever an exception's class does in its constructor
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
