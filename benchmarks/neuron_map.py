"""The neuron map of a model in Llama-3.1-8B's shape: FLOPs, rate, share of the machine's limit, memory.

    python benchmarks/neuron_map.py                     2 whole layers, the rest by their time
    python benchmarks/neuron_map.py --device cuda --layers 32

The program is `expunge.subjects.neuron_map.build` itself: hashes of the weights, products, best tokens, files. Weights
are random (time does not depend on them). The first layer also pays what is paid once (mean and covariance of the
head), so that a whole map takes  first + 31 x later  seconds. The limit is the fastest of plain products of the tile's
and of square shapes, made between the layers of the same run; FLOPs are counted by torch, not by formula.

On a CPU seconds are CPU time on one thread, for both sides: other jobs on the machine change them little. The wall
clock is printed beside them; on a GPU everything is wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "vocabulary": 128_256},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "layers": 8, "vocabulary": 32_000},
}


def tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1")


def subject(shape: dict[str, int], layers: int, device: str, dtype: Any) -> Any:
    """As many layers of the shape as are measured, around a head of the whole vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expunge.subjects.language import LanguageModel

    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,  # the embedding is not looked at: half the memory
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    return LanguageModel(model, tokenizer(shape["vocabulary"]), "random weights")


def clock(device: str) -> float:
    return time.process_time() if device == "cpu" else time.perf_counter()


class Limit:
    """The rate of plain products, made again and again between what is measured."""

    def __init__(self, device: str, dtype: Any, width: int, rows: int, columns: int) -> None:
        import torch

        sizes = [(rows, width, columns), (2048, 2048, 2048), (4096, 4096, 4096)]
        self.pairs = [
            (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype))
            for m, k, n in sizes
        ]
        self.device = device
        self.rates: list[float] = []

    def measure(self) -> None:
        for a, b in self.pairs:
            flop = 2 * a.shape[0] * a.shape[1] * b.shape[0]
            count = max(2, int(4e11 / flop) if self.device == "cpu" else 40)
            a @ b.T
            finish(self.device)
            began = clock(self.device)
            for _ in range(count):
                a @ b.T
            finish(self.device)
            self.rates.append(count * flop / (clock(self.device) - began))


def finish(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def forget_peak(device: str) -> int:
    """Bytes in use now; the peak is measured from here."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from expunge.subjects import projection
    from expunge.subjects.neuron_map import Settings, build

    torch.set_num_threads(arguments.threads)
    shape, device = SHAPES[arguments.shape], arguments.device
    dtype = getattr(torch, arguments.dtype)
    on_cuda = device.startswith("cuda")
    rows, columns = (
        (projection.CUDA_ROWS, projection.CUDA_COLUMNS) if on_cuda else (projection.ROWS, projection.COLUMNS)
    )
    limit = Limit(device, dtype, shape["hidden_size"], rows, columns)
    limit.measure()
    model = subject(shape, arguments.layers, device, dtype)
    _ = model.blocks  # taking the model apart is not part of the map
    finish(device)
    before = forget_peak(device)
    seconds: list[float] = []
    walls: list[float] = []
    others = 0
    with tempfile.TemporaryDirectory(prefix="expunge-map-") as folder, FlopCounterMode(display=False) as counter:
        began, wall = clock(device), time.perf_counter()

        def done(*_: int) -> None:
            nonlocal began, others, wall
            finish(device)
            seconds.append(clock(device) - began)
            walls.append(time.perf_counter() - wall)
            counted = counter.get_total_flops()
            limit.measure()
            others += counter.get_total_flops() - counted
            began, wall = clock(device), time.perf_counter()

        build(model, Path(folder) / "map", Settings(k=arguments.k, matrix=arguments.matrix), progress=done)
        size = sum(path.stat().st_size for path in (Path(folder) / "map").glob("layer-*"))
    used = peak(device) - before
    flop = counter.get_total_flops() - others
    formula = 2 * shape["intermediate_size"] * shape["hidden_size"] * shape["vocabulary"]
    later = statistics.median(seconds[1:]) if len(seconds) > 1 else seconds[0]
    whole = seconds[0] + (shape["layers"] - 1) * later
    best = max(limit.rates)
    return {
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name() if on_cuda else f"cpu, {arguments.threads} thread",
        "dtype": arguments.dtype,
        "layers measured": arguments.layers,
        "neurons a layer": shape["intermediate_size"],
        "counted TFLOP": flop / 1e12,
        "TFLOP of the products alone": arguments.layers * formula / 1e12,
        "seconds, first layer": seconds[0],
        "seconds, later layer": later,
        "wall seconds, later layer": statistics.median(walls[1:] or walls),
        "TFLOP/s, later layer": formula / later / 1e12,
        "limit TFLOP/s": best / 1e12,
        "limit TFLOP/s, median": statistics.median(limit.rates) / 1e12,
        "limit / reached": best * later / formula,
        "whole map, seconds (from whole layers)": whole,
        "whole map at the limit, seconds": shape["layers"] * formula / best,
        "memory above the model, MiB": used / 2**20,
        "of all scores, MiB (never held)": 2 * shape["intermediate_size"] * shape["vocabulary"] / 2**20,
        "map on disk, MiB a layer": size / arguments.layers / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, default=2, help="whole layers that are measured")
    parser.add_argument("--matrix", choices=("up", "gate", "down"), default="up")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments)
    for name, value in found.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
