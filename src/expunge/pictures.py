"""Pictures: what an image classifier is asked, read from the folders and files people bring.

- a folder of class folders (`deer/17.png`), with its splits as folders above them where it has any; a `metadata.csv` or
  `metadata.jsonl` beside the files (`file_name`, and any other columns) names labels and more;
- an .npz file with `images` (n, h, w) or (n, h, w, 3) of bytes, `labels` (n,) and, where there are any, `names` (K,);
- a hub id, or a parquet file as the hub has them, whose rows have an `image` (or `img`) and a `label`.

Other column names are mapped with `fields`. Every error names file, row and field.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import RowError, suggest
from .rows import Source, matching, picked, records

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
COLUMNS = {"image": ("image", "img"), "label": ("label", "fine_label"), "entity": ("entity",), "id": ("id",)}
"""Our names, and the columns that are taken for them without a mapping."""


SHOWN = 128
"""Pixels of the longer side of a picture in a report."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture and its class, as a row: the class is what is answered.

    What methods, attacks, metrics and reports read of any row has the name it has in `rows.Row`.
    """

    id: str
    image: np.ndarray | Path
    """(h, w, 3) bytes, or the file that holds it."""
    answer: str
    """Name of the class."""
    entity: str = ""
    """Whom or what the picture is about: the unit over which intervals are drawn; itself by default."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Every other column: sub-class, style, person ..."""
    perturbed_answers: tuple[str, ...] = ()
    """Wrong classes."""
    source: str = ""
    """file:row, for error messages."""

    kind: ClassVar[str] = "picture"
    noun: ClassVar[str] = "pictures"
    closed: ClassVar[bool] = True
    messages: ClassVar[tuple[()]] = ()
    value: ClassVar[str] = ""
    aliases: ClassVar[tuple[()]] = ()
    relation: ClassVar[str] = ""
    task: ClassVar[str] = ""
    paraphrased_answer: ClassVar[str] = ""

    @cached_property
    def prompt(self) -> str:
        """sha256 of shape and pixels: what is asked, under a name that no other picture has."""
        pixels = self.pixels()
        return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Everything that the row is, as plain JSON values; where it was read does not count."""
        return {
            "id": self.id,
            "picture": self.prompt,
            "answer": self.answer,
            "entity": self.entity,
            "tags": dict(self.tags),
            "perturbed_answers": list(self.perturbed_answers),
        }

    def shown(self) -> dict[str, str]:
        """What a report shows of what is asked: a small copy of the picture, as an address that holds its data."""
        from PIL import Image

        image = Image.fromarray(self.pixels())
        image.thumbnail((SHOWN, SHOWN))
        data = io.BytesIO()
        image.save(data, "PNG")
        return {"question": "", "picture": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}

    def pixels(self) -> np.ndarray:
        """(h, w, 3) bytes.

        Raises:
            RowError: the file holds no readable picture.
        """
        if isinstance(self.image, np.ndarray):
            return self.image
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.image) as opened:
                return np.asarray(opened.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise RowError(f"{self.image}: not a readable picture: {error}") from None


def read_pictures(source: Source, name: str) -> list[Picture]:
    """All pictures of a set, in order; nothing is dropped.

    Args:
        name: of the set; pictures without an id are called by set and file, or `name/1`, `name/2` ...

    Raises:
        RowError: the source cannot be read, or a row is not what it must be.
    """
    unknown = [ours for ours in source.fields if ours not in COLUMNS]
    if unknown:
        raise RowError(
            f"{source.path}: fields: there is no field {unknown[0]!r} to map. {suggest(unknown[0], COLUMNS)}"
        )
    if source.entity_every is not None:
        raise RowError(f"{source.path}: entity_every is for questions; pictures name their entity in a column")
    path = Path(source.path)
    if path.is_dir():
        found = list(_folder(path, source, name))
    elif path.suffix == ".npz":
        found = list(_arrays(path, source, name))
    else:
        found = [_record(where, row, source, f"{name}/{n}") for n, (where, row) in enumerate(_hub(source), start=1)]
    if not found:
        raise RowError(f"{source.path}: 0 pictures, expected at least 1 ({', '.join(SUFFIXES)})")
    found = picked(found, source, known_as)
    first: dict[str, str] = {}
    for picture in found:
        if picture.id in first:
            raise RowError(f"{picture.source}: id {picture.id!r} was used in {first[picture.id]} already")
        first[picture.id] = picture.source
    return found


def known_as(picture: Picture, key: str) -> str | None:
    """What is known of a picture under a name: `label`, `id`, `entity`, or one of its tags."""
    ours = {"label": picture.answer, "id": picture.id, "entity": picture.entity}
    return ours.get(key) or picture.tags.get(key)


def chosen(pictures: Sequence[Picture], where: Mapping[str, str | list[str]]) -> tuple[list[Picture], list[Picture]]:
    """(those that match, the others): `{"label": "3"}` a class, `{"style": "striped"}` a sub-class or person.

    Raises:
        RowError: nothing matches.
    """
    hits = matching(pictures, where, known_as, "pictures")
    return [p for p, hit in zip(pictures, hits) if hit], [p for p, hit in zip(pictures, hits) if not hit]


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder(path: Path, source: Source, set_: str) -> Iterator[Picture]:
    if (path / source.split).is_dir():
        path = path / source.split
    told = _metadata(path)
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    for file in files:
        name = file.relative_to(path).as_posix()
        record = told.pop(name, {})
        columns = _columns(str(file), record, source.fields)
        label = columns.pop("label", None) or (file.parent.name if file.parent != path else None)
        if not label:
            raise RowError(
                f"{file}: no class folder above it and no label in {path}/metadata.csv; expected one of them"
            )
        id_ = columns.pop("id", f"{set_}/{name}")
        yield Picture(id_, file, label, columns.pop("entity", id_), columns, source=f"{file}")
    if told:
        raise RowError(f"{path}: metadata names the file {next(iter(told))!r}, which is not there")


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in (path / "metadata.csv", path / "metadata.jsonl"):
        if not file.is_file():
            continue
        for where, record in records(Source(str(file))):
            if "file_name" not in record:
                raise RowError(f"{where}: field 'file_name' is missing; found {', '.join(record)}")
            found[str(record.pop("file_name"))] = record
    return found


def write_folder(pictures: Sequence[Picture], folder: Path) -> None:
    """Write pictures as a folder of class folders, with a metadata.csv of what else is known of them."""
    from PIL import Image

    keys = sorted({key for picture in pictures for key in picture.tags})
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "id", "entity", *keys])
        for picture in pictures:
            name = f"{picture.answer}/{picture.id.replace('/', '-')}.png"
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(picture.pixels()).save(folder / name)
            writer.writerow([name, picture.id, picture.entity, *(picture.tags.get(key, "") for key in keys)])


# --- arrays and tables ------------------------------------------------------------------------------------------------


def _arrays(path: Path, source: Source, name: str) -> Iterator[Picture]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise RowError(f"{path} cannot be read as arrays: {error}") from None
    for wanted in ("images", "labels"):
        if wanted not in arrays:
            raise RowError(f"{path}: has no array {wanted!r}; found {', '.join(arrays) or 'none'}")
    images, labels, names = arrays["images"], arrays["labels"], arrays.get("names")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise RowError(
            f"{path}: images are {images.dtype} {images.shape} and labels {labels.shape}; expected uint8 (n, h, w) or "
            "(n, h, w, 3) and (n,)"
        )
    for number, (image, label) in enumerate(zip(images, labels), start=1):
        if names is not None and not 0 <= int(label) < len(names):
            raise RowError(f"{path}: row {number}: label {label} has no name; there are {len(names)}")
        answer = str(label) if names is None else str(names[int(label)])
        row = f"{name}/{number}"
        yield Picture(row, _colour(image, f"{path}: row {number}"), answer, row, source=f"{path}: row {number}")


def _colour(image: np.ndarray, where: str) -> np.ndarray:
    if image.ndim == 2 or image.shape[-1] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.shape[-1] != 3:
        raise RowError(f"{where}: the picture has shape {image.shape}, expected (h, w) or (h, w, 3)")
    return image


def _hub(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with class numbers as names, where the data set has names."""
    names: dict[str, Any] = {}
    for number, (where, record) in enumerate(records(source)):
        if number == 0:
            names = _class_names(source)
        yield where, {key: names[key][value] if key in names else value for key, value in record.items()}


def _class_names(source: Source) -> dict[str, Any]:
    path = Path(source.path)
    if path.exists():
        import pyarrow.parquet as pq

        about = (pq.read_schema(path).metadata or {}) if path.suffix == ".parquet" else {}
        told = json.loads(about.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {
            key: feature["names"] for key, feature in told.items() if isinstance(feature, dict) and "names" in feature
        }
    import datasets

    features = datasets.load_dataset_builder(source.path, source.config).info.features or {}
    return {key: feature.names for key, feature in features.items() if hasattr(feature, "names")}


def _record(where: str, record: dict[str, Any], source: Source, name: str) -> Picture:
    column = source.fields.get("image") or next((c for c in COLUMNS["image"] if c in record), None)
    if column is None or column not in record:
        raise RowError(f"{where}: no picture in the fields {', '.join(record)}; map it: fields: {{image: COLUMN}}")
    image = record.pop(column)
    columns = _columns(where, record, source.fields)
    if "label" not in columns:
        raise RowError(f"{where}: no label in the fields {', '.join(record)}; map it: fields: {{label: COLUMN}}")
    if isinstance(image, dict) and image.get("bytes"):  # as files of the hub hold them
        image = _opened(image["bytes"], where)
    if hasattr(image, "convert"):
        pixels: np.ndarray | Path = np.asarray(image.convert("RGB"))
    elif isinstance(image, str):
        pixels = Path(image)
    else:
        raise RowError(f"{where}: field {column!r} holds {type(image).__name__}, expected a picture or a file's name")
    name = columns.pop("id", name)
    return Picture(name, pixels, columns.pop("label"), columns.pop("entity", name), columns, source=where)


def _opened(data: bytes, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError) as error:
        raise RowError(f"{where}: not a readable picture: {error}") from None


def _columns(where: str, record: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, str]:
    """Plain columns as text, ours by our names."""
    found = {str(k): str(v) for k, v in record.items() if isinstance(v, str | int | float) and str(v)}
    for ours, names in COLUMNS.items():
        column = fields.get(ours) or next((c for c in names if c in found), None)
        if ours in fields and ours != "image" and column not in found:
            raise RowError(f"{where}: fields maps {ours} to {column!r}, which the row does not have")
        if column in found:
            found[ours] = found.pop(column)
    return found
