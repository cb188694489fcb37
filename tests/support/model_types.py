"""Tiny reward models of several model types, with random weights large enough to tell tokens apart."""

import torch

from safer_ray.reward.model import RewardModel

PAD = 0


COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_labels": 1,
    "pad_token_id": PAD,
}


FAMILIES = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": None},
    "Qwen2Config": {},
    "Qwen3Config": {},
    "Gemma2Config": {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig": {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "MistralConfig window": {"sliding_window": 16},
    "Gemma2Config window": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig window": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "Qwen2Config window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
}


class _Tokenizer:
    pad_token_id = PAD


class _Pairs:
    tokenizer = _Tokenizer()


def build(name):
    import transformers

    config = getattr(transformers, name.split()[0])(**COMMON | FAMILIES[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "norm" not in name_:
                parameter.normal_(0, 0.3)
    return RewardModel(model, _Pairs(), name, pad=PAD, unread=PAD)
