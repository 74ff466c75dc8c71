"""Profile a model folder: prefill and decoding, each with its table of operators and its trace. See run_profile.sh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from fusiontree.cli.places import model_folder
from fusiontree.deploy import InferenceRuntime
from fusiontree.deploy.decoding import Decoding
from fusiontree.errors import ConfigError, FusionTreeError

ROWS = 15


def main(
    model: Annotated[Path, typer.Argument(help="Model or run folder.")],
    tokens: Annotated[int, typer.Option(min=1)] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    device: str = "cpu",
    out: Path = Path("profiles"),
) -> None:
    """Write `prefill.json` and `decode.json` into `out`."""
    runtime = InferenceRuntime(model_folder(model), device=device)
    if prompt_tokens + tokens + 1 > runtime.max_length:
        raise ConfigError(f"--prompt-tokens {prompt_tokens} and --tokens {tokens} are more than {runtime.max_length}")
    vocabulary = runtime.model.config.vocab_size
    out.mkdir(parents=True, exist_ok=True)

    def fresh() -> Decoding:
        return Decoding(runtime.model, torch.randint(vocabulary, (prompt_tokens,)).tolist())

    warm = fresh()
    _decode(warm, 2)  # compiles and allocates what the first call pays for
    started = fresh()
    _record("prefill", device, out, lambda: _decode(started, 1))
    _record("decode", device, out, lambda: _decode(started, tokens))


def _decode(decoding: Decoding, tokens: int) -> None:
    for _ in range(tokens):
        decoding.ids.append(int(decoding.next_logits().argmax()))


def _record(name: str, device: str, out: Path, work: Callable[[], None]) -> None:
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as found:
        work()
    path = out / f"{name}.json"
    found.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    typer.echo(f"{name}: trace in {path}\n{found.key_averages().table(sort_by=order, row_limit=ROWS)}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FusionTreeError as error:
        raise SystemExit(f"error: {error}") from None
