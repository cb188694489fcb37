"""How a model's text is made: chat templates, roles, dates and files, and what cannot be put to a model."""

import json
import re
import shutil

import pytest
from support.made import make_pair, make_pairs, messages
from support.templates import CHAT_TEMPLATE, LONG
from transformers import AutoTokenizer

from safer_ray.config.reading import Reading
from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.features.passes import RewardPairs
from safer_ray.formats.messages import as_messages, fields_of
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import load_pair_tokenizer, new_reward_model, save_reward_model
from safer_ray.reward.reading import SETTINGS
from safer_ray.reward.templates import ALIASES
from safer_ray.reward.text import PairTokenizer
from safer_ray.reward.tiny_llama import train_tokenizer
from safer_ray.storage.artifacts import Artifact, Place, read_parts

KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}<{{ m['role'] }}>{{ m['content'] }}"
    "<end>{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}<end>{% endfor %}"
)
TODAY = "[{{ strftime_now('%d %b %Y') }}]" + CHAT_TEMPLATE
THINKS = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% if loop.last %}<think>"
    "{% if parts | length > 1 %}{{ parts[0].split('<think>')[-1] | trim }}{% endif %}</think>{% endif %}"
    "{{ parts[-1] | trim }}{% else %}{{ m['content'] }}{% endif %}<end>{% endfor %}"
)


def reads(template, **options):
    tokenizer = train_tokenizer(lambda: [LONG, "<user> <assistant> <end> <think> </think>"], 400)
    tokenizer.chat_template = template
    return PairTokenizer(tokenizer, "chat", 400, **options)


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def pair_of(*turns, chosen="Yes. Fine.", rejected="No."):
    return make_pair("a", "", chosen, rejected) | {"prompt": talk(*turns)}


def own_ids(pairs, conversation, **options):
    return list(
        pairs.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)["input_ids"]
    )


TALKS = {
    "one turn": pair_of(("user", "Hello. Are you there?")),
    "turns": pair_of(("user", "Hello."), ("assistant", "Hi! What is it?"), ("user", "Are you there?")),
    "newline first": pair_of(("user", "Hello."), chosen="\n\nYes. Fine.", rejected="\nNo."),
    "blanks around": pair_of(("user", "  Hello.  \n"), chosen="  Yes. ", rejected=" No.\n\n"),
    "thoughts": pair_of(("user", "Hello."), chosen="<think>Hm. Well.</think>\n\nYes.", rejected="<think></think>No."),
    "earlier thoughts": pair_of(("user", "Hello."), ("assistant", "<think>Hm.</think>Hi."), ("user", "And?")),
    "other scripts": pair_of(("user", "你好。\u0939\u093f?"), chosen="Ça va. 👍🏽!", rejected="い."),
    "markup inside": pair_of(("user", "Say <end> and <assistant>!"), chosen="<end>. <user>", rejected="No."),
    "no prompt": pair_of(),
}


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, KNOWN_ROLES, ALTERNATING, THINKS], ids=["all", "known", "strict", "thinks"]
)
def test_tokens_are_those_of_the_whole_conversation(template, name):
    pairs, pair = reads(template), TALKS[name]
    (found,) = pairs.read([pair])
    if template == ALTERNATING and not pair["prompt"]:
        assert "roles must alternate" in found
        return
    for side in ("chosen", "rejected"):
        own = getattr(found, side)
        assert own.ids.tolist() == own_ids(pairs, [*pair["prompt"], *pair[side]])
        before = pairs.tokenizer.decode(own.ids[: own.n_prompt])
        said = pairs.tokenizer.decode(own.ids[own.n_prompt :])
        assert pair[side][0]["content"].split("</think>")[-1].strip() in said
        if name == "turns":
            assert "Are you there?" in before


def test_sentences_of_a_thought_are_read():
    (found,) = reads(THINKS).read(
        [pair_of(("user", "Hi there."), chosen="<think>First this, and that. Then so.</think>Yes.")]
    )
    pairs = reads(THINKS)
    text = pairs.rendered_side(
        pair_of(("user", "Hi there."), chosen="<think>First this, and that. Then so.</think>Yes."), "chosen"
    )
    assert any(text[:end].endswith("that.") for end in found.chosen.end.tolist())


@pytest.mark.parametrize("role", ["human", "Human", "gpt", "model"])
def test_other_names_of_roles_are_known(role):
    same = ALIASES[role.lower()]
    turns = [("user", "Hello."), ("assistant", "Hi."), ("user", "And?")]
    renamed = [(role if name == same else name, content) for name, content in turns]
    pairs = reads(KNOWN_ROLES)
    (one,), (other,) = pairs.read([pair_of(*turns)]), pairs.read([pair_of(*renamed)])
    assert one.chosen.ids.tolist() == other.chosen.ids.tolist()
    theirs = reads(KNOWN_ROLES.replace("'system'", f"'{role}'"))
    assert f"<{role}>" in theirs.rendered_side(pair_of((role, "Hello.")), "chosen")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_an_unknown_role_is_refused_by_name(template):
    pairs = PairTokenizer(reads(CHAT_TEMPLATE).tokenizer, template, 400)
    bad, good = pairs.read([pair_of(("observer", "Hello.")), pair_of(("user", "Hello."))])
    assert bad.startswith(
        "message 1 has the role 'observer', which is not known; wanted one of system, user, assistant"
    )
    assert good.pair_id == "a"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (KNOWN_ROLES, "the chat template leaves out message 2 of 3, of role 'tool'"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "writes 2 times message 1 of 3"),
        ("{% for m in messages | reverse %}{{ m['content'] }};{% endfor %}", "puts the messages into another order"),
        (ALTERNATING, "the chat template refuses it: roles must alternate"),
        ("{{ messages[0]['no'].such }}", "the chat template refuses it: "),
    ],
)
def test_a_conversation_that_a_template_does_not_write_is_refused(template, told):
    bad, good = reads(template).read([pair_of(("user", "Hello."), ("tool", "Sunny.")), pair_of(("user", "Hello."))])
    assert told in bad
    assert template in (KNOWN_ROLES, ALTERNATING) or isinstance(good, str)
    with pytest.raises(UserError, match="pair 'a': "):
        reads(template)([pair_of(("user", "Hello."), ("tool", "Sunny."))])


def test_a_system_message_that_a_template_refuses_goes_before_the_users():
    turns = [("system", "Be brief."), ("user", "Hello.")]
    (refused,) = reads(ALTERNATING).read([pair_of(*turns)])
    assert "System role not supported" in refused
    pairs = reads(ALTERNATING, fold=True)
    (found,) = pairs.read([pair_of(*turns)])
    assert found.chosen.ids.tolist() == own_ids(
        pairs, talk(("user", "Be brief.\n\nHello."), ("assistant", "Yes. Fine."))
    )
    text = pairs.render(talk(*turns), messages("assistant", "Yes."))
    assert [text.text[span.start : span.stop] for span in text.spans] == ["Be brief.", "Hello.", "Yes."]


def test_the_day_is_the_one_that_is_said_whenever_it_runs(tmp_path, reward_dir, caplog):
    shutil.copytree(reward_dir, tmp_path / "model")
    (tmp_path / "model" / SETTINGS).unlink()
    (tmp_path / "model" / "chat_template.jinja").write_text(TODAY)
    pairs = load_pair_tokenizer(tmp_path / "model")
    assert "writes today's date; 2024-07-26 is taken" in caplog.text
    assert pairs.rendered_side(TALKS["one turn"], "chosen").startswith("[26 Jul 2024]")
    said = load_pair_tokenizer(tmp_path / "model", Reading(template_arguments={"date": "2025-01-02"}))
    assert said.rendered_side(TALKS["one turn"], "chosen").startswith("[02 Jan 2025]")
    trained = new_reward_model(RewardConfig(base=str(tmp_path / "model")), lambda: [])
    save_reward_model(trained, tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / SETTINGS).read_text())["arguments"] == {"date": "2024-07-26"}
    with pytest.raises(UserError, match=r"was made to be read with arguments .*2024-07-26.*leave it out"):
        load_pair_tokenizer(tmp_path / "trained", Reading(template_arguments={"date": "2025-01-02"}))


@pytest.mark.parametrize(
    ("template", "arguments", "told"),
    [
        (CHAT_TEMPLATE, {"enable_thinking": False}, "reads no argument 'enable_thinking'"),
        (CHAT_TEMPLATE, {"messages": "x"}, "reads no argument 'messages'"),
        (CHAT_TEMPLATE, {"date": "2024-01-01"}, "reads no date"),
        ("{% set f = '%d' %}{{ strftime_now(f) }}" + CHAT_TEMPLATE, {}, "cannot be fixed to one day"),
        ("{% set f = strftime_now %}{{ f('%d') }}" + CHAT_TEMPLATE, {}, "cannot be fixed to one day"),
    ],
)
def test_arguments_that_a_template_does_not_read_are_refused(template, arguments, told):
    with pytest.raises(UserError, match=told):
        reads(template, arguments=arguments).read([TALKS["one turn"]])


def test_arguments_reach_the_template():
    template = "{% if loud %}!{% endif %}" + CHAT_TEMPLATE
    pairs = reads(template, arguments={"loud": True})
    assert pairs.rendered_side(TALKS["one turn"], "chosen").startswith("!")


def test_a_template_in_a_file_is_read_and_goes_with_the_model(tmp_path, reward_dir):
    file = tmp_path / "own.jinja"
    file.write_text(KNOWN_ROLES)
    reading = Reading(template=str(file))
    shutil.copytree(reward_dir, tmp_path / "model")
    (tmp_path / "model" / SETTINGS).unlink()
    pairs = load_pair_tokenizer(tmp_path / "model", reading)
    assert pairs.rendered_side(TALKS["one turn"], "rejected") == "<user>Hello. Are you there?<end><assistant>No.<end>"
    trained = new_reward_model(RewardConfig(base=str(tmp_path / "model"), template=str(file)), lambda: [])
    save_reward_model(trained, tmp_path / "trained")
    assert load_pair_tokenizer(tmp_path / "trained").chat.text == KNOWN_ROLES
    (own,) = load_pair_tokenizer(tmp_path / "trained").read([TALKS["one turn"]])
    plain = AutoTokenizer.from_pretrained(tmp_path / "trained")  # as other engines open it
    talk_of = [*TALKS["one turn"]["prompt"], *TALKS["one turn"]["chosen"]]
    assert own.chosen.ids.tolist() == plain.apply_chat_template(talk_of, tokenize=True, return_dict=True)["input_ids"]
    before = reading.asked()
    file.write_text(CHAT_TEMPLATE)
    assert reading.asked() != before  # recipes hold what it says, not its name
    with pytest.raises(UserError, match="cannot read the template"):
        load_pair_tokenizer(tmp_path / "model", Reading(template="no/such.jinja"))


def test_texts_one_behind_the_other(reward_dir):
    pairs = PairTokenizer(load_pair_tokenizer(reward_dir).tokenizer, "raw", 100)
    assert pairs.rendered_side(pair_of(("user", "Q. "), chosen="A."), "chosen") == "Q. A."


@pytest.mark.parametrize("prompt", ["Are you there?", "", "Say [SEP] twice."])
def test_prompt_and_response_as_two_texts_are_what_the_tokenizer_makes_of_them(bert_dir, prompt):
    pairs = load_pair_tokenizer(bert_dir)
    assert pairs.template == "pair"
    pair = make_pair("a", prompt, "Yes, I am. " * 3, "No.")
    (found,) = pairs.read([pair])
    for side in ("chosen", "rejected"):
        own, wanted = getattr(found, side), pairs.tokenizer(prompt, pair[side][0]["content"])
        assert own.ids.tolist() == wanted["input_ids"]
        assert own.types.tolist() == wanted["token_type_ids"]
        assert own.ids[own.n_prompt - 1] == pairs.tokenizer.sep_token_id


def test_a_name_that_is_no_template_is_refused():
    with pytest.raises(
        ValueError, match=r"no template is called 'chatml'; choose auto, chat, plain, pair, raw, or a \.jinja"
    ):
        Reading(template="chatml")
    with pytest.raises(ValueError, match="write it as YYYY-MM-DD"):
        Reading(template_arguments={"date": "26 July"})


@pytest.mark.parametrize("call", ["strftime_now('%d')", 'strftime_now ( "%d" )', "strftime_now( '%d' )"])
def test_the_day_is_found_however_it_is_asked_for(call):
    pairs = reads("{% if strftime_now is defined %}[{{ " + call + " }}]{% endif %}" + CHAT_TEMPLATE)
    assert pairs.rendered_side(TALKS["one turn"], "chosen").startswith("[26]")


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_template_is_refused(tmp_path, reward_dir, content):
    (tmp_path / "own.jinja").write_text(content)
    with pytest.raises(UserError, match=r"the template .*own.jinja is empty"):
        load_pair_tokenizer(reward_dir, Reading(template=str(tmp_path / "own.jinja")))


def test_a_template_that_writes_other_names_of_roles_knows_the_common_ones():
    template = "{% for m in messages %}{{ 'human' if m['role'] == 'user' else 'gpt' }}: {{ m['content'] }};{% endfor %}"
    text = reads(template).rendered_side(pair_of(("human", "How?")), "chosen")
    assert text == "human: How?;gpt: Yes. Fine.;"


def test_a_template_that_refuses_our_marks_is_asked_about_the_messages_alone():
    template = (
        "{% for m in messages %}{% if m['content'] | length < 5 %}{{ raise_exception('too short') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    )
    pairs = reads(template)
    good, bad = pairs.read(
        [pair_of(("user", "Hello."), chosen="Of course. Yes.", rejected="No, not."), pair_of(("user", "Hi"))]
    )
    assert good.chosen.ids.tolist() == own_ids(pairs, talk(("user", "Hello."), ("assistant", "Of course. Yes.")))
    assert bad == "the chat template refuses it: too short"


@pytest.mark.parametrize("template", ["raw", "pair"])
def test_no_template_reads_a_role_that_is_not_known(template):
    (found,) = PairTokenizer(reads(CHAT_TEMPLATE).tokenizer, template, 400).read([pair_of(("banana", "Hello."))])
    assert "the role 'banana', which is not known" in found


def test_a_day_as_yaml_reads_it_is_a_day():
    from safer_ray.config.read import assigned

    values = assigned({}, ["template_arguments={date: 2026-01-31}"], "--read")
    assert Reading.model_validate(values).template_arguments == {"date": "2026-01-31"}
    with pytest.raises(UserError, match=r"--read 'template_arguments.date=2026-13-01' is not readable YAML"):
        assigned({}, ["template_arguments.date=2026-13-01"], "--read")


@pytest.mark.parametrize(
    "values",
    [
        {"template": "plain"},
        {"template": "own.jinja", "template_arguments": {"loud": True}},
        {"template_arguments": {"date": "2025-01-02"}},
        {"system": "fold", "truncation": "quarantine"},
    ],
    ids=["plain", "file", "date", "fold"],
)
def test_a_bundle_reads_as_its_codes_were_read(values, reward_dir, sae_dir, pairs_dir, tmp_path):
    shutil.copytree(reward_dir, tmp_path / "model")
    (tmp_path / "model" / SETTINGS).unlink()
    (tmp_path / "model" / "chat_template.jinja").write_text(TODAY)
    (tmp_path / "own.jinja").write_text("{% if loud %}!{% endif %}" + CHAT_TEMPLATE)
    if values.get("template") == "own.jinja":
        values = {**values, "template": str(tmp_path / "own.jinja")}
    asked = Reading(**values)
    (tmp_path / "features.json").write_text('{"safe": [1], "unsafe": [2, 3], "mode": "response"}')
    reward, sae, chosen = (
        Artifact(path, path.stem) for path in (tmp_path / "model", sae_dir, tmp_path / "features.json")
    )
    ctx = StageContext(Place(tmp_path / "runs"), LocalRunner(), reading=asked)
    codes = model_stages.codes(ctx, Artifact(pairs_dir, "pairs"), reward, sae)
    later = StageContext(Place(tmp_path / "runs"), LocalRunner())  # the command that bundles is told nothing
    bundle = feature_stages.auditor(later, reward, sae, chosen, codes).path
    (tmp_path / "own.jinja").unlink()
    pairs = make_pairs(4)
    found = RewardPairs(bundle / "reward")(pairs)
    assert not found.equals(RewardPairs(tmp_path / "model")(pairs)) or values.get("system")
    assert found["reward_chosen"].to_pylist()[:4] == pytest.approx(
        read_parts(codes.path)["chosen_reward"].to_pylist()[:4], abs=1e-5
    )
    own = load_pair_tokenizer(bundle / "reward")
    assert (own.fold, own.cuts) == (values.get("system") == "fold", values.get("truncation") != "quarantine")


# What messages say beside their content

TOOLS = (  # as Qwen 2.5's and 3's: calls behind the content, thoughts of the last turn alone
    "{%- for m in messages %}<{{ m.role }}>{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}<call>"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}<end>{%- endfor %}"
)
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima. Now, please."}}}]
TALK = [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": "", "tool_calls": CALL}]
TALK += [{"role": "tool", "content": "20 degrees. Sunny.", "tool_call_id": "c1"}]


def spoken(prompt, chosen, rejected):
    sides = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    return {"pair_id": "a", **{name: as_messages(turns, name) if turns else [] for name, turns in sides.items()}}


SPOKEN_PAIRS = {
    "a call in the prompt": spoken(
        TALK, {"role": "assistant", "content": "Yes. Warm."}, {"role": "assistant", "content": "No."}
    ),
    "a call as the response": spoken(
        TALK[:1], TALK[1], {"role": "assistant", "content": "Hm. Wait.", "tool_calls": CALL}
    ),
    "a thought": spoken(
        [*TALK[:1], {"role": "assistant", "content": "Yes.", "reasoning_content": "Easy."}, TALK[0]],
        {"role": "assistant", "content": "Yes. Warm.", "reasoning_content": "First, this."},
        {"role": "assistant", "content": "No."},
    ),
}


@pytest.mark.parametrize("name", SPOKEN_PAIRS)
def test_what_else_messages_say_is_written_by_the_template(name):
    pairs, pair = reads(TOOLS), SPOKEN_PAIRS[name]
    (found,) = pairs.read([pair])
    for side in ("chosen", "rejected"):
        own, talked = getattr(found, side), [fields_of(m) for m in [*pair["prompt"], *pair[side]]]
        assert own.ids.tolist() == own_ids(pairs, talked)
        text = pairs.rendered_side(pair, side)
        assert set(own.end.tolist()) - {len(text)} == {
            end for end in own.end.tolist() if text[end - 1] in ".,?!" and "Lima" not in text[end - 10 : end]
        }  # an end lies in contents, never in a call
        before = pairs.tokenizer.decode(own.ids[: own.n_prompt])
        assert before.count("<user>") == sum(m["role"] == "user" for m in pair["prompt"])
        assert "<call>" not in pairs.tokenizer.decode(own.ids[: own.n_prompt]) or "prompt" in name
    assert found.chosen.ids.tolist() != found.rejected.ids.tolist()


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "plain", "raw", "pair"])
@pytest.mark.parametrize(
    ("name", "field"), [("a call in the prompt", "tool_calls"), ("a thought", "reasoning_content")]
)
def test_what_a_template_does_not_write_is_refused_by_name(template, name, field):
    chat = template == CHAT_TEMPLATE
    pairs = reads(CHAT_TEMPLATE) if chat else PairTokenizer(reads(CHAT_TEMPLATE).tokenizer, template, 400)
    (found,) = pairs.read([SPOKEN_PAIRS[name]])
    what = "the chat template" if chat else "a model without a chat template"
    assert re.match(rf"message \d has {field}, which {what} does not write", found)
