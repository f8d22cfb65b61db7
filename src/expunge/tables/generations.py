"""`Generations`: what a model wrote after each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Generations:
    """Outputs of `n` prompts with `k` samples each; `texts[i]` has the k outputs of prompt i."""

    keys: list[tuple[str, str]]
    """(row id, variant): `question`, `paraphrase/0` ..., or another name the asker chose."""
    prompts: list[str]
    """The prompt as it was asked, so that a matcher can exclude what it copied from there."""
    texts: list[list[str]]
    stopped: list[list[bool]]
    """Whether each output ended by itself rather than at the length limit."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """`max_new_tokens`, `temperature`, `seed`, `dtype`."""

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        table = pa.table(
            {
                "row": pa.array([key[0] for key in self.keys], pa.string()),
                "variant": pa.array([key[1] for key in self.keys], pa.string()),
                "prompt": pa.array(self.prompts, pa.string()),
                "texts": pa.array(self.texts, pa.list_(pa.string())),
                "stopped": pa.array(self.stopped, pa.list_(pa.bool_())),
            }
        )
        write_arrow(table, path, self.metadata)

    @staticmethod
    def load(path: Path) -> Generations:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        return Generations(
            list(zip(table["row"].to_pylist(), table["variant"].to_pylist())),
            table["prompt"].to_pylist(),
            table["texts"].to_pylist(),
            table["stopped"].to_pylist(),
            metadata,
        )
