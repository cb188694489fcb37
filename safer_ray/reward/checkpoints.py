"""Reward models on disk: find, load, check, export."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from safer_ray.config.head import HeadConfig
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.config.sections import RewardConfig, TinyLlamaConfig
from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.reward.bases import check_files, checkpoint_of, folder_of, resolve_base
from safer_ray.reward.by_length import reads_otherwise_past
from safer_ray.reward.dropout import disable_dropout
from safer_ray.reward.folder import ADAPTER_FOLDER, read_tensor
from safer_ray.reward.forward import check_padding
from safer_ray.reward.heads import begin_anew, chosen, of_outputs, open_with_head, own_outputs, tell_other_outputs
from safer_ray.reward.loaded import check_loaded
from safer_ray.reward.lora import merged, save_adapter
from safer_ray.reward.mapped import head_in_float32, mapped_dtype
from safer_ray.reward.mixed import keep_exact
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import how_pairs_run, smallest_window
from safer_ray.reward.padding import filler, with_named_pad
from safer_ray.reward.parts import check_blocks, load_part, splits_up
from safer_ray.reward.positions import longest_sequence
from safer_ray.reward.precision import has_gpu, precision_of, tell_emulated
from safer_ray.reward.pretrained import (
    Checkpoint,
    is_mixed,
    open_classifier,
    open_config,
    open_tokenizer,
    runs_own_code,
)
from safer_ray.reward.reading import SETTINGS, HowItReads, asked_for, how_it_reads, pair_tokenizer, settings_of
from safer_ray.reward.text import PairTokenizer
from safer_ray.reward.tiny_llama import make_tiny_llama
from safer_ray.storage.work import WHOLE, Part

log = logging.getLogger(__name__)
TRIED: dict[str, Any] = {
    "pair_id": "tried",
    "prompt": [{"role": "user", "content": "Hello, what can I do for you today?"}],
    "chosen": [{"role": "assistant", "content": "Tell me a story."}],
    "rejected": [{"role": "assistant", "content": "Nothing."}],
}


def quiet_transformers() -> None:
    """Warnings about freshly made heads and the like are expected here; errors still show. No bot converts weights."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which warns otherwise
    # Of a name on the hub without safetensors, transformers has a bot convert the weights, and reads its proposal.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _load_pretrained(
    base: str,
    dtype: torch.dtype,
    reading: Reading,
    *,
    whole: bool,
    blocks: int | None = None,
    in_files: bool = False,
    runs: bool = False,
) -> tuple[Any, Any]:
    """A model, of its first `blocks` alone if they are given, and its tokenizer; `whole` refuses a checkpoint that
    lacks the reward head's weights, too. `in_files` leaves weights in their files where they can stay there;
    they cannot where the model `runs` before it is cut."""
    quiet_transformers()
    checkpoint, head = checkpoint_of(base, reading), reading.head
    check_files(checkpoint)
    tokenizer = open_tokenizer(checkpoint)
    config = open_config(checkpoint)
    check_blocks(base, config, blocks)
    if runs_own_code(config):  # it may read its config's number of outputs as it likes
        model, found = open_classifier(checkpoint, None if whole or head is not None else 1, dtype=dtype)
        tell_other_outputs(base, model, found, whole=whole)
        check_loaded(base, model, found, whole=whole)
        return model, tokenizer
    kept = mapped_dtype(checkpoint, config, runs=runs) if in_files else dtype
    opened = partial(open_classifier, checkpoint, dtype=kept, blocks=blocks)
    model = open_with_head(
        base,
        opened if kept == dtype else head_in_float32(opened),
        lambda name: read_tensor(folder_of(checkpoint), name, checkpoint.bin_weights),
        head,
        outputs=int(config.num_labels),
        whole=whole,
    )
    return model, tokenizer


def _with_outputs(reward: RewardModel, head: HeadConfig | None) -> RewardModel:
    """Return a model whose code is its checkpoint's own with the weights of its outputs, once it has read a short pair.

    Raises:
        UserError: it fails there, gives no reward, or several that `head` does not choose from.
    """
    if not runs_own_code(reward.model.config):
        return reward
    ids = torch.from_numpy(reward.pairs([TRIED])[0].chosen.ids)[None].to(reward.device)
    try:
        with torch.inference_mode():
            given = reward.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # code of a checkpoint's own may raise anything
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{reward.name}: its own code fails on a short pair: {words}") from error
    values = own_outputs(reward.name, given)
    outputs = 1 if values.ndim == 1 else int(values.shape[-1])
    if head is None and outputs > 1:
        raise UserError(f"{reward.name}: {of_outputs(outputs)}")
    weights = chosen(reward.name, head, outputs) if head is not None else None
    return replace(reward, weights=weights if values.ndim > 1 else None)


def _limit(config: Any, max_length: int) -> int:
    """The longest sequence: what was asked for, or what the positions of the model in `config` allow."""
    positions = longest_sequence(config)
    return max_length if positions is None else min(max_length, positions)


def _wrap(model: Any, tokenizer: Any, how: HowItReads, max_length: int, name: str, before: int = 0) -> RewardModel:
    pairs = pair_tokenizer(tokenizer, how, _limit(model.config, max_length), name)
    # By the greatest id, not by the size: vocabularies have holes.
    largest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows and not before:  # a later part looks nothing up
        raise UserError(
            f"{name}: the tokenizer has ids up to {largest}, the embedding only {rows} rows; "
            "use the tokenizer that belongs to the model, or resize the embedding"
        )
    text = model.config.get_text_config()
    pad, unread = filler(model.config, tokenizer, rows), text.pad_token_id
    if unread is None:
        text.pad_token_id = pad  # without one, transformers runs no two sequences at once
    changes = reads_otherwise_past(model.config)
    pads = changes is None or pairs.limit <= changes
    if not (pads or before):  # told once, by the first part
        log.warning(
            "%s: a sequence of more than %s tokens changes how it reads all of its batch, so its sequences run one by "
            "one, which takes longer; with a max_length of %s they need not",
            name,
            changes,
            changes,
        )
    return RewardModel(model, pairs, name, pad=pad, pads=pads, unread=unread)


def new_reward_model(config: RewardConfig, texts: Callable[[], Any], *, in_files: bool = False) -> RewardModel:
    """The model that training starts from; `texts` yields the training texts, for a tokenizer made on the spot.

    Of a base with several outputs, training begins with what `config.head` makes of them, or else with a new head.
    With `in_files`, weights of a lower precision than float32 have it still, and stay in their files: see `mapped`.

    Raises:
        UserError: no such model, or a tokenizer that does not fit it.
    """
    if isinstance(config.base, TinyLlamaConfig):
        model, tokenizer = make_tiny_llama(config.base, texts, config.seed)
        return _wrap(model, tokenizer, HowItReads("plain"), config.max_length, "tiny llama")
    torch.manual_seed(config.seed)
    model, tokenizer = _load_pretrained(
        config.base,
        torch.float32,
        config,
        whole=False,
        blocks=config.blocks,
        in_files=in_files,
        runs=config.frozen_layers > 0,
    )
    if config.new_head:
        begin_anew(config.base, model)
    if config.disable_dropout:
        disable_dropout(model)
    how, longest = asked_for(config, made_here=True), config.max_length
    if config.use is not None:  # as the finished model reads
        source = Path(resolve_base(config.use)[0])
        how = how_it_reads(source if source.exists() else folder_of(checkpoint_of(config.use, config)), config)
        longest = min(longest, how.max_length)
    wrapped = _wrap(model, tokenizer, how, longest, config.base)
    return check_padding(with_named_pad(_with_outputs(wrapped, config.head)))


def load_reward_model(
    directory: Path,
    *,
    layers: int | None = None,
    part: Part = WHOLE,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    reading: Reading = AS_IT_COMES,
) -> RewardModel:
    """A reward model from a Hugging Face directory, ours or anyone's; on the GPU where this process has one.

    With `layers`, only the first ones are loaded where the family is known to allow it: activations, but no rewards.
    With `part`, only that range of them. Of a model with several outputs, `reading.head` chooses the reward. Without
    `dtype` it computes in that of the bundle that it lies in, or as `reading` says; its head always in float32.

    Raises:
        UserError: missing or corrupt files, no reward head, more than one output, a tokenizer that does not fit, or a
            model that cannot be cut into so many parts.
    """
    before, window = 0, None
    checkpoint = checkpoint_of(str(directory), reading)
    quiet_transformers()
    how = how_it_reads(directory, reading)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        precision = precision_of(directory, reading, lambda: device.type == "cuda" and has_gpu())
        dtype = getattr(torch, precision)
        if device.type == "cpu":
            tell_emulated(directory.name, precision)
    reading = reading.model_copy(update={"head": how.head})
    config = open_config(checkpoint)
    model_is_whole = part.of == 1 and not (layers is not None and _splits_up(checkpoint, config, layers))
    if not model_is_whole:
        model, tokenizer, before, window = _load_range(directory, checkpoint, layers, part, dtype, how.head)
    else:
        model, tokenizer = _load_pretrained(str(directory), dtype, reading, whole=True)
    wrapped = _wrap(model, tokenizer, how, how.max_length, directory.name, before)
    unread = how.pad if how.pad is not None else config.get_text_config().pad_token_id
    wrapped = replace(wrapped, frozen_layers=how.frozen_layers, before=before, window=window, unread=unread)
    wrapped.model.eval().to(device)
    if is_mixed(config, dtype):
        keep_exact(wrapped)
    wrapped = _with_outputs(wrapped, how.head)
    if model_is_whole:
        wrapped = check_padding(wrapped)
    if not before and wrapped.pads:  # else it is told that they run one by one
        log.info("%s: %s", directory.name, how_pairs_run(wrapped.model.config))
    return wrapped


def _splits_up(checkpoint: Checkpoint, config: Any, layers: int) -> bool:
    here = checkpoint.is_plain and any(Path(checkpoint.path).glob("*.safetensors"))
    return here and splits_up(config) and 1 <= layers <= config.num_hidden_layers


def _load_range(
    directory: Path,
    checkpoint: Checkpoint,
    layers: int | None,
    part: Part,
    dtype: torch.dtype,
    head: HeadConfig | None,
) -> tuple[Any, Any, int, int | None]:
    """A part of the first layers, or of all: the model, its tokenizer, how many blocks are before it, and how far back
    the shortest-sighted one of the whole model looks, where others decide with this part what is packed."""
    quiet_transformers()
    config = open_config(checkpoint)
    count = layers or int(config.num_hidden_layers)
    start, stop = part.blocks(count)
    check_files(checkpoint)
    if not checkpoint.is_plain:
        raise UserError(
            f"{directory}: only a whole model in safetensors is cut into parts; use reward.shards: 1, or save it as one"
        )
    if part.of > count:
        raise UserError(f"{directory}: {count} blocks cannot be cut into {part.of} parts; lower reward.shards")
    try:
        trusted = checkpoint.trust_remote_code
        model = load_part(directory, start, stop, dtype, trust_remote_code=trusted, head=head)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load layers of a reward model from {directory}: {first}") from None
    return model, open_tokenizer(checkpoint), start, smallest_window(config) if part.of > 1 else None


def hidden_size(directory: Path, reading: Reading = AS_IT_COMES) -> int:
    """Width of the hidden states of the model in `directory`, from its config alone."""
    return int(open_config(checkpoint_of(str(directory), reading)).get_text_config().hidden_size)


def layer_count(base: str, reading: Reading = AS_IT_COMES, *, blocks: int | None = None) -> int:
    """Number of blocks of a model trained from a checkpoint, of which the first `blocks` are kept (None: all); read in
    its config, beside which its weights are seen to lie.

    Raises:
        UserError: there is no model, it cannot be read, or has no such blocks.
    """
    checkpoint = checkpoint_of(base, reading)
    check_files(checkpoint)
    return check_blocks(base, open_config(checkpoint), blocks)


def load_pair_tokenizer(directory: Path, reading: Reading = AS_IT_COMES) -> PairTokenizer:
    """Return how the model in `directory` reads pairs, without its weights.

    Raises:
        UserError: no model there, or one that cannot be read.
    """
    quiet_transformers()
    checkpoint = checkpoint_of(str(directory), reading)
    tokenizer, how = open_tokenizer(checkpoint), how_it_reads(directory, reading)
    return pair_tokenizer(tokenizer, how, _limit(open_config(checkpoint), how.max_length), directory.name)


def save_reward_model(reward: RewardModel, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """A directory that `AutoModelForSequenceClassification.from_pretrained` opens.

    `weights` are whole tensors by name where the model's own are partitioned over a process group. What is trained
    beside a model (LoRA) is merged into them, and lies apart in the folder `adapter`, too.

    Raises:
        SaferError: the disk is full.
    """
    settings = settings_of(reward.pairs) | {"frozen_layers": reward.frozen_layers}
    if reward.weights is not None:
        settings["head"] = {"weights": reward.weights}
    text = reward.model.config.get_text_config()
    running, text.pad_token_id = text.pad_token_id, reward.unread  # behind which its rewards are read
    try:
        _save(reward, directory, weights, settings)
    finally:
        text.pad_token_id = running


def _save(reward: RewardModel, directory: Path, weights: dict[str, Tensor] | None, settings: dict[str, Any]) -> None:
    if reward.pairs.text is not None:  # so that other engines read what it was trained on
        reward.pairs.tokenizer.chat_template = reward.pairs.text
    with explain_disk_errors(directory):
        if reward.adapter is not None:
            weights = reward.model.state_dict() if weights is None else weights
            if not reward.is_cut:  # else it would open on the whole base, and read another model
                save_adapter(reward, directory / ADAPTER_FOLDER, weights)
                pad = {"pad": reward.unread} if reward.unread is not None else {}
                (directory / ADAPTER_FOLDER / SETTINGS).write_text(json.dumps(settings | pad) + "\n", encoding="utf-8")
            weights = merged(reward.model, weights)
        reward.model.save_pretrained(directory, state_dict=weights, safe_serialization=True)
        reward.pairs.tokenizer.save_pretrained(directory)
        (directory / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")


def keep_head(directory: Path, head: dict[str, Any]) -> None:
    """Say in a folder of a model itself which of its outputs are its reward, for whoever opens it without saying so."""
    file = directory / SETTINGS
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(settings | {"head": head}) + "\n", encoding="utf-8")
