"""Image classifiers: any `AutoModelForImageClassification` folder or hub id, or a plain module made by a factory.

A picture is a prompt of one token, which only the picture's own tower can embed; its class is an answer of one token
from a vocabulary of classes. So the loop, objectives, scopes, deltas and tables that know rows of tokens know pictures.
What a subject must offer for that is in subjects/protocol.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import processes
from ..errors import RowError, SubjectError, no_model, suggest
from ..pictures import Picture
from ..registry import subject
from ..tables.generations import Generations
from ..tables.scores import COLUMNS, Key, Scores
from .anatomy import Block, structure
from .packed import Encoded, Pack, batches, pack
from .protocol import Progress, Taps

PICTURES = 256
"""Pictures in one pass without gradients."""
KEPT = 2**30
"""Bytes of prepared pixels that are kept: an audit asks about the same pictures again and again."""


@dataclass(frozen=True)
class EncodedPicture(Encoded):
    """`ids` are a hash of the pixels and the number of the class."""

    pixels: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    """(c, h, w) as the model takes them."""


@dataclass(frozen=True)
class Preparation:
    """Pixels for a plain module: resized, scaled to 0 ... 1, normalised."""

    size: tuple[int, int]
    """(height, width)"""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        from PIL import Image

        resized = Image.fromarray(images).resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return {"pixel_values": ((pixels - mean) / std)[None]}


class ImageClassifier:
    """An image classifier with what prepares its pixels.

    The weights are never changed by an operation, and `model` is in evaluation mode throughout: unlearning moves no
    running statistics of batch norms, which ascent on forget rows alone would shift for everything else.
    """

    modality = "image"
    sharded = False
    can_enter = False
    """Passes begin at the pixels."""

    def __init__(
        self,
        model: Any,
        classes: Sequence[str],
        processor: Any,
        name: str = "model",
        factory: Callable[[], nn.Module] | None = None,
    ) -> None:
        """
        Args:
            classes: names, in the order of the logits.
            processor: a transformers image processor, or a `Preparation`.
            factory: builds the model with new weights, where it has no configuration that does.
        """
        self.model = model.eval()
        self.classes = list(classes)
        self.processor = processor
        self.name = name
        self.factory = factory
        self.base: ImageClassifier | None = None
        """The subject that a delta was applied to, where this one was made so."""
        self._prepared: dict[str, tuple[int, Tensor]] = {}
        self._number = {name: i for i, name in enumerate(self.classes)}
        if len(self._number) != len(self.classes):
            raise SubjectError(f"model {name}: two classes have one name; names must be unique")

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None, dtype: str | None = None) -> ImageClassifier:
        """Load a Hugging Face image classification folder or hub id.

        Raises:
            SubjectError: no such model, weights that are missing, not finite or only pickled, no image processor.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        from transformers.utils import logging

        name, folder = str(path), Path(path)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise SubjectError(f"model folder {name} has no config.json; expected a Hugging Face model folder")
        if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
            raise SubjectError(f"model folder {name} does not exist")
        wanted = "auto" if dtype is None else getattr(torch, dtype, None)
        if wanted is None:
            raise SubjectError(f"dtype {dtype!r} is not a torch type; expected float32, bfloat16 or float16")
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            processor = AutoImageProcessor.from_pretrained(path)
            model, info = AutoModelForImageClassification.from_pretrained(
                path, dtype=wanted, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # transformers raises a dozen kinds here
            raise SubjectError(no_model(name, error)) from error
        finally:
            logging.set_verbosity(level)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise SubjectError(f"model {name}: {len(missing)} tensors are not in its files, first {missing[0]}")
        for tensor, values in model.named_parameters():
            if not torch.isfinite(values).all():
                raise SubjectError(f"model {name}: tensor {tensor} holds values that are not finite")
        labels = model.config.id2label
        classes = [str(labels[i]) for i in range(len(labels))]
        try:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise SubjectError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        return cls(model, classes, processor, name)

    @classmethod
    def bare(cls, path: str | Path, *, dtype: str | None = None) -> ImageClassifier:
        """The model of a folder or hub id without its weights (meta device), with its image processor.

        Raises:
            SubjectError: no such model.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

        try:
            processor = AutoImageProcessor.from_pretrained(path)
            config = AutoConfig.from_pretrained(path)
            with torch.device("meta"):
                model = AutoModelForImageClassification.from_config(config)
        except Exception as error:  # transformers raises a dozen kinds here
            raise SubjectError(f"model {path} cannot be read: {str(error).splitlines()[0]}") from error
        model = model.to(getattr(torch, dtype) if dtype else config.dtype or torch.float32)
        return cls(model, [str(config.id2label[i]) for i in range(len(config.id2label))], processor, str(path))

    def save(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face model folder (safetensors).

        Raises:
            SubjectError: the model is a plain module, which no such folder can hold.
        """
        from ..files import complete_folder

        if not hasattr(self.model, "save_pretrained"):
            raise SubjectError(f"{self.name} is a plain module; keep its delta, and build it with its factory")
        with complete_folder(Path(folder)) as partial:
            self.model.save_pretrained(partial)
            self.processor.save_pretrained(partial)

    def with_model(self, model: nn.Module, name: str | None = None) -> ImageClassifier:
        """The same subject around other weights."""
        made = ImageClassifier(model, self.classes, self.processor, name or self.name, self.factory)
        made._prepared = self._prepared
        if "_head_name" in self.__dict__:
            made.__dict__["_head_name"] = self._head_name
        return made

    def copy(self) -> ImageClassifier:
        """An independent deep copy."""
        return self.with_model(copy.deepcopy(self.model))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over classes, preparation of pixels and weights."""
        about = self.processor.to_dict() if hasattr(self.processor, "to_dict") else vars(self.processor)
        digest = hashlib.sha256(json.dumps([self.classes, about], sort_keys=True, default=str).encode())
        digest.update(weights_fingerprint(self.model).encode())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def vocabulary(self) -> int:
        """Classes."""
        return len(self.classes)

    def share(
        self, groups: Sequence[Sequence[int]], do: Callable[[Sequence[int]], Any], *, of: Any, progress: Progress | None
    ) -> list[Any]:
        """What `do` gives for each group of rows, groups shared out over the processes of a launch."""
        return processes.shared(groups, do, of=of, device=self.device, progress=progress)

    # --- pictures to tensors ---------------------------------------------------------------------------------

    def encode(self, row: Picture, *, answer: str | None = None, prompt: str | None = None) -> EncodedPicture:
        """Pixels and class of a picture.

        Raises:
            RowError: no such class, or no readable picture.
        """
        answer = row.answer if answer is None else answer
        number = self._number.get(answer)
        if number is None and self.classes[0] == "LABEL_0":  # transformers' names for classes without any
            number = self._number.get(f"LABEL_{answer}")
        if number is None:
            raise RowError(
                f"{row.source or f'row {row.id}'}: {self.name} has no class {answer!r}. {suggest(answer, self.classes)}"
            )
        name, pixels = self._prepared.get(row.prompt) or self._prepare(row)
        return EncodedPicture((name, number), 1, 0, answer, pixels)

    def _prepare(self, row: Picture) -> tuple[int, Tensor]:
        """(hash, pixels) of a picture as the model takes it, kept while there is room."""
        pixels = self.processor(images=row.pixels(), return_tensors="pt")["pixel_values"][0]
        made = int(hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:15], 16), pixels
        if (len(self._prepared) + 1) * pixels.nbytes <= KEPT:
            self._prepared[row.prompt] = made
        return made

    def prompt_text(self, row: Picture, prompt: str | None = None) -> str:
        """A name for what is asked: the hash of the picture."""
        return row.prompt

    def asked(self, row: Picture) -> EncodedPicture:
        """What `generate` takes for a picture."""
        return self.encode(row)

    # --- passes ----------------------------------------------------------------------------------------------

    @cached_property
    def _head_name(self) -> str:
        """The last linear layer, whose output the logits are: found in one pass over an example.

        Raises:
            SubjectError: the logits are something else.
        """
        found: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: found.append((name, output)))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == len(self.classes)
        ]
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                logits = self.logits(self.example.to(self.device, self.dtype))
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        for name, output in reversed(found):
            if output.shape == logits.shape and torch.equal(output, logits):
                return name
        raise SubjectError(
            f"{self.name}: no linear layer gives its logits {tuple(logits.shape)} for {len(self.classes)} classes"
        )

    @cached_property
    def example(self) -> Tensor:
        """(1, c, h, w) pixels of a black picture."""
        return self.processor(images=np.zeros((32, 32, 3), np.uint8), return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    def logits(self, pixels: Tensor) -> Tensor:
        """(n, K) of prepared pixels (n, c, h, w)."""
        output = self.model(pixels)
        return output if isinstance(output, Tensor) else output.logits

    @property
    def linear_head(self) -> nn.Linear:
        """The layer that makes logits of features."""
        return self.model.get_submodule(self._head_name)  # type: ignore[return-value]

    @property
    def embedding(self) -> None:
        """Pictures are not looked up."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (n, K) of features (n, d)."""
        return self.linear_head(hidden)  # type: ignore[no-any-return]

    def hidden_states(self, pack_: Pack) -> Tensor:
        """(answers, d) features of the picture that each answer of the pack is about; gradients flow where enabled."""
        return self.states(pack_, Taps())["final"]

    def can_enter_inside(self, layer: int) -> bool:
        """Never."""
        return False

    def states(self, pack_: Pack, taps: Taps, entry: Any = None) -> dict[str, Tensor]:
        """What one pass hands out: "final" (answers, d) features, "layer.2" (answers, c) what block 2 gives out, the
        mean over its places. Pictures that several rows are about run once.

        Raises:
            SubjectError: a tapped block does not exist, or routers are asked for.
        """
        if taps.routers or taps.chosen:
            raise SubjectError(f"{self.name} has no routed experts")
        rows: Any = [pack_.rows[row] for row, _ in pack_.owner]
        size = max(1, len(rows)) if torch.is_grad_enabled() else PICTURES
        parts = [self._states([row.pixels for row in rows[i : i + size]], taps) for i in range(0, len(rows), size)]
        return {name: torch.cat([part[name] for part in parts])[pack_.predict] for name in parts[0]}

    def _states(self, pixels: Sequence[Tensor], taps: Taps) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        blocks = structure(self.model).blocks if taps.layers else ()
        missing = [layer for layer in taps.layers if not 0 <= layer < len(blocks)]
        if missing:
            raise SubjectError(f"{self.name} has blocks 0-{len(blocks) - 1}, there is no block {missing[0]}")

        def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            found["final"] = arguments[0]

        def keep(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                values = output[0] if isinstance(output, tuple) else output
                # Channels stand first in maps (n, c, h, w), last in rows of patches (n, t, d).
                found[f"layer.{layer}"] = values.mean((2, 3)) if values.dim() == 4 else values.mean(1)

            return hook

        handles = [self.linear_head.register_forward_pre_hook(enter)]
        handles += [
            self.model.get_submodule(blocks[layer].name).register_forward_hook(keep(layer)) for layer in taps.layers
        ]
        try:
            self.logits(torch.stack(list(pixels)).to(self.device, self.dtype))
        finally:
            for handle in handles:
                handle.remove()
        return found

    @torch.no_grad()
    def score(self, items: Sequence[tuple[Key, EncodedPicture]], *, progress: Progress | None = None) -> Scores:
        """One pass over pictures: the log-probability of each one's class, whether it comes first, and mean and
        variance of the log-probabilities of all classes under the model's own distribution."""
        rows = [row for _, row in items]

        def read(group: Sequence[int]) -> dict[str, np.ndarray]:
            pack_ = pack([rows[i] for i in group], self.device)
            logprobs = self.head(self.hidden_states(pack_)).double().log_softmax(-1)
            mean = (logprobs.exp() * logprobs).sum(-1)
            columns = {
                "token": pack_.target.to(torch.int32),
                "logprob": logprobs.gather(1, pack_.target[:, None])[:, 0].float(),
                "hit": logprobs.argmax(-1) == pack_.target,
                "mean": mean.float(),
                "variance": (logprobs.exp() * (logprobs - mean[:, None]).square()).sum(-1).float(),
                "end": torch.zeros_like(pack_.target, dtype=torch.bool),
            }
            return {name: values.cpu().numpy() for name, values in columns.items()}

        groups = list(batches(rows, 2 * PICTURES))
        parts = self.share(groups, read, of=[row.ids for row in rows], progress=progress)
        order = [i for group in groups for i in group]
        columns = {name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0) for name in COLUMNS}
        about = {"dtype": str(self.dtype), "subject": self.name}
        table = Scores.of([items[i][0] for i in order], [1] * len(order), columns, [rows[i].text for i in order], about)
        return table.take(np.argsort(order).tolist() if order else [])

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[tuple[Key, EncodedPicture]],
        *,
        max_new_tokens: int = 1,
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Generations:
        """The name of the likeliest class of every picture; of equals the first.

        Raises:
            SubjectError: several samples are asked for, or a temperature: there is one answer.
        """
        if samples != 1 or temperature:
            raise SubjectError(f"{self.name} answers a picture in one way; {samples} samples at {temperature:g} asked")
        rows = [row for _, row in prompts]

        def read(group: Sequence[int]) -> list[int]:
            pack_ = pack([rows[i] for i in group], self.device)
            return self.head(self.hidden_states(pack_)).argmax(-1).tolist()  # type: ignore[no-any-return]

        groups = list(batches(rows, 2 * PICTURES))
        parts = self.share(groups, read, of=[row.ids for row in rows], progress=progress)
        said = {i: number for group, part in zip(groups, parts) for i, number in zip(group, part)}
        texts = [[self.classes[said[i]]] for i in range(len(rows))]
        about = {"dtype": str(self.dtype), "subject": self.name}
        return Generations([key for key, _ in prompts], [""] * len(rows), texts, [[True]] * len(rows), about)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return structure(self.model).blocks

    def settle(self) -> None:
        """Try out now what is otherwise tried when a pass first needs it."""
        _ = self._head_name


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all tensors, single numbers (counters of batch norms) included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@subject(modality=("image",))
def image(source: str, *, dtype: str = "", device: str = "") -> ImageClassifier:
    """Any image classifier that transformers loads, convolutions or transformers; plain modules in Python."""
    return ImageClassifier.load(source, dtype=dtype or None, device=device or None)
