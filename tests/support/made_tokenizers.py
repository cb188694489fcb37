"""Tokenizers of every kind that reward models have, trained on the spot, and the chat templates that go with them."""

# ruff: noqa: RUF001  # characters that look like others, in the words of the families

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Sure, this is how it goes. Give the plant six hours of light, and water it when it is dry!",
    "How do I keep a plant alive? What is 12 times 345? Is that safe, and who told you so?",
    "The moon pulls the sea; the sea bulges. We call that a tide, don't we? I've seen it, you'll see.",
    "You are a careful helper. Be brief. user assistant system model Human: Assistant:",
    "First do this.\n\nThen do that.\n\n\nNow it is done.\n- one\n- two\n\tthree  four   five\n",
    "<think>\nThe question is a simple one. So is its answer.\n</think>\n\nIt is 4,140.",
    "系统会先检查。然后再回答！今天的天气很好，我们去公园。",
    "पहले पानी दें। फिर धूप में रखें। اسقِ النبات أولاً. هل هو بخير؟ Ça va très bien, déjà vu, naïve.",
]

# Words, as each family cuts them before bytes are merged.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def train(tokenizer, trainer):
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_bpe(specials, words=LLAMA3, digits=False, normalizer=None, size=500):
    """Bytes, and words that carry the blank before them: GPT-2, Llama 3, Qwen, Cohere, DeepSeek, OLMo 2."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )


def piece_bpe(specials, boundary="prepend", size=600):
    """SentencePiece's BPE with bytes for what it does not know. `boundary`: where a text begins with one.

    prepend: before every stretch of text, so also behind a special token (Llama 2); first: before the first (Mistral);
    never: Gemma.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=pieces, show_progress=False)
    words = pre_tokenizers.Split("▁", "merged_with_next")
    replace = normalizers.Replace(" ", "▁")
    if boundary == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        train(tokenizer, trainer)
    else:
        steps = [normalizers.Prepend("▁"), replace] if boundary == "prepend" else [replace]
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(steps), words
        train(tokenizer, trainer)
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram(specials, unknown, size=400):
    """SentencePiece's unigrams, and nothing for what they do not know: T5, XLM-R, DeBERTa v3."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(specials), unk_token=unknown, show_progress=False, n_sub_iterations=1
    )
    return train(tokenizer, trainer)


def wordpiece(size=500):
    """BERT's, uncased."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return train(tokenizer, trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False))


def around(tokenizer, single, pair=None):
    """The special tokens that a tokenizer puts around a text, and around two."""
    named = {token for token in f"{single} {pair or ''}".replace(":1", "").split() if not token.startswith("$")}
    ids = [(token, tokenizer.token_to_id(token)) for token in sorted(named)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return tokenizer


def fast(tokenizer, template=None, **names):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


# Chat templates, in the words of the models' own


LLAMA2_TEMPLATE = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role']"
    " + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25_TEMPLATE = (  # a system message of its own where there is none
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helper.<|im_end|>\n' }}{% endif %}" + CHATML_TEMPLATE
)
QWEN3_TEMPLATE = (  # thoughts of former turns are left out
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- else %}{%- set content = m.content %}"
    "{%- set think = '' %}{%- if '</think>' in m.content %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set think = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or think) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + think.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3_TEMPLATE = (  # the system's message begins the user's first
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for m in turns -%}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + (first if loop.first else '') }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
ZEPHYR_TEMPLATE = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
COHERE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
GRANITE_TEMPLATE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content']"
    " + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
OLMO2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}{% else %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK_TEMPLATE = (  # thoughts are left out of every turn
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


# Tokenizers with their templates


def llama2(template=LLAMA2_TEMPLATE, boundary="prepend"):
    tokenizer = around(piece_bpe(["<unk>", "<s>", "</s>", "<pad>"], boundary), "<s> $A", "<s> $A <s> $B")
    return fast(tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def mistral():
    return llama2(MISTRAL_TEMPLATE, boundary="first")


def zephyr():
    """Padded with EOS, as it is."""
    tokenizer = llama2(ZEPHYR_TEMPLATE, boundary="first")
    tokenizer.pad_token = "</s>"
    return tokenizer


def phi3():
    """Llama 2's pieces, with markers that swallow the whitespace behind them."""
    tokenizer = piece_bpe(["<unk>", "<s>", "</s>", "<|endoftext|>"])
    markers = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer.add_special_tokens([AddedToken(marker, rstrip=True, special=True) for marker in markers])
    return fast(tokenizer, PHI3_TEMPLATE, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def llama3():
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = around(byte_bpe([*specials, "<|finetune_right_pad_id|>"]), "<|begin_of_text|> $A")
    names = {"bos_token": specials[0], "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    return fast(tokenizer, LLAMA3_TEMPLATE, **names)


def qwen(template=CHATML_TEMPLATE):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_bpe(specials, QWEN, normalizer=normalizers.NFC())
    return fast(tokenizer, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen3():
    tokenizer = qwen(QWEN3_TEMPLATE)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def gemma(template=GEMMA_TEMPLATE):
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = around(piece_bpe(specials, "never"), "<bos> $A", "<bos> $A <bos> $B")
    return fast(
        tokenizer, template, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )  # fmt: skip


def cohere():
    specials = ["<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]
    specials += ["<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    tokenizer = around(byte_bpe(specials, GPT2, digits=True, normalizer=normalizers.NFC()), "<BOS_TOKEN> $A")
    return fast(tokenizer, COHERE_TEMPLATE, bos_token="<BOS_TOKEN>", eos_token=specials[4], pad_token="<PAD>")


def granite():
    specials = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>"]
    tokenizer = byte_bpe(specials, GPT2, digits=True)
    return fast(tokenizer, GRANITE_TEMPLATE, eos_token="<|end_of_text|>", pad_token="<|pad|>")


def olmo2():
    tokenizer = byte_bpe(["<|endoftext|>", "<|pad|>"])
    return fast(
        tokenizer, OLMO2_TEMPLATE, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )  # fmt: skip


def deepseek():
    specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    tokenizer = around(byte_bpe(specials), f"{specials[0]} $A")
    return fast(tokenizer, DEEPSEEK_TEMPLATE, bos_token=specials[0], eos_token=specials[1], pad_token=specials[1])


def gpt2(template=CHATML_TEMPLATE):
    """No pad token; markers of its template are no special tokens."""
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return fast(byte_bpe(["<|endoftext|>"], GPT2), template, **end)


def bert(tokenizer=None, names=("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"), types=True):
    """Pairs of texts, told apart by types."""
    tokenizer = around(tokenizer or wordpiece(), "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    keys = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    inputs = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return fast(tokenizer, None, **dict(zip(keys, names, strict=True)), model_input_names=inputs)


def deberta():
    return bert(unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], "[UNK]"))


def roberta(pieces=None):
    """Pairs of texts with two separators between."""
    tokenizer = pieces or byte_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], GPT2)
    tokenizer = around(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    return fast(tokenizer, None, **names, unk_token="<unk>", mask_token="<mask>")


def xlm_roberta():
    return roberta(unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<unk>"))
