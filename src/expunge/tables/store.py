"""Arrow files that appear only when complete, keyed by the content they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TableError

if TYPE_CHECKING:
    import pyarrow as pa


def content_key(*values: Any) -> str:
    """A hash of plain JSON values; equal content gives an equal key."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write_arrow(table: pa.Table, path: Path, metadata: dict[str, Any]) -> None:
    import pyarrow as pa

    table = table.replace_schema_metadata({"expunge": json.dumps(metadata, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_arrow(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path), "rb") as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise TableError(f"{path} is not a readable table: {error}") from None
    return table, json.loads((table.schema.metadata or {}).get(b"expunge", b"{}"))
