"""Tiny reward models of many types, each with its own kind of tokenizer and chat template, as folders; random weights
are large, so that one wrong token or position shows in the reward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from support import made_tokenizers as t

LARGE = 0.25
COMMON = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
KV = COMMON | {"num_key_value_heads": 2}
WINDOW = KV | {"sliding_window": 24}
GEMMA = KV | {"head_dim": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {"n_embd": 48, "n_layer": 3, "n_head": 4}
ENCODER = COMMON | {"max_position_embeddings": 514}
DEBERTA = ENCODER | {
    **{"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    **{"norm_rel_ebd": "layer_norm", "position_biased_input": False, "pooler_hidden_size": 48, "type_vocab_size": 0},
}
DEEPSEEK3 = KV | {
    **{"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_shared_experts": 1},
}
QWEN2_MOE = KV | EXPERTS | {"shared_expert_intermediate_size": 32}


class RewardModelKind(NamedTuple):
    """A model type with sizes, and what reads its texts."""

    model_type: str
    sizes: dict[str, Any]
    tokenizer: Callable[[], Any]
    names_pad: bool = True  # whether config.json does


KINDS = {
    "Llama 3": RewardModelKind("llama", KV, t.llama3),
    "Llama 3 without a pad token": RewardModelKind("llama", KV, t.llama3, names_pad=False),
    "Llama 2": RewardModelKind("llama", KV, t.llama2),
    "Llama, DeepSeek's template": RewardModelKind("llama", KV, t.deepseek),
    "Mistral": RewardModelKind("mistral", KV, t.mistral),
    "Mistral with a window": RewardModelKind("mistral", WINDOW, t.qwen),
    "Zephyr": RewardModelKind("mistral", KV, t.zephyr),
    "Mixtral": RewardModelKind("mixtral", KV | {"num_local_experts": 4}, t.mistral),
    "Qwen 2.5": RewardModelKind("qwen2", KV, lambda: t.qwen(t.QWEN25_TEMPLATE)),
    "Qwen 2 MoE": RewardModelKind("qwen2_moe", QWEN2_MOE, t.qwen),
    "Qwen 3": RewardModelKind("qwen3", KV | {"head_dim": 12}, t.qwen3),
    "Qwen 3 MoE": RewardModelKind("qwen3_moe", KV | EXPERTS | {"head_dim": 12}, t.qwen3),
    "Gemma": RewardModelKind("gemma", GEMMA, t.gemma),
    "Gemma 2": RewardModelKind("gemma2", GEMMA | {"sliding_window": 24, "query_pre_attn_scalar": 12}, t.gemma),
    "Gemma 3": RewardModelKind("gemma3_text", GEMMA | {"sliding_window": 24}, lambda: t.gemma(t.GEMMA3_TEMPLATE)),
    "Phi 3": RewardModelKind("phi3", KV, t.phi3),
    "OLMo 2": RewardModelKind("olmo2", KV, t.olmo2),
    "SmolLM 3": RewardModelKind("smollm3", KV, t.qwen3),
    "StarCoder 2, Cohere's template": RewardModelKind("starcoder2", KV, t.cohere),
    "StableLM, Granite's template": RewardModelKind("stablelm", KV | {"partial_rotary_factor": 0.5}, t.granite),
    "DeepSeek 3": RewardModelKind("deepseek_v3", DEEPSEEK3, t.deepseek),
    "GPT-2": RewardModelKind("gpt2", GPT | {"n_positions": 512}, t.gpt2, names_pad=False),
    "GPT-NeoX": RewardModelKind("gpt_neox", COMMON, t.gpt2),
    "BLOOM": RewardModelKind("bloom", {"hidden_size": 48, "n_layer": 3, "n_head": 4}, t.qwen),
    "Falcon": RewardModelKind("falcon", {**COMMON, "intermediate_size": None}, t.qwen),
    "OPT": RewardModelKind("opt", {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 48}, t.qwen),
    "BERT": RewardModelKind("bert", ENCODER, t.bert),
    "DistilBERT": RewardModelKind(
        "distilbert", {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}, lambda: t.bert(types=False)
    ),
    "ELECTRA": RewardModelKind("electra", ENCODER | {"embedding_size": 32}, t.bert),
    "ModernBERT": RewardModelKind(
        "modernbert", COMMON | {"global_attn_every_n_layers": 2, "local_attention": 16}, lambda: t.bert(types=False)
    ),
    "DeBERTa v3": RewardModelKind("deberta-v2", DEBERTA, t.deberta),
    "RoBERTa": RewardModelKind("roberta", ENCODER | {"type_vocab_size": 1}, t.roberta),
    "XLM-RoBERTa": RewardModelKind("xlm-roberta", ENCODER | {"type_vocab_size": 1}, t.xlm_roberta),
    "MPNet": RewardModelKind("mpnet", ENCODER, t.roberta),
    "Longformer": RewardModelKind("longformer", ENCODER | {"attention_window": 16}, t.roberta),
}


def save_reward_model_of(kind, directory):
    """A random model of a kind in `KINDS`, and its tokenizer, as anybody would save them."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    made = KINDS[kind]
    tokenizer = made.tokenizer()
    values = {key: value for key, value in made.sizes.items() if value is not None}
    values |= {"vocab_size": len(tokenizer) + 8, "num_labels": 1}
    values |= {
        "pad_token_id": tokenizer.pad_token_id if made.names_pad else None,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(made.model_type, **values))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, LARGE)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
