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
    "GemmaConfig": {},
    "Phi3Config": {},
    "Olmo2Config": {},
    "Gemma2Config": {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig": {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "MistralConfig window": {"sliding_window": 16},
    "Gemma2Config window": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig window": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "Qwen2Config window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MORE_PACKED = {  # of which no part can be loaded alone
    "ArceeConfig": {},
    "Exaone4Config": {"sliding_window": 256},
    "Exaone4Config window": {"sliding_window": 16},
    "GlmConfig": {},
    "Glm4Config": {},
    "HeliumConfig": {},
    "HunYuanDenseV1Config": {},
    "MinistralConfig": {"sliding_window": 256},
    "Ministral3Config": {},
    "MixtralConfig": {"num_local_experts": 4},
    "MixtralConfig window": {"num_local_experts": 4, "sliding_window": 16},
    "OlmoConfig": {},
    "Olmo3Config": {"sliding_window": 256},
    "Qwen2MoeConfig": EXPERTS | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "Qwen3MoeConfig": EXPERTS | {"mlp_only_layers": [0, 3]},
    "SmolLM3Config": {},
    "StableLmConfig": {"partial_rotary_factor": 0.5},
    "Starcoder2Config": {},
}


class _Tokenizer:
    pad_token_id = PAD


class _Pairs:
    tokenizer = _Tokenizer()


def build(name):
    import transformers

    config = getattr(transformers, name.split()[0])(**COMMON | (FAMILIES | MORE_PACKED)[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "norm" not in name_:
                parameter.normal_(0, 0.3)
    return RewardModel(model, _Pairs(), name, pad=PAD, unread=PAD)


def states_of(model, **inputs):
    """The output of every block, and what the head reads."""
    found = []
    handles = [
        block.register_forward_hook(lambda m, i, o: found.append(o[0] if isinstance(o, tuple) else o))
        for block in model.base_model.layers
    ]
    with torch.inference_mode():
        last = model.base_model(**inputs, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return found, last
