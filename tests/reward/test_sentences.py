"""One sentence, cut in one place: the same in contexts, in a run's report, in an audit and in explanations."""

import json

import pyarrow as pa
import pytest
from support.made import make_pair, messages
from support.templates import CHAT_TEMPLATE, LONG

from safer_ray import schema
from safer_ray.audit.score import AuditRows
from safer_ray.features.contexts import AROUND, LONGEST, FindContexts, context_of
from safer_ray.features.explain import explain
from safer_ray.features.scoring import Features
from safer_ray.pipeline.summary import _reason_view
from safer_ray.reward.sentences import SideSentences
from safer_ray.reward.text import PairTokenizer
from safer_ray.reward.tiny_llama import train_tokenizer

IM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = IM.replace("m['content']", "m['content'] | upper")
PAIR = make_pair(
    "p", "May I, please?", "Of course. I am happy to help", "No. I will not help you with that. Ask me not."
)
FEATURES = Features([1], [2], "paper")


def tokenizer_of(template):
    tokenizer = train_tokenizer(lambda: [LONG, "<|im_start|>user assistant"], 350)
    if template is not None:
        tokenizer.chat_template = template
    return PairTokenizer(tokenizer, "plain" if template is None else "chat", 400)


@pytest.fixture(params=[None, IM, CHAT_TEMPLATE], ids=["plain", "im", "chat"])
def tokenizer(request):
    return tokenizer_of(request.param)


def codes_of(tokenizer, pair):
    """Codes in which a feature fires on every sentence end, on later ones more."""
    (tokens,) = tokenizer([pair])
    row = {"pair_id": pair["pair_id"]}
    for side in schema.SIDES:
        own = getattr(tokens, side)
        row |= {
            f"{side}_token": own.token.tolist(),
            f"{side}_end": own.end.tolist(),
            f"{side}_features": [[1]] * len(own.end),
            f"{side}_values": [[1.0 + i] for i in range(len(own.end))],
            f"{side}_fallback": own.fallback,
            f"{side}_prompt_tokens": own.n_prompt,
            f"{side}_truncated": own.truncated,
            f"{side}_reward": 0.0,
        }
    return schema.table([row], schema.CODES)


def contexts_of(tokenizer, pair):
    codes = codes_of(tokenizer, pair)
    for name in ("prompt", "chosen", "rejected"):
        codes = codes.append_column(name, pa.array([pair[name]]))
    return FindContexts(tokenizer, [1], "paper", 20)(codes).to_pylist()


def test_contexts_hold_no_markup_of_a_template(tokenizer):
    contexts = contexts_of(tokenizer, PAIR)
    assert len(contexts) >= 4
    for context in contexts:
        shown = context["before"] + context["sentence"] + context["after"]
        assert not any(mark in shown for mark in ("<|", "|>", "Human:", "Assistant:"))


def test_contexts_show_what_is_said_around_a_sentence(tokenizer):
    by_end = {(row["side"], row["sentence"]): row for row in contexts_of(tokenizer, PAIR)}
    last = by_end["rejected", "I will not help you with that."]
    assert last["before"] == "May I, please?\n\nNo. "
    assert last["after"] == " Ask me not."


def test_every_command_cuts_the_same_sentence(tokenizer):
    """A run's report told role labels and markup that an audit did not; contexts began at the sentence read before."""

    class Reward:
        pairs = tokenizer

    rows = contexts_of(tokenizer, PAIR)
    audit = AuditRows.__new__(AuditRows)
    audit.reward = Reward
    reasons = [{"feature": 1, "sign": 1, "contribution": 1.0, "side": row["side"], "end": row["end"]} for row in rows]
    texts = json.dumps({name: PAIR[name] for name in ("prompt", "chosen", "rejected")})
    by_audit = json.loads(audit._told(texts, reasons))["sentences"]
    sides = {side: SideSentences(tokenizer, PAIR, side) for side in schema.SIDES}
    by_report = [_reason_view(reason, sides[reason["side"]]).sentence.text for reason in reasons]
    (explained,) = explain(codes_of(tokenizer, PAIR), FEATURES, [PAIR], tokenizer, 5)
    by_explanation = set()
    for part in explained.sentences:
        turns = PAIR["prompt"] if part.part == "prompt" else PAIR[part.side]
        by_explanation.add(turns[part.message]["content"][part.start : part.stop])
    assert by_audit == by_report == [row["sentence"] for row in rows]
    assert by_explanation == set(by_audit)


def test_a_sentence_begins_behind_the_run_before_it_or_with_its_message(tokenizer):
    (tokens,) = tokenizer([PAIR])
    cut = SideSentences(tokenizer, PAIR, "rejected")
    found = [cut.ending_at(end) for end in tokens.rejected.end.tolist()]
    in_response = [(s.start, s.text) for s in found if s.part == "response"]
    assert in_response[-1] == (35, "Ask me not.")
    assert all(PAIR["rejected"][0]["content"][start:].startswith(text) for start, text in in_response)


def test_behind_a_content_the_sentence_is_its_last_one():
    tokenizer = tokenizer_of(IM)
    text = tokenizer.rendered_side(PAIR, "chosen")
    assert text.endswith("<|im_end|>\n")
    cut = SideSentences(tokenizer, PAIR, "chosen")
    assert cut.ending_at(len(text)) == cut.ending_at(text.index("help") + 4)
    assert cut.ending_at(len(text)).text == "I am happy to help"


def test_sentences_of_contents_that_a_template_rewrites_are_shown_as_they_were_sent():
    tokenizer = tokenizer_of(REWRITES)
    text = tokenizer.rendered_side(PAIR, "chosen")
    cut = SideSentences(tokenizer, PAIR, "chosen")
    sentence = cut.ending_at(text.index("HELP") + 4)
    assert (sentence.start, sentence.text) == (11, "I am happy to help")
    assert cut.ending_at(text.index("COURSE.") + 7).text == "Of course."
    longer = tokenizer_of(IM.replace("m['content']", "m['content'] | replace('e', 'ee') | upper"))
    text = longer.rendered_side(PAIR, "chosen")
    assert SideSentences(longer, PAIR, "chosen").ending_at(text.index("COURSEE.") + 8).text == "I am happy to help"


def test_an_unknown_end_has_no_sentence(tokenizer):
    cut = SideSentences(tokenizer, PAIR, "chosen")
    assert cut.ending_at(-1) is None
    assert context_of(cut, -1) == {"before": "", "sentence": "", "after": ""}


def test_a_context_tells_that_a_long_sentence_is_cut():
    tokenizer = tokenizer_of(None)
    long = "word " * 200 + "end"
    pair = make_pair("p", long, long, "No.")
    text = tokenizer.rendered_side(pair, "chosen")
    context = context_of(SideSentences(tokenizer, pair, "chosen"), len(text))
    assert context["sentence"] == "…" + long[-LONGEST:]
    assert context["before"] == (long + "\n\n")[-AROUND:]


def test_what_is_around_a_sentence_comes_from_all_messages():
    tokenizer = tokenizer_of(None)
    pair = {**PAIR, "prompt": [*messages("user", "One."), *messages("assistant", "Two."), *messages("user", "Three.")]}
    cut = SideSentences(tokenizer, pair, "chosen")
    text = tokenizer.rendered_side(pair, "chosen")
    sentence = cut.ending_at(text.index("Two.") + 4)
    assert (sentence.part, sentence.message) == ("prompt", 1)
    assert cut.around(sentence, 100) == ("One.\n\n", "\n\nThree.\n\nOf course. I am happy to help")
    assert cut.around(sentence, 3) == (".\n\n", "\n\nT")
