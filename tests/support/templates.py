"""A chat template and a text for tests of tokens and sentences."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>.\n{{ m['content'] }}<|end|>;\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>.\n{% endif %}"
)


LONG = "one two three four five six seven. Eight nine ten eleven twelve thirteen? Fourteen fifteen sixteen!"
