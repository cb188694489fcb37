"""In what a reward model computes where it is only read: which dtype that is, and what of a model stays in float32."""

import json
import logging
import struct
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safer_ray.config.reading import AUTO, FLOAT32, PRECISION, Precision, Reading
from safer_ray.reward.folder import ADAPTER_WEIGHTS
from safer_ray.reward.reading import how_it_reads

OF_16_BITS = ("BF16", "F16")  # as safetensors call them
log = logging.getLogger(__name__)


def precision_of(directory: Path, reading: Reading, on_gpu: Callable[[], bool]) -> Precision:
    """Return the dtype in which a reward model computes where it is read: as the bundle says that it lies in, else as
    `reading` asks; of a model that is not there yet, as if its weights had 32 bits.

    Raises:
        UserError: it is in a bundle that says otherwise than `reading` does, or its settings are damaged.
    """
    asked = how_it_reads(directory, reading).inference_dtype
    if asked != AUTO:
        return asked
    if not has_16_bits(directory):
        return FLOAT32
    if on_gpu():
        return "bfloat16"
    _say_faster(directory.name)
    return FLOAT32


def has_16_bits(folder: Path) -> bool:
    """Return whether most of the weights in a folder of safetensors are floats of 16 bits."""
    sizes: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        if file.name == ADAPTER_WEIGHTS:  # merged in float32 into what lies elsewhere
            continue
        for tensor in _header(file).values():
            if isinstance(tensor, dict) and "data_offsets" in tensor:
                begins, ends = tensor["data_offsets"]
                sizes[tensor["dtype"]] += ends - begins
    return bool(sizes) and sizes.most_common(1)[0][0] in OF_16_BITS


def _header(file: Path) -> dict[str, Any]:
    """Return what a file of safetensors says of its tensors; nothing where it is torn, which loading tells."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            found = json.loads(opened.read(min(length, file.stat().st_size)))
    except (OSError, ValueError, struct.error):
        return {}
    return found if isinstance(found, dict) else {}


def has_gpu() -> bool:
    """Return whether this process has a GPU that multiplies bfloat16."""
    import torch  # here, since stages that are only planned do without

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_multiplies(precision: Precision) -> bool:
    """Return whether this processor has instructions for products of a dtype; torch emulates them elsewhere."""
    import torch

    if precision == FLOAT32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if precision == "float16":
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if torch.cpu._is_avx2_supported():  # where there is AVX512, oneDNN takes bfloat16, and emulates it without these
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache  # once a process
def _say_faster(name: str) -> None:
    if cpu_multiplies("bfloat16"):
        log.warning(
            "%s: its weights have 16 bits and this processor multiplies bfloat16: with %s: bfloat16 it is read about "
            "twice as fast, with scores that are equal within a bound and not to 1e-5",
            name,
            PRECISION,
        )


@cache
def tell_emulated(name: str, precision: Precision) -> None:
    """Tell, once, where a processor has no instructions for a dtype: results are the same, and it takes longer.

    Not an error: a bundle that was made for GPUs says in what it computes, and is to be read elsewhere, too.
    """
    if not cpu_multiplies(precision):
        log.warning(
            "%s: it computes in %s, which this processor emulates: slower than float32; use a GPU or another "
            "processor, or make what reads it with %s: float32",
            name,
            precision,
            PRECISION,
        )
