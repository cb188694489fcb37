"""Files of a checkpoint's folder: which hold the weights, and what stands in the way, seen before a model is opened."""

import json
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safer_ray.errors import UserError

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"  # of a model that was trained with LoRA, in the model's own
ADAPTER_BIN = "adapter_model.bin"
BIN_WEIGHTS = "pytorch_model.bin"
BIN_INDEX = f"{BIN_WEIGHTS}.index.json"
BIN = "bin_weights"  # the option that lets pickled weights be read
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "tekken.json", "*vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "*.bpe", "*.spm"),
)
READ = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")  # beside the weights
AS_SAFETENSORS = "AutoModelForSequenceClassification.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
log = logging.getLogger(__name__)


class Format(NamedTuple):
    """A kind of weights that is not read: its files, what it is, and how safetensors are made of it."""

    pattern: str
    called: str
    remedy: str


OTHER_FORMATS = (  # the first that is there is told
    Format("zero_to_fp32.py", "a DeepSpeed checkpoint", "run python zero_to_fp32.py . NEW_FOLDER --safe_serialization"),
    Format("*/*.distcp", "a sharded FSDP checkpoint", "run `accelerate merge-weights FOLDER NEW_FOLDER`"),
    Format(
        "pytorch_model*.bin*",
        "PyTorch weights",
        f"convert them to safetensors with transformers: {AS_SAFETENSORS}, or set {BIN}: true (--read {BIN}=true)",
    ),
    Format(
        "consolidated*", "weights in their maker's own layout", "convert them with transformers' script for the family"
    ),
    Format("*.gguf", "weights for llama.cpp", "pass that file itself"),
    Format(
        "tf_model*.h5",
        "TensorFlow weights",
        f"convert them with transformers 4: {AS_SAFETENSORS[:-28]}, from_tf=True).save_pretrained(NEW_FOLDER)",
    ),
    Format("flax_model*.msgpack", "Flax weights", "convert them with transformers 4 and from_flax=True"),
    Format("*.npz", "weights for MLX", "pass the model that they were made from"),
    Format("*.onnx", "an ONNX graph", "pass the model that it was exported from"),
    Format("*/*.onnx", "an ONNX graph", "pass the model that it was exported from"),
    Format("openvino_model.*", "an OpenVINO graph", "pass the model that it was exported from"),
    Format("*.bin", "PyTorch weights", f"convert them to safetensors with transformers: {AS_SAFETENSORS}"),
    Format("*.p[tk]*", "PyTorch weights", "load them into the model's class with torch, and save_pretrained it"),
    Format("*.ckpt", "PyTorch weights", "load them into the model's class with torch, and save_pretrained it"),
)
NO_MODEL_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "scaler.pt", "optimizer.bin")


class Kind(NamedTuple):
    """Keys of a config, and what their values have to be."""

    keys: tuple[str, ...]
    called: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole_number(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_count(value: Any) -> bool:
    return _is_whole_number(value) and value >= 1


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _names_code(value: Any) -> bool:
    named = value.values() if isinstance(value, dict) else [value]
    flat = [name for each in named for name in (each if isinstance(each, list) else [each])]
    return all(name is None or isinstance(name, str) for name in flat)


KINDS = (
    Kind(("architectures", "layer_types"), "a list of names", _are_names),
    Kind(("auto_map",), "names of classes", _names_code),
    Kind(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), "a whole number from 1 on", _is_count),
    Kind(("sliding_window",), "a whole number", _is_whole_number),
    Kind(("model_max_length",), "a number", _is_number),
    Kind(
        ("is_causal", "output_hidden_states", "output_attentions", "return_dict", "use_sliding_window"),
        "true or false",
        lambda value: isinstance(value, bool),
    ),
    Kind(("quantization_config",), "an object", lambda value: isinstance(value, dict)),
)


def check_config(folder: Path, otherwise: str) -> None:
    """See that a folder holds a model's config, or an adapter's, and text files in place of pointers to them.

    Raises:
        UserError: it does not; `otherwise` is the remedy where nothing else in the folder tells one.
    """
    _check_no_adapter(folder)
    if is_adapter(folder):
        adapter_settings(folder)
        _check_texts(folder)
        return
    if not (folder / CONFIG).is_file():
        begin = f"no model in {folder} ({CONFIG} is missing)"
        if below := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
            raise UserError(f"{begin}, but there is one in its {', '.join(below[:3])}; pass that folder")
        if found := _other_format(folder):
            raise UserError(f"{begin}, but {found}")
        raise UserError(f"{begin}; {otherwise}")
    _check_texts(folder)


def _check_texts(folder: Path) -> None:
    """Raises UserError where a text file is a pointer, or a config holds what it cannot."""
    pointers = [path for pattern in READ for path in sorted(folder.glob(pattern)) if is_pointer(path)]
    if pointers:
        raise UserError(_of_pointer(pointers[0], len(pointers)))
    for file in (folder / CONFIG, folder / TOKENIZER_CONFIG):
        if file.is_file():
            try:
                tree = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                tree = None
            check_values(str(file), tree)


def check_values(file: str, tree: Any) -> None:
    """See that the JSON of a config is an object, in which what is read without transformers' own checks is of the kind
    that it should be; null is, everywhere.

    Raises:
        UserError: it is not; the key and its value are named.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{file} is not a JSON object; copy the file again")
    for at, part in (("", tree), ("text_config.", tree.get("text_config"))):
        if not isinstance(part, dict):
            continue
        for kind in KINDS:
            for key in kind.keys:
                value = part.get(key)
                if value is not None and not kind.fits(value):
                    shown = " ".join(repr(value).split())[:100]
                    raise UserError(f"{file}: {at}{key} is {shown}, wanted {kind.called}; copy the file again")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of peft, and no model."""
    if not (folder / ADAPTER).is_file() or _is_whole(folder):
        return False
    return not (folder / CONFIG).is_file() or any(folder.glob("adapter_model.*"))


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return what an adapter says of itself.

    Raises:
        UserError: it says nothing that can be read, or names no kind of adapter.
    """
    file = folder / ADAPTER
    if is_pointer(file):
        raise UserError(_of_pointer(file, 1))
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not a JSON object; copy the file again")
    base = settings.get("base_model_name_or_path")
    for key, value in (("peft_type", settings.get("peft_type")), ("base_model_name_or_path", base or "")):
        if not isinstance(value, str):
            raise UserError(f"{file}: {key} is {value!r}, wanted a name; copy the file again")
    return settings


def _check_no_adapter(folder: Path) -> None:
    """Raises UserError where a folder holds an adapter beside weights."""
    if (folder / ADAPTER).is_file() and _is_whole(folder) and any(folder.glob("adapter_model.*")):
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}) beside weights, and which of both is meant is not known; move the "
            "adapter into a folder of its own"
        )


def _is_whole(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def is_pointer(path: Path) -> bool:
    """Return whether a file is what Git LFS leaves in the place of one that was not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def check_fetched(folder: Path) -> None:
    """Raises UserError where a file in a folder, or below it, is a pointer of Git LFS."""
    if pointers := [path for path in sorted(folder.rglob("*")) if path.is_file() and is_pointer(path)]:
        raise UserError(_of_pointer(pointers[0], len(pointers)))


def _of_pointer(path: Path, count: int) -> str:
    more = f", one of {count}" if count > 1 else ""
    return f"{path} is a Git LFS pointer, not the file itself{more}; run `git lfs pull` in {path.parent}"


def weight_files(folder: Path, bin_weights: bool = False) -> dict[Path, list[str]]:
    """Return the files that hold a model's weights, and the names of the tensors in each where an index tells them; as
    transformers looks for them. With `bin_weights`, pickled ones are taken where there are no others.

    Raises:
        UserError: there are none, or the index is not readable.
    """
    if (folder / WEIGHTS).is_file():
        if (folder / INDEX).is_file():
            log.warning("%s has %s and %s: the first is read", folder, WEIGHTS, INDEX)
        return {folder / WEIGHTS: []}
    index = folder / INDEX
    if bin_weights and not index.is_file():
        if (folder / BIN_WEIGHTS).is_file():
            return {folder / BIN_WEIGHTS: []}
        index = folder / BIN_INDEX
    if not index.is_file():
        raise UserError(_no_weights(folder))
    if is_pointer(index):
        raise UserError(_of_pointer(index, 1))
    try:
        where: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in where.items():
            files.setdefault(folder / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} is not readable; copy the model again") from None
    if not files:
        raise UserError(f"{index} names no weights; copy the model again")
    return files


def _no_weights(folder: Path) -> str:
    link = folder / WEIGHTS
    if link.is_symlink():
        return f"{link} is a link to {link.readlink()}, which is not there; copy the file itself"
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return f"{folder} has {shards[0].name}, but no {INDEX} that says what is where; copy the model again"
    if named := sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")):
        return f"{folder} has no {WEIGHTS}, but {named[0]}; rename it so if it holds the whole model"
    found = _other_format(folder)
    return f"{folder} has no {WEIGHTS}{f', but {found}' if found else '; copy the model again'}"


def _other_format(folder: Path) -> str | None:
    for pattern, called, remedy in OTHER_FORMATS:
        found = [
            path for path in sorted(folder.glob(pattern)) if not any(path.match(other) for other in NO_MODEL_FILES)
        ]
        if found:
            return f"{found[0].relative_to(folder)} ({called}); {remedy}"
    return None


def check_weights(folder: Path, bin_weights: bool = False) -> None:
    """See that every file of weights is there, whole, and holds the tensors that its index names; or that those of an
    adapter are. With `bin_weights` they may be pickled.

    Raises:
        UserError: one is missing, a pointer, torn, or of another format.
    """
    if is_adapter(folder):
        _check_adapter_weights(folder, bin_weights)
        return
    files = weight_files(folder, bin_weights)
    if pointers := [path for path in files if is_pointer(path)]:
        raise UserError(_of_pointer(pointers[0], len(pointers)))
    if missing := sorted(path.name for path in files if not path.is_file()):
        raise UserError(
            f"{folder} has no {missing[0]}, which {_index_of(missing[0])} names ({len(missing)} such files of "
            f"{len(files)}); copy the model again"
        )
    for path, names in files.items():
        if path.suffix == ".bin":
            _check_zip(path)
        elif lacks := sorted(set(names) - check_file_of_weights(path)):
            raise UserError(f"{path} has no {lacks[0]}, which {INDEX} says is in it; copy both files again")


def _index_of(file: str) -> str:
    return BIN_INDEX if file.endswith(".bin") else INDEX


def _check_adapter_weights(folder: Path, bin_weights: bool) -> None:
    if (folder / ADAPTER_WEIGHTS).exists() or not (folder / ADAPTER_BIN).is_file():
        check_file_of_weights(folder / ADAPTER_WEIGHTS)
        return
    if not bin_weights:
        raise UserError(
            f"{folder} has no {ADAPTER_WEIGHTS}, but {ADAPTER_BIN} (PyTorch weights); save the adapter again with "
            f"peft, or set {BIN}: true (--read {BIN}=true)"
        )
    check_file_is_here(folder / ADAPTER_BIN)
    _check_zip(folder / ADAPTER_BIN)


def _check_zip(path: Path) -> None:
    """Raises UserError where a file of pickled weights is no archive, or a torn one; nothing of it is read."""
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is torn, or of a PyTorch before 1.6; copy it again, or convert it to safetensors with "
            f"transformers: {AS_SAFETENSORS}"
        )


def check_file_is_here(path: Path) -> None:
    """Raises UserError where a file is missing, or is a pointer of Git LFS."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; copy the model again, or export it with safetensors")
    if is_pointer(path):
        raise UserError(_of_pointer(path, 1))


def check_file_of_weights(path: Path) -> set[str]:
    """Return the names of the tensors in a file.

    Raises:
        UserError: it is missing, a pointer, or torn.
    """
    from safetensors import SafetensorError, safe_open  # slow to import

    check_file_is_here(path)
    try:
        with safe_open(path, framework="numpy") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"corrupt weights: {path}: {cause}; train or copy the model again") from None


def words_of(error: Exception) -> str:
    """Return what loading failed of, in a line; where weights pickle more than numbers, what they name."""
    text = " ".join(str(error).split())
    if "Weights only load failed" in text:
        found = re.search(r"(?:GLOBAL|class|function|type) (\w\S*\.\S+)", text)
        named = f" ({found[1].rstrip('.,')})" if found else ""
        return f"its weights hold more than numbers{named}; nothing of that was run: pass such as are safetensors"
    return text[:300] or type(error).__name__


def read_tensor(folder: Path, name: str, bin_weights: bool = False) -> Any:
    """Return a tensor of the weights in a folder, by its name."""
    from safetensors import safe_open

    for path, names in weight_files(folder, bin_weights).items():
        if path.suffix == ".bin":
            import torch

            pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if name in pickled:
                return pickled[name]
            continue
        with safe_open(path, framework="pt") as tensors:
            if name in (names or tensors.keys()):
                return tensors.get_tensor(name)
    raise UserError(f"{folder} has no {name}; copy the model again")


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer's vocabulary of some kind."""
    return any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern))


def check_vocabulary(folder: Path) -> None:
    """See that a folder holds a vocabulary of some kind, and both halves of one that comes in two files.

    Raises:
        UserError: it does not; for none, transformers makes up a tokenizer that knows no text.
    """
    remedy = "save there the one that the model was trained with"
    if not has_vocabulary(folder):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json is missing): {remedy}")
    whole = any(folder.glob("tokenizer.json")) or any(folder.glob("tokenizer.*.json"))
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if len(missing) == 1 and not whole:
        raise UserError(f"{folder} has half a tokenizer ({missing[0]} is missing): {remedy}")
