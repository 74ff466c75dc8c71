"""The data room alone: batches per second of the static loader, and tokenisation beside `tokenizers` in batch mode.

static: milliseconds until the next 8,192 tokens are there, asked for in a row ("ms") and between training steps of 5 ms
that keep all cores busy ("ms between steps": what the loader adds to such a step). tokenise: texts never seen before,
from files to a loader (lazy) or to rows (streaming), beside `encode_batch_fast` on the same texts in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree.data import (
    DataConfig,
    Loader,
    SourceConfig,
    build_loader,
    load_tokenizer,
    prepare_static,
    read_texts,
    train_tokenizer,
)
from fusiontree.data.tokenizer import plain_encoder

ROWS, LENGTH, STEP_SECONDS = 8, 1024, 0.005
ARMS = ("packed", "unpacked", "mixture of 3")


def static_loaders(folder: Path, tokenizer: PreTrainedTokenizerFast, workers: list[int]) -> dict[str, Loader]:
    """A loader for each way of cutting and number of workers, over one prepared folder."""
    source = SourceConfig(path=str(folder), mode="static")
    weighted = [source.model_copy(update={"weight": weight}) for weight in (1.0, 2.0, 3.0)]
    settings: dict[str, dict[str, Any]] = {
        "packed": {"train": [source]},
        "unpacked": {"train": [source], "packing": False},
        "mixture of 3": {"train": weighted},
    }
    return {
        f"{arm}, {count} workers": build_loader(
            DataConfig(**settings[arm], num_workers=count), tokenizer, "train", LENGTH, ROWS
        )
        for arm in ARMS
        for count in workers
    }


def busy_step() -> Callable[[], None]:
    """Matrix products on all threads that take about STEP_SECONDS."""
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    begin = time.perf_counter()
    for _ in range(200):
        left @ right
    count = max(1, round(STEP_SECONDS / ((time.perf_counter() - begin) / 200)))

    def step() -> None:
        for _ in range(count):
            left @ right

    return step


def milliseconds(action: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - begin))
    return times


def measure_static(loaders: dict[str, Loader], rounds: int, batches: int) -> dict[str, dict[str, list[list[float]]]]:
    """Times of each loader's batches in each round, the loaders taking turns; `alone`: the step without a loader."""
    step = busy_step()
    raw: dict[str, dict[str, list[list[float]]]] = {name: {"in a row": [], "with a step": []} for name in loaders}
    raw["alone"] = {"with a step": []}
    for _ in range(rounds):
        raw["alone"]["with a step"].append(milliseconds(step, batches))
        for name, loader in loaders.items():
            stream = iter(loader)
            for _ in islice(stream, 3):  # threads start
                step()

            def both(stream: Iterator[Any] = stream) -> None:
                next(stream)
                step()

            raw[name]["with a step"].append(milliseconds(both, batches))
            for _ in islice(stream, 5):  # use up what was prepared during the steps
                pass
            raw[name]["in a row"].append(milliseconds(partial(next, stream), batches))
            del stream  # ends its threads
    return raw


def static_rows(raw: dict[str, dict[str, list[list[float]]]]) -> list[dict[str, Any]]:
    """Medians of the rounds' means: batches of several threads come in bursts, so single waits say little."""
    alone = raw.pop("alone")["with a step"]
    rows = []
    for name, times in raw.items():
        mean = statistics.median(map(statistics.mean, times["in a row"]))
        slow = statistics.quantiles(chain.from_iterable(times["in a row"]), n=20)[-1]
        steps = zip(times["with a step"], alone, strict=True)
        added = statistics.median(statistics.mean(mine) - statistics.mean(other) for mine, other in steps)
        figures = {"ms": mean, "ms p95": slow, "ms between steps": added}
        rows.append({"what": f"static, {name}"} | figures | {"tokens/s": 1000 * ROWS * LENGTH / mean, "of raw": "–"})
    return rows


def raw_encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> int:
    """The floor: all texts in one call of `tokenizers`, nothing else. Gives the number of tokens."""
    core = plain_encoder(tokenizer)
    return sum(len(encoding.ids) + 1 for encoding in core.encode_batch_fast(texts, add_special_tokens=False))


def lazy_tokenise(path: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """From a file never seen before to a loader."""
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(train=[SourceConfig(path=path)], validation_fraction=0.0, cache_dir=cache)
        return build_loader(config, tokenizer, "train", LENGTH, ROWS).tokens_per_epoch


def stream_tokenise(path: str, tokenizer: PreTrainedTokenizerFast, tokens: int) -> int:
    """As many rows of a stream as hold `tokens`."""
    config = DataConfig(train=[SourceConfig(path=path, mode="streaming")], validation_fraction=0.0)
    batches = tokens // (ROWS * LENGTH)
    for _ in islice(build_loader(config, tokenizer, "train", LENGTH, ROWS), batches):
        pass
    return batches * ROWS * LENGTH


def child(options: argparse.Namespace) -> None:
    """Print, as JSON, the tokens per second of raw, lazy and streaming in each round, taking turns."""
    folder = Path(options.child)
    tokenizer, path = load_tokenizer(folder / "tokenizer"), str(folder / "text.jsonl")
    texts = list(read_texts([SourceConfig(path=path)]))
    tokens = raw_encode(texts, tokenizer)
    arms: dict[str, Callable[[], int]] = {
        "raw": lambda: raw_encode(texts, tokenizer),
        "lazy": lambda: lazy_tokenise(path, tokenizer),
        "streaming": lambda: stream_tokenise(path, tokenizer, tokens),
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            begin = time.perf_counter()
            done = arm()
            found[name].append(done / (time.perf_counter() - begin))
    print(json.dumps(found))


def measure_tokenising(folder: Path, threads: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Run `child` in a process of its own: the encoder's threads are settled when it first runs."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "benchmarks.data_speed", "--child", str(folder), "--rounds", str(options.rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"tokenising with {threads} threads failed:\n{done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def tokenising_rows(found: dict[str, list[float]], threads: int) -> list[dict[str, Any]]:
    """A row for each arm; `of raw` is the median over the rounds, each compared with the raw speed of its round."""
    rows = []
    for name, rates in found.items():
        rate = statistics.median(rates)
        share = statistics.median(mine / raw for mine, raw in zip(rates, found["raw"], strict=True))
        times = {"ms": 1000 * ROWS * LENGTH / rate, "ms p95": "–", "ms between steps": "–"}
        what = f"tokenise, {name}, {threads} threads"
        rows.append({"what": what} | times | {"tokens/s": rate, "of raw": f"{share:.0%}"})
    return rows


def write_text(source: SourceConfig, megabytes: float, path: Path) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for text in read_texts([source], int(megabytes * 1e6)):
            handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = arguments("data_speed", __doc__.splitlines()[0])
    parser.add_argument("--text", default="stdlib", help="file, glob or stdlib")
    parser.add_argument("--megabytes", type=float, default=10.0, help="of text to tokenise")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=40, help="of each loader in a round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    if options.quick:
        options.megabytes, options.vocabulary, options.rounds, options.batches = 0.3, 300, 1, 3
    set_threads(options.threads)
    machine = describe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(SourceConfig(path=options.text), options.megabytes, folder / "text.jsonl")
        source = SourceConfig(path=str(folder / "text.jsonl"))
        tokenizer = train_tokenizer([source], options.vocabulary, folder / "tokenizer")
        prepare_static([source], tokenizer, folder / "static")
        loaders = static_loaders(folder / "static", tokenizer, [0, 1, 2])
        static = measure_static(loaders, options.rounds, options.batches)
        raw: dict[str, Any] = {"static ms": dict(static)}
        rows = static_rows(static)
        for threads in (1, torch.get_num_threads()):
            raw[f"tokens/s, {threads} threads"] = found = measure_tokenising(folder, threads, options)
            rows += tokenising_rows(found, threads)
    remark = (
        f"Batches of {ROWS} × {LENGTH} tokens; {options.megabytes:g} MB of {Path(options.text).name}, BPE of "
        f"{options.vocabulary} ids trained on it; a step takes {1000 * STEP_SECONDS:g} ms of matrix products."
    )
    return write_result("data_speed", machine, vars(options) | {"raw": raw}, {"rows": rows, "remarks": [remark]})


if __name__ == "__main__":
    main()
