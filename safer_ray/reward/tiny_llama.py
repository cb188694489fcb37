"""A Llama classifier made on the spot, with a tokenizer trained on the texts at hand."""

from collections.abc import Callable
from typing import Any

import torch

from safer_ray.config.sections import TinyLlamaConfig


def train_tokenizer(texts: Callable[[], Any], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of `vocabulary` ids, with a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>")


def make_tiny_llama(config: TinyLlamaConfig, texts: Callable[[], Any], seed: int) -> tuple[Any, Any]:
    """A random Llama classifier and a tokenizer trained on `texts`."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = train_tokenizer(texts, config.vocabulary)
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.positions,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
            num_labels=1,  # type: ignore[call-arg]
            tie_word_embeddings=False,
        )
    )
    return model, tokenizer
