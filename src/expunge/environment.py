"""Where something was computed: versions, machine, date."""

from __future__ import annotations

import platform
from typing import Any

from . import processes


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("expunge", "torch", "transformers")}


def environment(device: str = "cpu", dtype: str = "torch.float32") -> dict[str, Any]:
    """What a report says of the place where its numbers come from."""
    from datetime import UTC, datetime

    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "dtype": dtype.removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **({"processes": processes.count(), "fsdp": processes.sharding()} if processes.count() > 1 else {}),
    }
