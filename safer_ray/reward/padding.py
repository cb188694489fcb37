"""The pad token: which id fills up a batch, and which one a model trained here is exported with.

transformers reads the reward of a decoder at the last token that is not its config's pad token. Where that token also
ends texts (pad = EOS), the reward is read one token earlier than it was trained at, or than other engines read it.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from safer_ray.errors import UserError
from safer_ray.reward.model import RewardModel
from safer_ray.reward.positions import counts_positions_from_pad
from safer_ray.reward.text import PairTokenizer

log = logging.getLogger(__name__)
NEW = "<|pad|>"
# In brackets: a word of the vocabulary (`pad`, `reserved`) would be cut out of texts once it is a special token.
NAMED_PAD = re.compile(r"[<\[({]\W*pad(ding)?\W*[>\])}]", re.IGNORECASE)  # <pad>, [PAD], <|padding|>
UNUSED = re.compile(
    r"[<\[({]\W*(reserved|unused|finetune_right_pad|extra_id|dummy|placeholder).*[>\])}]", re.IGNORECASE
)
RARE = "\u0d9e\u1c5f\u2603\U00013080"  # characters of scripts that hardly any vocabulary has: unknown, or bytes
TALK = {
    "pair_id": "-",
    "prompt": [{"role": "user", "content": "a"}],
    "chosen": [{"role": "assistant", "content": "b"}],
    "rejected": [{"role": "assistant", "content": "c"}],
}


def filler(config: Any, tokenizer: Any, rows: int) -> int:
    """Return the id that fills up a batch of a model whose embedding has so many rows: its own pad token where it has
    one, else any; what is filled up is masked, and no reward is read from it."""
    for pad in (config.get_text_config().pad_token_id, tokenizer.pad_token_id):
        if pad is not None and 0 <= pad < rows:
            return int(pad)
    return 0


def with_named_pad(reward: RewardModel) -> RewardModel:
    """Return a model that is to be trained, with one pad token that ends no text, in its config and its tokenizer: so
    whatever reads the exported model reads it where it was trained.

    It is the base's own where that will do, else a reserved token or the unknown one, else a new one in a new row of
    the embedding.

    Raises:
        UserError: there is none, and the embedding cannot be enlarged.
    """
    tokenizer, config, own = reward.pairs.tokenizer, reward.model.config.get_text_config(), reward.unread
    tokenizer.padding_side = "right"  # behind padding, tokens would have other positions
    if counts_positions_from_pad(config):  # an encoder, which reads its first token
        return reward
    vocabulary, written = tokenizer.get_vocab(), _written(reward.pairs)
    token = next((token for token in _candidates(tokenizer, own) if vocabulary[token] not in written), None)
    if token is None:
        token = _new_token(reward.model, tokenizer, reward.name)
    pad = tokenizer.get_vocab()[token]
    if pad != own:
        why = "it has none" if own is None else f"its own ({own}) ends texts, or is unknown to its tokenizer"
        log.info("%s: a model trained on it has the pad token %r (%d), since %s", reward.name, token, pad, why)
    tokenizer.pad_token = token
    config.pad_token_id = pad
    return replace(reward, pad=pad, unread=pad)


def _written(pairs: PairTokenizer) -> set[int]:
    """Return tokens that texts are known to hold: those of a short talk, and those that stand for beginning and end."""
    tokenizer = pairs.tokenizer
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    ids.update(tokenizer(RARE)["input_ids"])
    for tokens in pairs.read([TALK]):  # a template that refuses so short a talk refuses pairs by name, later
        if not isinstance(tokens, str):
            ids.update(tokens.chosen.ids.tolist(), tokens.rejected.ids.tolist())
    return ids - {None}


def _candidates(tokenizer: Any, own: int | None) -> Iterator[str]:
    vocabulary = tokenizer.get_vocab()
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    yield from (token for token in by_id if vocabulary[token] == own)
    if tokenizer.pad_token in vocabulary:
        yield tokenizer.pad_token
    yield from (token for token in by_id if NAMED_PAD.fullmatch(token))
    yield from (token for token in reversed(by_id) if UNUSED.fullmatch(token))  # from the last: the first ones get uses
    if tokenizer.unk_token in vocabulary:
        yield tokenizer.unk_token


def _new_token(model: Any, tokenizer: Any, name: str) -> str:
    token = NEW
    while token in tokenizer.get_vocab():
        token = f"<{token}>"
    tokenizer.add_special_tokens({"pad_token": token})
    needed = tokenizer.get_vocab()[token] + 1
    try:
        if needed > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[needed - 1] = 0
    except Exception as error:  # noqa: BLE001  # code of a checkpoint's own may raise anything
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} has no pad token but such as end texts, and its embedding cannot be enlarged ({first}); give its "
            "tokenizer and its config.json a pad token that is nothing else"
        ) from None
    return token
