"""The least time the arithmetic and the memory of this machine allow, to read the other benchmarks against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.contestants import NAMES, as_settings, build, sizes_from
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree.eval import weight_bytes

BACKWARD_FACTOR = 3  # forward once, backward twice: gradients of inputs and of weights


def rate(call: Callable[[], Any], amount: float, seconds: float) -> float:
    """`amount` per second of `call`: the median over repeats that last about `seconds` together."""
    call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return amount / statistics.median(times)


def matrix_rate(dtype: torch.dtype, rows: int, hidden: int, seconds: float) -> float:
    """FLOP/s of (rows, hidden) @ (hidden, 4 hidden), the shape of the models' largest products."""
    left, right = torch.randn(rows, hidden).to(dtype), torch.randn(hidden, 4 * hidden).to(dtype)
    return rate(lambda: left @ right, 2.0 * rows * hidden * 4 * hidden, seconds)


def read_rate(megabytes: int, seconds: float) -> float:
    """Bytes per second read by a sum over numbers far larger than the caches: faster than any matrix-vector product."""
    numbers = torch.ones(megabytes * 262_144)
    return rate(numbers.sum, float(numbers.nbytes), seconds)


def attention_flops(query: list[int], key: list[int], value: list[int], *others: Any, out_shape: Any, **_: Any) -> int:
    """PyTorch's count for attention, which it leaves out on CPU; half of it where half is masked."""
    causal = bool(others[1]) if len(others) > 1 else False
    return sdpa_flop_count(query, key, value) // (2 if causal and query[-2] == key[-2] else 1)


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def forward_flops_per_token(model: Any, length: int) -> float:
    """Matrix-product FLOPs of one forward, counted by PyTorch the same way for every model."""
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(ids, use_cache=False)
    return counter.get_total_flops() / length


def main() -> None:
    parser = arguments("floor", __doc__)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each rate")
    options = parser.parse_args()
    if options.quick:
        options.length, options.seconds = 128, 0.05
    set_threads(options.threads)
    machine = describe()
    sizes = sizes_from(options)
    rates = {
        "bf16_gflops": matrix_rate(torch.bfloat16, 4096, sizes.hidden_size, options.seconds) / 1e9,
        "fp32_gflops": matrix_rate(torch.float32, 4096, sizes.hidden_size, options.seconds) / 1e9,
        "read_gb_per_second": read_rate(32 if options.quick else 512, options.seconds) / 1e9,
    }
    models = build(tuple(options.models), sizes)
    rows = []
    for name, model in models.items():
        flops, bf16_bytes = forward_flops_per_token(model, options.length), weight_bytes(model) / 2
        training = rates["bf16_gflops"] * 1e9 / (BACKWARD_FACTOR * flops)
        decoding = rates["read_gb_per_second"] * 1e9 / bf16_bytes
        row = {"model": name, "forward MFLOPs/token": flops / 1e6, "bf16 weights MB": bf16_bytes / 1e6}
        rows.append(row | {"training tokens/s at most": training, "decode tokens/s at most": decoding})
    remark = (
        f"Measured: {rates['bf16_gflops']:,.0f} GFLOP/s in bf16 and {rates['fp32_gflops']:,.0f} in fp32 matrix "
        f"products, {rates['read_gb_per_second']:.1f} GB/s read. Training floor: forward and backward matrix products "
        "at the bf16 rate; decoding floor: every weight read once per token from main memory."
    )
    print(remark)
    settings = vars(options) | as_settings(sizes, models)
    write_result("floor", machine, settings, {"rows": rows, "remarks": [remark], "rates": rates})


if __name__ == "__main__":
    main()
