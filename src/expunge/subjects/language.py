"""Causal language models: any `AutoModelForCausalLM` folder or hub id, dense or mixture of experts."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import processes
from ..errors import RowError, SubjectError, no_model
from ..registry import subject
from ..rows import Row
from ..tables.generations import Generations
from ..tables.gradients import Gradients
from ..tables.patched import Patched
from ..tables.paths import Continuations
from ..tables.routes import Routes
from ..tables.scores import COLUMNS, Key, Scores
from ..tables.store import content_key
from .entering import Entry, Start, entering, enters
from .fused import touched
from .packed import TOKEN_BUDGET, Encoded, Pack, batches, in_order, pack, packed_attention
from .plain import product
from .plain_pass import Plan, plain_pass, plan_of
from .protocol import Progress, Taps
from .side_by_side import at_once, side_by_side
from .sparing import mlp_of, out_of, sparing
from .token_statistics import token_statistics

if TYPE_CHECKING:
    from .decoding import Started


# Probabilities and Adam moments below 1e-38 are computed a hundred times slower by CPUs than zeros, and damaged models
# are full of them. The flag must be set before the first parallel operation, so that all worker threads inherit it.
torch.set_flush_denormal(True)

TOGETHER = 64
"""Outputs that are worth a thread of their own."""


@dataclass(frozen=True)
class Template:
    """How question and answer become text when the tokenizer brings no chat template."""

    prompt: str = "Question: {question}\nAnswer:"
    separator: str = " "


class BlockParts(NamedTuple):
    """One decoder block, by the names of its modules."""

    name: str
    router: str | None
    """Its router's matrix (a parameter); None in a dense block."""
    experts: str | None
    """The module that is called with the experts chosen; None in a dense block and where they are called otherwise."""
    mlp: str | None
    """The module that holds a dense block's MLP and nothing else."""
    out: str | None
    """The one that it gives out through."""


class _Stop(Exception):
    """Ends a pass after the highest block that anybody looks at."""


class _States:
    """A decoder's output with nothing but its last hidden states; whatever else a head asks for is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class _PassThrough(nn.Module):
    """Stands in for the decoder, so that a model's own code turns hidden states into logits (caps, scales and all)."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _States:
        return _States(inputs_embeds)


class LanguageModel:
    """A causal language model with its tokenizer and the operations that methods, metrics and attacks use.

    The weights are never changed by an operation. `model` is in evaluation mode throughout: objectives compare with
    stored references, so dropout stays off while gradients flow.
    """

    modality = "language"

    def __init__(self, model: Any, tokenizer: Any, name: str = "model", template: Template | None = None) -> None:
        self.model = model.eval()
        """The transformers model, an `nn.Module`."""
        self.tokenizer = tokenizer
        self.name = name
        self.template = template or Template()
        self.base: LanguageModel | None = None
        """The subject that a delta was applied to, where this one was made so."""
        self.sharded = False
        """Weights lie in parts over the processes of a launch (FSDP): every process must run every pass."""
        self._mode: str | None = None
        self._can_enter: bool | None = None
        self._can_enter_inside: bool | None = None
        self._can_spare: bool | None = None
        self._plain: Plan | Literal[False] | None = None
        self.cuts: dict[int, str] = {}
        """What `contexts.can_cut` found, by length: beginnings are shared, stand apart, or cannot be cut ("")."""
        self._parts: list[BlockParts] | None = None

    # --- loading, saving, identity ---------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        template: Template | None = None,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
    ) -> LanguageModel:
        """Load a Hugging Face model folder or hub id.

        Args:
            dtype: "float32", "bfloat16" ...; None keeps the stored one.

        Raises:
            SubjectError: no such model, weights that are missing, not finite or only pickled, no tokenizer.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        name = str(path)
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise SubjectError(f"model {name} is a file; expected a folder with config.json and *.safetensors")
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise SubjectError(f"model folder {name} has no config.json; expected a Hugging Face model folder")
            if not list(folder.glob("*.safetensors")):
                pickled = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt")]), None)
                found = f"only {pickled.name}, which expunge never unpickles" if pickled else "none"
                raise SubjectError(f"model folder {name} has no *.safetensors weights ({found})")
        elif folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise SubjectError(f"model folder {name} does not exist")
        options = {"trust_remote_code": trust_remote_code}
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            wanted = "auto" if dtype is None else getattr(torch, dtype, None)
            if wanted is None:
                raise SubjectError(f"dtype {dtype!r} is not a torch type; expected float32, bfloat16 or float16")
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=wanted, use_safetensors=True, output_loading_info=True, **options
            )
        except SubjectError:
            raise
        except Exception as error:  # transformers raises a dozen kinds here
            raise SubjectError(no_model(name, error)) from error
        finally:
            logging.set_verbosity(level)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise SubjectError(f"model {name}: {len(missing)} tensors are not in its files, first {missing[0]}")
        for tensor_name, tensor in model.named_parameters():
            if not torch.isfinite(tensor).all():
                raise SubjectError(f"model {name}: tensor {tensor_name} holds values that are not finite")
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise SubjectError(f"model {name}: tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise SubjectError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        return cls(model, tokenizer, name, template)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face model folder (safetensors)."""
        from ..files import complete_folder

        with complete_folder(Path(folder)) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)

    def with_model(self, model: nn.Module, name: str | None = None) -> LanguageModel:
        """The same subject around other weights."""
        made = LanguageModel(model, self.tokenizer, name or self.name, self.template)
        made._mode, made._can_enter, made._parts = self._mode, self._can_enter, self._parts
        made._can_enter_inside, made._can_spare = self._can_enter_inside, self._can_spare
        made._plain, made.cuts = self._plain, self.cuts
        return made

    def copy(self) -> LanguageModel:
        """An independent deep copy."""
        return self.with_model(copy.deepcopy(self.model))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over configuration, template, vocabulary and weights."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _VOLATILE}
        digest = hashlib.sha256(json.dumps([self.template.prompt, self.template.separator]).encode())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        digest.update(str(getattr(self.tokenizer, "chat_template", None)).encode())
        digest.update(weights_fingerprint(self.model).encode())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @cached_property
    def context_length(self) -> int:
        """Tokens the model can attend to."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20)

    def share(
        self, groups: Sequence[Sequence[int]], do: Callable[[Sequence[int]], Any], *, of: Any, progress: Progress | None
    ) -> list[Any]:
        """What `do` gives for each group of rows, groups shared out over the processes of a launch.

        Args:
            of: the rows, for processes to compare.
        """
        if self.sharded:
            return [do(group) for group in groups]
        return processes.shared(groups, do, of=of, device=self.device, progress=progress)

    # --- text to tokens --------------------------------------------------------------------------------------

    def prompt_text(self, row: Row, prompt: str | None = None) -> str:
        """The text fed before the answer, with the template and the generation prompt.

        Spaces at its end are left to the answer, whose first token they belong to.
        """
        return self._asked(row, row.prompt if prompt is None else prompt).rstrip(" ")

    def _asked(self, row: Row, question: str) -> str:
        chats = self.chats(row)
        if chats:
            turns = self._messages(row, question)
            asked = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        elif row.kind in ("completion", "text", "instruction"):
            asked = row.preface + question
        else:
            asked = row.preface + self.template.prompt.replace("{question}", question)
        if not row.opening or not asked or asked[-1].isspace():
            return asked + row.opening
        return asked + (" " if chats else "\n") + row.opening

    def chats(self, row: Row) -> bool:
        """Whether the row goes through the model's chat template."""
        return row.kind not in ("completion", "text") and bool(getattr(self.tokenizer, "chat_template", None))

    @staticmethod
    def _messages(row: Row, question: str) -> list[dict[str, str]]:
        turns = [{"role": role, "content": content} for role, content in row.messages] or [{"role": "user"}]
        return [*turns[:-1], {**turns[-1], "content": row.preface + question}]

    def _frame(self, row: Row, question: str, answer: str) -> tuple[str, str]:
        """What stands between prompt and answer, and what closes the answer."""
        asked = self._asked(row, question)
        spaces = asked[len(asked.rstrip(" ")) :]
        if row.kind == "text":
            return spaces, ""
        end = self.tokenizer.eos_token or ""
        if self.chats(row):
            reply = f"{row.opening} {answer}" if row.opening else answer
            turns = [*self._messages(row, question), {"role": "assistant", "content": reply}]
            whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
            separator, found, closing = whole[len(asked) :].partition(answer)
            if whole.startswith(asked) and found and not separator.strip():
                return spaces + separator, closing.rstrip("\n")
            return spaces, end
        return spaces or ("" if asked[-1:].isspace() or answer[:1].isspace() else self.template.separator), end

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans; special tokens are added unless the text brings them."""
        bos = self.tokenizer.bos_token
        brings = bool(bos) and text.startswith(bos)
        encoded = self.tokenizer(text, add_special_tokens=not brings, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def encode(self, row: Row, *, answer: str | None = None, prompt: str | None = None) -> Encoded:
        """Tokens of prompt and answer; which of them are scored follows from character offsets, never from ids.

        Raises:
            RowError: nothing is scored, the answer does not fit the context, or a token spans the boundary.
        """
        answer = row.answer if answer is None else answer
        where = row.source or f"row {row.id}"
        if not answer.strip():
            raise RowError(f"{where}: the answer {answer!r} has no token that could be scored")
        question = row.prompt if prompt is None else prompt
        before = self.prompt_text(row, prompt)
        separator, closing_text = self._frame(row, question, answer)
        body = before + separator + answer
        ids, offsets = self._tokenize(body + closing_text)
        # A token that starts in the separator belongs to the answer: " Paris" is one token.
        start = next((i for i, (_, stop) in enumerate(offsets) if stop > len(before)), len(ids))
        closing = sum(1 for first, stop in offsets if first >= len(body) and stop > first)
        if before and start < len(ids) and offsets[start][0] < len(before) and offsets[start][1] > len(before):
            token = body[slice(*offsets[start])]
            raise RowError(
                f"{where}: tokenising prompt and answer together moves the boundary (token {token!r} spans it); "
                "add a separator to the template"
            )
        if not before:
            start = max(start, 1)
        if len(ids) > self.context_length:
            raise RowError(
                f"{where}: prompt and answer have {len(ids)} tokens, {len(ids) - start} of them in the answer; "
                f"the model's context holds {self.context_length}. Shorten the row or split it."
            )
        if len(ids) - closing <= start:
            raise RowError(f"{where}: the answer {answer!r} is one token and starts the text; nothing predicts it")
        if start == 0:
            raise RowError(f"{where}: the answer starts at position 0, there is nothing to predict it from")
        return Encoded(tuple(ids), start, closing, answer)

    def spans(self, row: Row) -> tuple[str, list[tuple[int, int]]]:
        """The row as the text that is encoded, and where in it each token stands."""
        separator, closing = self._frame(row, row.prompt, row.answer)
        text = self.prompt_text(row) + separator + row.answer + closing
        return text, self._tokenize(text)[1]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        generation = getattr(self.model, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        found = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
        if self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        if getattr(self.tokenizer, "chat_template", None):
            example = self.encode(Row(id="stop", prompt="a", answer="b"))
            found.update(example.ids[len(example.ids) - example.closing :][:1])
        return frozenset(found)

    # --- passes ----------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_decoder()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of final hidden states (n, d), by the model's own code."""
        return self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]

    @cached_property
    def linear_head(self) -> nn.Linear | None:
        """The LM head where logits are nothing but its product with hidden states; None where caps or scales follow."""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            return None
        with torch.no_grad():
            example = torch.linspace(-3, 3, 2 * head.in_features, device=self.device, dtype=self.dtype).view(2, -1)
            return head if torch.equal(self.head(example), head(example)) else None

    @property
    def embedding(self) -> nn.Embedding | None:
        """The token embedding where it is nothing but a look-up."""
        found = self.model.get_input_embeddings()
        plain = type(found) is nn.Embedding and not (found.max_norm or found.sparse or found.scale_grad_by_freq)
        return found if plain else None

    @cached_property
    def _head(self) -> nn.Module:
        decoder = self.decoder
        path = next(name for name, module in self.model.named_modules() if module is decoder).split(".")
        # Shallow copies along the path share every parameter with the model.
        top = copy.copy(self.model)
        at: nn.Module = top
        for part in path[:-1]:
            at._modules = dict(at._modules)
            at._modules[part] = copy.copy(at._modules[part])
            at = at._modules[part]  # type: ignore[assignment]
        at._modules = dict(at._modules)
        at._modules[path[-1]] = _PassThrough()
        return top

    @property
    def mode(self) -> str:
        """How rows are packed: families, mask or rows (see subjects/packed.py)."""
        if self._mode is None:
            self._mode = _choose_mode(self)
        return self._mode

    def hidden_states(self, pack_: Pack) -> Tensor:
        """Final hidden states (answer tokens, d) at the positions that predict the pack's answer tokens.

        Gradients flow where enabled. With activation checkpointing keep `packing(pack_)` open until backward is done.
        """
        if self.mode == "rows":
            return torch.cat([self.plain_states(row) for row in pack_.rows])
        if plain := plain_pass(self):
            return plain.states(pack_)[pack_.distinct[1]]
        with self.packing(pack_):
            return self.run_decoder(pack_)[pack_.predict]

    def states(self, pack_: Pack, taps: Taps, entry: Entry | None = None) -> dict[str, Tensor]:
        """What one pass hands out; gradients flow where enabled.

        Args:
            entry: where the pass starts, with what is known there of every packed token.

        Returns:
            "final" (A, d) states at the positions that predict answer tokens; "layer.7" (P, d) residual stream after
            block 7, before the final norm; "router.7" (P, E) router logits, fp32; "chosen.7" (P, K) experts, and
            "weight.7" (P, K) what their outputs are multiplied by. P positions: all fed tokens of every row in turn
            (`pack_.every`), or those that predict the answer (`pack_.predict`).

        Raises:
            SubjectError: a tapped block does not exist, has no router or does not say which experts it chose, or the
                model cannot be entered.
        """
        if self.mode == "rows":
            parts = [self._row_reading(row, taps) for row in pack_.rows]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        spared = self._sparing(pack_, taps)  # which may have to be tried out first, on all blocks
        if entry is not None:  # blocks have a dimension of batches
            entry = replace(entry, states=entry.states[None], read=None if entry.read is None else entry.read[None])
        with entering(self, entry), self.packing(pack_), spared:
            read = self._reading(taps, lambda: self.run_decoder(pack_))
        places = pack_.every if taps.positions == "all" else pack_.predict
        return {name: values[pack_.predict if name == "final" else places] for name, values in read.items()}

    def _sparing(self, pack_: Pack, taps: Taps) -> AbstractContextManager[None]:
        """Within the block the MLP of the last block that runs takes only the tokens whose output anybody reads."""
        last = len(self.blocks) - 1 if taps.last is None else taps.last
        mlp = self.blocks[last].mlp
        if taps.everywhere(last) or len(pack_.read) == pack_.tokens or mlp is None or not self.can_spare:
            return nullcontext()
        return sparing(self.model.get_submodule(mlp), pack_.read)

    def _row_reading(self, row: Encoded, taps: Taps) -> dict[str, Tensor]:
        ids = torch.tensor([row.ids[:-1]], device=self.device)
        read = self._reading(taps, lambda: self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0])
        first = row.start - 1
        return {
            name: values[first:] if name == "final" or taps.positions == "answer" else values
            for name, values in read.items()
        }

    def _reading(self, taps: Taps, run: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Run a pass under hooks: every tap's values at all of its tokens."""
        if taps == Taps():
            return {"final": run()}
        found: dict[str, Tensor] = {}
        handles = []

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                found[name] = (output[0] if isinstance(output, tuple) else output)[0]

            return hook

        def route(name: str, weight: str) -> Callable[..., None]:
            # From the router's input: what its own output means differs from model to model.
            def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                inputs = arguments[0] if arguments else next(iter(named.values()))
                matrix = self.model.get_parameter(weight)
                bias = getattr(self.model.get_submodule(weight.rpartition(".")[0]), "bias", None)
                inputs = inputs.reshape(-1, matrix.shape[1]).to(matrix.dtype)
                found[name] = torch.nn.functional.linear(inputs, matrix, bias).float()

            return hook

        def choose(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                _, index, weights = [*arguments, *named.values()][:3]
                found[f"chosen.{layer}"] = index.reshape(-1, index.shape[-1])
                found[f"weight.{layer}"] = weights.reshape(-1, weights.shape[-1])

            return hook

        def stop(*_: Any) -> None:
            raise _Stop

        blocks = self.blocks
        try:
            for layer in taps.layers:
                self._check_layer(layer)
                module = self.model.get_submodule(blocks[layer].name)
                handles.append(module.register_forward_hook(keep(f"layer.{layer}")))
            for layer in taps.routers:
                self._check_layer(layer)
                weight = blocks[layer].router
                if weight is None:
                    raise SubjectError(f"block {layer} of {self.name} has no router; it is dense")
                owner = self.model.get_submodule(weight.rpartition(".")[0])
                hook = route(f"router.{layer}", weight)
                handles.append(owner.register_forward_pre_hook(hook, with_kwargs=True))
            for layer in taps.chosen:
                self._check_layer(layer)
                experts = blocks[layer].experts
                if experts is None:
                    raise SubjectError(f"block {layer} of {self.name} does not say which experts its tokens take")
                module = self.model.get_submodule(experts)
                handles.append(module.register_forward_pre_hook(choose(layer), with_kwargs=True))
            if taps.last is not None:
                handles.append(self.model.get_submodule(blocks[taps.last].name).register_forward_hook(stop))
            try:
                final = run()
            except _Stop:
                return found
            return {"final": final, **found} if taps.final else found
        finally:
            for handle in handles:
                handle.remove()

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < len(self.blocks):
            raise SubjectError(f"{self.name} has blocks 0-{len(self.blocks) - 1}, there is no block {layer}")

    @property
    def blocks(self) -> list[BlockParts]:
        """The decoder's blocks."""
        if self._parts is None:
            from .anatomy import anatomy
            from .routing import caller

            shapes = {name: p.dim() for name, p in self.model.named_parameters()}
            self._parts = [
                BlockParts(
                    block.name,
                    next((name for name in block.router if block.experts and shapes[name] == 2), None),
                    caller(self.model, block) if block.experts else None,
                    mlp_of(block),
                    out_of(block),
                )
                for block in anatomy(self.model).blocks
            ]
        return self._parts

    @cached_property
    def others(self) -> int:
        """What a block gives besides hidden states: -1 where it gives a plain tensor, else the number of others."""
        found: list[int] = []

        def look(_: nn.Module, __: Any, output: Any) -> None:
            found.append(len(output) - 1 if isinstance(output, tuple) else -1)
            raise _Stop

        handle = self.model.get_submodule(self.blocks[0].name).register_forward_hook(look)
        try:
            with torch.no_grad():
                self.decoder(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    @property
    def can_enter(self) -> bool:
        """Whether passes may start at a block above the first; tried once on a few rows."""
        if self._can_enter is None:
            self._can_enter = self.mode != "rows" and len(self.blocks) > 1 and enters(self, Start(1, False))
        return self._can_enter

    def can_enter_inside(self, layer: int) -> bool:
        """Whether passes may start at the matrix that a block's MLP gives out through; tried once, on the first block
        that is asked for."""
        if self.blocks[layer].out is None:
            return False
        if self._can_enter_inside is None:
            self._can_enter_inside = self.mode != "rows" and enters(self, Start(layer, True))
        return self._can_enter_inside

    @property
    def can_spare(self) -> bool:
        """Whether the last block's MLP may leave out tokens that nobody reads; tried once on a few rows, and taken for
        granted in plans of models without weights."""
        if self._can_spare is None and self.device.type == "meta":
            return self.blocks[-1].mlp is not None
        if self._can_spare is None:
            self._can_spare = self.mode != "rows" and self.blocks[-1].mlp is not None and _spares(self)
        return self._can_spare

    @property
    def plain(self) -> Plan | None:
        """How passes without gradients run in fewer operators; None where they do not. Tried once on a few rows."""
        if self._plain is None:
            self._plain = plan_of(self) or False
        return self._plain or None

    def settle(self) -> None:
        """Try out now what is otherwise tried when a pass first needs it."""
        if self.can_enter:
            _ = self.others
        _ = self.can_spare
        _ = self.blocks, self.linear_head, self.plain

    @contextmanager
    def perturbed(self, layer: int, delta: Tensor) -> Iterator[None]:
        """Within the block `delta` (packed tokens, d) is added to what block `layer` gives out.

        Raises:
            SubjectError: there is no such block, or the model takes no packed rows.
        """
        self._check_layer(layer)
        if self.mode == "rows":
            raise SubjectError(f"{self.name} takes no packed rows, so its activations cannot be perturbed")
        self.settle()

        def shift(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + delta.to(output[0].dtype), *output[1:])
            return output + delta.to(output.dtype)

        handle = self.model.get_submodule(self.blocks[layer].name).register_forward_hook(shift)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def packing(self, pack_: Pack) -> Iterator[None]:
        if self.mode == "families":
            with packed_attention(self.model, pack_):
                yield
        else:
            yield

    def run_decoder(self, pack_: Pack, cache: Any = None) -> Tensor:
        """(tokens, d) states of every packed token, inside `packing`; an empty cache is filled with keys and values."""
        mask = pack_.dense_mask(self.dtype) if self._mode == "mask" else None
        kept = {cache_name(self.decoder): cache} if cache is not None else {}
        output = self.decoder(
            input_ids=pack_.ids,
            position_ids=pack_.positions,
            attention_mask=mask,
            use_cache=cache is not None,
            **kept,
        )
        return output.last_hidden_state[0]

    def plain_states(self, row: Encoded) -> Tensor:
        """(scored, d) final states that predict the answer, of one row that is not packed."""
        ids = torch.tensor([row.ids[:-1]], device=self.device)
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, row.start - 1 :]

    @torch.no_grad()
    def score(
        self, items: Sequence[tuple[Key, Encoded]], *, token_budget: int | None = None, progress: Progress | None = None
    ) -> Scores:
        """One teacher-forced pass over rows; every statistic of `Scores` comes from the same logits.

        Args:
            items: keys with their tokens; rows that share a prompt share its computation. Candidates other than
                `answer` have no mean and variance (NaN), which nobody reads of them.
            token_budget: tokens fed at once, `TOKEN_BUDGET` by default; the numbers do not depend on it.
        """
        rows = [row for _, row in items]

        def read(subject: LanguageModel, group: Sequence[int]) -> dict[str, np.ndarray]:
            pack_ = pack([rows[i] for i in group], subject.device)
            own = [items[i][0][1] == "answer" for i in group]
            return subject.columns(pack_, subject.hidden_states(pack_), own)

        groups = list(batches(rows, token_budget or TOKEN_BUDGET))
        parts = side_by_side(self, groups, read, of=[row.ids for row in rows], progress=progress)
        return self._scores(items, groups, parts)

    def columns(self, pack_: Pack, hidden: Tensor, own: Sequence[bool] | None = None) -> dict[str, np.ndarray]:
        """The columns of `Scores` for a pack's answer tokens.

        Args:
            hidden: (answer tokens, d) states that predict them.
            own: rows whose mean and variance are asked for, by default all.
        """
        first, at = pack_.distinct
        moments = None
        if own is not None:
            moments = torch.zeros(len(first), dtype=torch.bool, device=hidden.device)
            moments[at[torch.tensor(own, device=hidden.device)[pack_.row]]] = True
        return self.named(pack_, self.statistics(hidden[first], pack_.target, at, moments))

    @staticmethod
    def named(pack_: Pack, statistics: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """The columns of `Scores` for a pack's answer tokens, whose `statistics` (n,) are known."""
        found = {name: v.cpu().numpy() for name, v in zip(("logprob", "hit", "mean", "variance"), statistics)}
        found["token"] = pack_.target.to(torch.int32).cpu().numpy()
        found["end"] = np.concatenate([np.arange(row.scored) >= row.scored - row.closing for row in pack_.rows])
        return found

    def _scores(
        self,
        items: Sequence[tuple[Key, Encoded]],
        groups: Sequence[Sequence[int]],
        parts: Sequence[dict[str, np.ndarray]],
    ) -> Scores:
        """The table of all items from what `columns` found of each group."""
        order = [i for group in groups for i in group]
        columns = {
            name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0, _TYPES[name])
            for name in COLUMNS
        }
        table = Scores.of(
            [items[i][0] for i in order],
            [items[i][1].scored for i in order],
            columns,
            [items[i][1].text for i in order],
            {"dtype": str(self.dtype), "subject": self.name},
        )
        return table.take(np.argsort(order).tolist() if order else [])

    @torch.no_grad()
    def routes(self, items: Sequence[tuple[Key, Encoded]], *, progress: Progress | None = None) -> Routes:
        """Which experts every fed token takes, in every block that says so; passes end after the last of them.

        Raises:
            SubjectError: no block does.
        """
        layers = tuple(index for index, block in enumerate(self.blocks) if block.experts)
        if not layers:
            raise SubjectError(f"{self.name} has no block that says which experts its tokens take")
        rows = [row for _, row in items]

        def read(group: Sequence[int]) -> dict[int, np.ndarray]:
            states = self.states(pack([rows[i] for i in group], self.device), Taps(final=False, chosen=layers))
            return {layer: states[f"chosen.{layer}"].cpu().numpy() for layer in layers}

        groups = list(batches(rows, TOKEN_BUDGET))
        parts = self.share(groups, read, of=[row.ids for row in rows], progress=progress)
        order = [i for group in groups for i in group]
        counts = {layer: len(self.model.get_parameter(str(self.blocks[layer].router))) for layer in layers}
        chosen = {
            layer: np.concatenate([part[layer] for part in parts]).astype(
                np.uint8 if counts[layer] <= 256 else np.int16
            )
            if parts
            else np.zeros((0, 1), np.uint8)
            for layer in layers
        }
        about = {"experts": {str(layer): count for layer, count in counts.items()}, "subject": self.name}
        table = Routes.of([items[i][0] for i in order], [len(rows[i].ids) - 1 for i in order], chosen, about)
        places = np.argsort(order).tolist() if order else []
        return table.take(places, [key for key, _ in items])

    def gradients(self, items: Sequence[tuple[Key, Encoded]], *, progress: Progress | None = None) -> Gradients:
        """How strongly each row pulls at each weight (subjects/gradients.py): a pass forward and one back."""
        from .gradients import gradient_norms

        names, norms = gradient_norms(self, [row for _, row in items], progress=progress)
        return self._gradients(items, names, norms)

    def gradients_and_scores(
        self, items: Sequence[tuple[Key, Encoded]], *, progress: Progress | None = None
    ) -> tuple[Gradients, Scores]:
        """`gradients` and `score` of the same rows, from the same passes where rows go together."""
        from .gradients import can_go_together, norms_and_columns

        rows = [row for _, row in items]
        if not (rows and not self.sharded and can_go_together(self)):
            return self.gradients(items, progress=progress), self.score(items)
        names, norms, groups, columns = norms_and_columns(self, rows, progress=progress)
        return self._gradients(items, names, norms), self._scores(items, groups, columns)

    def _gradients(self, items: Sequence[tuple[Key, Encoded]], names: list[str], norms: np.ndarray) -> Gradients:
        return Gradients([key for key, _ in items], names, norms, {"dtype": str(self.dtype), "subject": self.name})

    def patched_into(
        self, host: LanguageModel, items: Sequence[tuple[Key, Encoded]], *, progress: Progress | None = None
    ) -> Patched:
        """What a host still says with this model's states in it (subjects/patching.py).

        Raises:
            MismatchError: the models have other shapes.
        """
        from .patching import patched

        whole, by_block = patched(host, self, [row for _, row in items], progress=progress)
        return Patched([key for key, _ in items], whole, by_block, {"subject": self.name, "host": host.name})

    def continuations(
        self, items: Sequence[tuple[Key, Encoded]], shortest: int, *, progress: Progress | None = None
    ) -> Continuations:
        """What the model writes greedily after every beginning of each answer (subjects/greedy.py)."""
        from .greedy import paths

        rows = [row for _, row in items]
        texts = [row.ids[: len(row.ids) - row.closing] for row in rows]
        found = paths(self, texts, starts=[row.start for row in rows], shortest=shortest, progress=progress)
        return Continuations([key for key, _ in items], found, {"shortest": shortest, "subject": self.name})

    def statistics(
        self, hidden: Tensor, target: Tensor, at: Tensor, moments: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logprob, hit, mean, variance) per answer token (n,). Logits live in chunks only.

        Args:
            hidden: (m, d) states; those that predict several tokens stand once.
            target: (n,) tokens.
            at: (n,) which state predicts each.
            moments: (m,) states whose mean and variance are asked for, by default all.
        """
        return token_statistics(self._in_one_place(self.head), hidden, target, at, self.vocabulary, moments)

    def _in_one_place(self, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same head, whose logits overwrite those before where they are nothing but a product."""
        linear = self.linear_head if type(self).head is LanguageModel.head else None
        if linear is None or touched(linear):
            return head
        room = torch.empty(0)

        def logits(hidden: Tensor) -> Tensor:
            nonlocal room
            if len(room) < len(hidden):
                room = hidden.new_empty(len(hidden), len(linear.weight))
            return product(hidden, linear.weight, linear.bias, room[: len(hidden)])

        return logits

    @cached_property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    # --- decoding --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[tuple[tuple[str, str], str]],
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Generations:
        """Continue each prompt (text as `prompt_text` gives it), greedily at temperature 0.

        Prompts of all lengths decode together (subjects/decoding.py), samples of one prompt share its reading. What is
        sampled depends on seed and prompt alone, not on the batch.
        """
        tokens = [self.prompt_ids(text, key) for key, text in prompts]
        for ids, (key, _) in zip(tokens, prompts):
            if len(ids) + max_new_tokens > self.context_length:
                raise RowError(
                    f"row {key[0]} ({key[1]}): prompt of {len(ids)} tokens and {max_new_tokens} new ones do not fit "
                    f"the model's context of {self.context_length}"
                )
        from .decoding import Written, decode, groups

        # Threads write side by side where there is enough for each of them.
        threads = min(at_once(self), max(1, len(tokens) * samples // TOGETHER))
        shares = 1 if self.sharded else processes.count()
        together = groups(self, tokens, max_new_tokens, samples, shares, threads)

        def write(subject: LanguageModel, group: Sequence[int]) -> list[list[Written]]:
            noise = None
            if temperature > 0:
                noise = torch.stack([_noise(seed, prompts[i][1], samples, max_new_tokens) for i in group])
            mine = [tokens[i] for i in group]
            rows = decode(
                subject, mine, max_new_tokens, samples=samples, temperature=temperature, top_p=top_p, noise=noise
            )
            return [rows[place * samples : (place + 1) * samples] for place in range(len(group))]

        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "samples": samples, "seed": seed}
        settings |= {"top_p": top_p} if top_p < 1 else {}
        parts = side_by_side(self, together, write, of=[tokens, settings], fewest=1, progress=progress)
        outputs: list[list[Written]] = in_order(together, parts)
        texts = self.tokenizer.batch_decode([ids for one in outputs for ids, _ in one], skip_special_tokens=True)
        said = [text.strip() for text in texts]
        return Generations(
            [key for key, _ in prompts],
            [text for _, text in prompts],
            [said[place * samples : (place + 1) * samples] for place in range(len(prompts))],
            [[ended for _, ended in one] for one in outputs],
            {**settings, "dtype": str(self.dtype), "subject": self.name},
        )

    def prompt_ids(self, text: str, key: tuple[str, str]) -> list[int]:
        """Tokens of a prompt as it is continued; `key` names it in errors."""
        ids, offsets = self._tokenize(text)
        # Tokenizers that close every text with an end token would have the model continue after the end.
        while ids and ids[-1] == self.tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1] and len(ids) > 1:
            ids, offsets = ids[:-1], offsets[:-1]
        if not ids:
            raise RowError(f"row {key[0]} ({key[1]}): the prompt is empty, there is nothing to continue")
        return ids

    def start(self, prompts: Sequence[Sequence[int]], limit: int, samples: int = 1) -> Started:
        """Prompts that were read, each `samples` times, ready to be continued by up to `limit` tokens."""
        from .decoding import start

        return start(self, prompts, limit, samples)

    # --- hidden states ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def hidden(self, prompts: Sequence[str], ends: Sequence[int | None] | None = None) -> Tensor:
        """Residual stream at one token of each prompt, (n, blocks + 1, d) in float32.

        Entry i is the input of block i, the last entry the output of the last block, before the final norm.

        Args:
            ends: per prompt how many of its characters are read, up to the token that is looked at; None: all.
        """
        from .watch import residual, watch

        states = watch(self, prompts, residual(self), ends)
        return torch.stack(states, dim=1)

    def token_at(self, text: str, character: int) -> int:
        """Index of the token of a prompt that holds a character.

        Raises:
            RowError: no token does.
        """
        for index, (first, stop) in enumerate(self._tokenize(text)[1]):
            if first <= character < stop:
                return index
        raise RowError(f"no token of {text!r} holds its character {character + 1}")

    @torch.no_grad()
    def lens(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32 of residual-stream states (..., d): final norm, then head."""
        from .anatomy import anatomy

        parts = anatomy(self.model)
        flat = hidden.reshape(-1, hidden.shape[-1]).to(self.device, self.dtype)
        for part in (parts.final_norm, parts.narrowing):
            flat = part[1](flat) if part is not None else flat
        return self.head(flat).float().reshape(*hidden.shape[:-1], -1)


_VOLATILE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Configuration entries that change when a model is saved and loaded, and change nothing it computes."""

_TYPES = {
    "token": np.int32,
    "logprob": np.float32,
    "hit": bool,
    "mean": np.float32,
    "variance": np.float32,
    "end": bool,
}


def cache_name(module: nn.Module) -> str:
    """What a forward pass calls the keys and values it goes on from; transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def _noise(seed: int, prompt: str, samples: int, limit: int) -> Tensor:
    """(samples, limit) uniform numbers that depend on seed and prompt only."""
    generator = torch.Generator().manual_seed(int(content_key(seed, prompt)[:15], 16))
    return torch.rand(samples, limit, generator=generator)


@torch.no_grad()
def _choose_mode(model: LanguageModel) -> str:
    """The first packing whose states equal those of plain passes on rows that share prompts and a beginning."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.vocabulary

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (count,), generator=generator).tolist())

    common, first = draw(9), draw(4)
    rows = [
        Encoded(common + first + draw(3), 13, 0, ""),
        Encoded(common + first + draw(4), 13, 0, ""),
        *(Encoded(common + draw(3) + draw(2), 12, 0, "") for _ in range(2)),
        Encoded(common + draw(5) + draw(3), 14, 0, ""),
    ]
    plain = torch.cat([model.plain_states(row) for row in rows]).float()
    pack_ = pack(rows, model.device)
    tolerance = (1e-4 if model.dtype == torch.float32 else 5e-2) * float(plain.abs().max())
    model._plain = False  # until its own code is known to take packs
    try:
        for mode in ("families", "mask"):
            model._mode = mode
            try:
                states = model.hidden_states(pack_).float()
            except Exception:  # any failure means that this model does not take rows packed this way
                continue
            if states.shape == plain.shape and float((states - plain).abs().max()) <= tolerance:
                return mode
    finally:
        model._plain = None
    return "rows"


def _spares(model: LanguageModel) -> bool:
    """Whether final states are the same where the last MLP takes only the tokens that are read."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.vocabulary, (3, 9), generator=generator).tolist()
    pack_ = pack([Encoded(tuple(row), 6, 0, "") for row in ids], model.device)
    module = model.model.get_submodule(str(model.blocks[-1].mlp))
    with torch.no_grad():
        whole = model.hidden_states(pack_).float()
        try:
            with model.packing(pack_), sparing(module, pack_.read):
                spared = model.run_decoder(pack_)[pack_.predict].float()
        except Exception:  # any failure means that this MLP must see all tokens
            return False
    tolerance = 1e-5 if model.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((whole - spared).abs().max() <= tolerance * whole.abs().max())


@subject(modality=("language",))
def language(source: str, *, dtype: str = "", device: str = "") -> LanguageModel:
    """Any causal language model that transformers loads, dense or mixture of experts."""
    return LanguageModel.load(source, dtype=dtype or None, device=device or None)
