"""Models in one GGUF file, as llama.cpp reads them: transformers makes plain weights, the config and the tokenizer of
it."""

import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from safer_ray.errors import UserError, need_extra
from safer_ray.reward.folder import check_file_is_here
from safer_ray.storage.files import stamp

SUFFIX = ".gguf"
MAGIC = b"GGUF"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
NAMES = (("output.", "lm_head."), ("blk.", "layers."))  # of tensors, there and where they are told


def is_gguf(name: str | Path) -> bool:
    """Return whether a name is that of a GGUF file."""
    return str(name).lower().endswith(SUFFIX)


def check_gguf(path: Path) -> None:
    """See that there is a GGUF file, the only one of its model, and what reads it.

    Raises:
        UserError: it is missing, a pointer, something else, or one of several; or the extra is not installed.
    """
    check_file_is_here(path)
    with path.open("rb") as file:
        begins = file.read(len(MAGIC))
    if begins != MAGIC:
        raise UserError(f"{path} is no GGUF file, though its name ends so; copy the file again")
    if SHARD.search(path.name):
        raise UserError(f"{path} is one of several files of a model; join them with `llama-gguf-split --merge`")
    need_extra("gguf", "gguf", "accelerate")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[Path]:
    """Yield a folder with a link to the file and nothing else, since transformers reads what lies beside it, too."""
    with tempfile.TemporaryDirectory(prefix="safer_ray-gguf-") as folder:
        (Path(folder) / path.name).symlink_to(path.absolute())
        yield Path(folder)


def open_gguf(auto: Any, path: Path, **options: Any) -> Any:
    """Return what one of transformers' Auto classes makes of a GGUF file."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils.logging import tqdm

    # Its progress bar is that of another library, which nobody can turn off, else.
    vars(reader)["tqdm"] = tqdm
    with alone(path) as folder:
        try:
            return auto.from_pretrained(str(folder), gguf_file=path.name, trust_remote_code=False, **options)
        except Exception as error:
            raise ValueError(str(error).replace(f"{folder}/", "")) from error


def gguf_config(auto: Any, path: Path) -> Any:
    """Return the config in a GGUF file, as `auto` reads it: again once the file has changed."""
    return deepcopy(_config_of(auto, str(path.absolute()), stamp(path)))


@functools.lru_cache(maxsize=8)
def _config_of(auto: Any, path: str, _stamp: tuple[int, str]) -> Any:
    return open_gguf(auto, Path(path))


def gguf_tokenizer(auto: Any, path: Path) -> Any:
    """Return the tokenizer in a GGUF file, as `auto` reads it, without a token of transformers' own (`<|endoftext|>`),
    which would have no row of the embedding."""
    from tokenizers import Tokenizer
    from transformers.integrations.gguf import read_gguf_metadata

    tokenizer = open_gguf(auto, path)
    count = read_gguf_metadata(str(path))[0]["tokenizer.ggml.tokens"]  # an array is told by its length
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in made["added_tokens"] if token["id"] < count]
    if len(own) < len(made["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(made | {"added_tokens": own}))
    return tokenizer


def gguf_options() -> dict[str, Any]:
    """Return what makes a model of plain weights, also where a package could compute with the quantised ones."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # older versions know no other weights
    return {"quantization_config": kind(dequantize=True)} if kind else {}


def strange_tensors(path: Path, model: Any) -> set[str]:
    """Return the tensors of a GGUF file that are not read into a model; transformers passes over them in silence."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, names = read_gguf_metadata(str(path))
    kind = metadata["general.architecture"]
    processor = reader.TENSOR_PROCESSORS.get(kind, reader.TensorProcessor)(config=model.config.to_dict())
    known = reader.get_gguf_hf_weights_map(model, processor)
    # Those of experts have names of their own there.
    return {_named(name) for name in names if name not in known and "_exps." not in name}


def _named(name: str) -> str:
    for own, told in NAMES:
        if name.startswith(own):
            return told + name.removeprefix(own)
    return name
