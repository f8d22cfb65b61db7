"""Small classifiers of the pictures: a residual network or a vision transformer of transformers' own, trained anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ...pictures import Picture
    from ...subjects.image import ImageClassifier


@dataclass(frozen=True)
class Recipe:
    """Size and training."""

    kind: Literal["resnet", "vit"] = "resnet"
    side: int = 32
    widths: tuple[int, ...] = (16, 32, 64)
    """Of the residual network's stages, one block each; the transformer's width is the last."""
    patches: int = 8
    """Along a side, of the transformer."""
    epochs: float = 8.0
    batch_size: int = 64
    learning_rate: float = 3e-3


def untrained(classes: Sequence[str], recipe: Recipe, seed: int) -> ImageClassifier:
    """A classifier of the recipe's size with weights drawn by the seed."""
    import torch
    import transformers

    from ...subjects.image import ImageClassifier

    names = dict(enumerate(classes))
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    if recipe.kind == "resnet":
        config: Any = transformers.ResNetConfig(
            embedding_size=recipe.widths[0],
            hidden_sizes=list(recipe.widths),
            depths=[1] * len(recipe.widths),
            layer_type="basic",
            **labels,
        )
        build: Any = transformers.ResNetForImageClassification
    else:
        width = recipe.widths[-1]
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=2 * width,
            image_size=recipe.side,
            patch_size=recipe.side // recipe.patches,
            hidden_dropout_prob=0.0,
            **labels,
        )
        build = transformers.ViTForImageClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    processor = transformers.ViTImageProcessorPil(
        size={"height": recipe.side, "width": recipe.side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return ImageClassifier(model, classes, processor, f"{recipe.kind}, seed {seed}")


def trained(rows: Sequence[Picture], classes: Sequence[str], recipe: Recipe, seed: int) -> ImageClassifier:
    """A classifier that was taught these rows."""
    from ...methods.optimise.teach import teach

    subject = untrained(classes, recipe, seed)
    teach(
        subject,
        [subject.encode(row) for row in rows],
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        seed=seed,
    )
    return subject
