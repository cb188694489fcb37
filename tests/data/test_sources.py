import csv
import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError
from support.messages import short

from safer_ray import schema
from safer_ray.config.sections import SourceConfig
from safer_ray.data.sources import NORMALISED, RAW, NormalisePairs, plan_sources, read_raw
from safer_ray.errors import UserError
from safer_ray.formats.registry import detect_format
from safer_ray.pipeline.inspection import inspect

DATA = Path(__file__).parents[3] / "shared/data"
USER = {"role": "user", "content": "How are you?"}
GOOD = {"role": "assistant", "content": "Fine, thanks."}
BAD = {"role": "assistant", "content": "Go away."}
TEXTS = {"prompt": "How are you?", "chosen": "Fine, thanks.", "rejected": "Go away."}
HH = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: How are you?\n\nAssistant:"
PKU = {
    "prompt": "How are you?",
    "response_0": "Go away.",
    "response_1": "Fine, thanks.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
    "response_0_harm_category": {"Insulting Behavior": True, "Violence": False},
    "response_1_harm_category": {"Insulting Behavior": False, "Violence": False},
    "safer_response_id": 1,
    "better_response_id": 0,
}


def many(n):
    return [TEXTS | {"prompt": f"Question {i}?", "id": i} for i in range(n)]


def write_lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def pairs_of(path, max_chars=20_000, rows=5000, size=32 * 2**20, **settings):
    """All normalised rows of a source, one dict each."""
    config = SourceConfig(path=str(path), **settings)
    normalise = NormalisePairs([config], max_chars)
    return [
        short(row)
        for fragment in plan_sources([config], rows=rows, size=size)
        for row in normalise(read_raw(fragment, config)).to_pylist()
    ]


def only(tmp_path, row, **settings):
    """The one row of a file, normalised."""
    (pair,) = pairs_of(write_lines(tmp_path / "row.jsonl", [row]), **settings)
    return pair


def texts(pair):
    return [[message["content"] for message in pair[side]] for side in ("prompt", "chosen", "rejected")]


def row_keys(path, rows, **settings):
    """Row keys of every fragment of a source."""
    config = SourceConfig(path=str(path), **settings)
    fragments = plan_sources([config], rows=rows)
    assert [fragment.number for fragment in fragments] == list(range(len(fragments)))
    return [read_raw(fragment, config)["row_key"].to_pylist() for fragment in fragments]


# Formats


def test_canonical_texts_become_messages(tmp_path):
    pair = only(tmp_path, TEXTS)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([USER], [GOOD], [BAD])
    assert pair["refused"] is None
    assert pair["raw"] is None
    assert pair["position"] == 0


@pytest.mark.parametrize("format", ["auto", "canonical", "trl_explicit"])
def test_explicit_prompts_may_be_messages_that_the_sides_repeat(tmp_path, format):
    row = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}
    assert texts(only(tmp_path, row, format=format)) == [["How are you?"], ["Fine, thanks."], ["Go away."]]


def test_a_side_that_knows_a_system_message_gives_it_to_the_prompt(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    row = {"prompt": "How are you?", "chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]}
    assert only(tmp_path, row)["prompt"] == [system, USER]


@pytest.mark.parametrize("format", ["auto", "hh_rlhf", "trl_implicit"])
def test_hh_transcripts_share_all_turns_before_the_last(tmp_path, format):
    pair = only(tmp_path, {"chosen": f"{HH} Fine, thanks.", "rejected": f"{HH} Go away."}, format=format)
    assert texts(pair) == [["Hello", "Hi!", "How are you?"], ["Fine, thanks."], ["Go away."]]
    assert [message["role"] for message in pair["prompt"]] == ["user", "assistant", "user"]


def test_pku_takes_the_safer_response_by_default_and_the_better_one_on_request(tmp_path):
    safer, better = only(tmp_path, PKU), only(tmp_path, PKU, prefer="better")
    assert safer["chosen"] == better["rejected"] == [GOOD]
    assert dict(safer["labels"]) == {
        "chosen_safe": "true",
        "chosen_severity": "0",
        "rejected_safe": "false",
        "rejected_severity": "2",
        "rejected_harm": "Insulting Behavior",
    }
    assert json.loads(safer["extra"]) == {"better_response_id": 0}


def test_ultrafeedback_scores_give_the_margin(tmp_path):
    row = {"prompt": "How are you?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    pair = only(tmp_path, row | {"score_chosen": 8.5, "score_rejected": 7, "messages": [USER, GOOD]})
    assert texts(pair) == [["How are you?"], ["Fine, thanks."], ["Go away."]]
    assert pair["label_margin"] == 1.5
    assert pair["extra"] is None


def test_skywork_keeps_its_source_as_a_label(tmp_path):
    pair = only(tmp_path, {"chosen": [USER, GOOD], "rejected": [USER, BAD], "source": "magpie"})
    assert texts(pair) == [["How are you?"], ["Fine, thanks."], ["Go away."]]
    assert pair["labels"] == [("source", "magpie")]
    assert pair["source"] == "row.jsonl"


def test_implicit_messages_share_all_but_the_last(tmp_path):
    pair = only(tmp_path, {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]})
    assert texts(pair) == [["How are you?", "Fine, thanks.", "How are you?"], ["Fine, thanks."], ["Go away."]]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("What is 2+2?\nA: I say 4", "What is 2+2?\nA: I say 5", "What is 2+2?\nA:"),
        ("One two", "One two three", "One"),
    ],
)
def test_implicit_texts_share_their_beginning_up_to_a_turn_or_a_space(tmp_path, chosen, rejected, prompt):
    pair = only(tmp_path, {"chosen": chosen, "rejected": rejected}, format="trl_implicit")
    assert texts(pair)[0] == [prompt]
    assert f"{prompt} {pair['chosen'][0]['content']}" == chosen


def test_a_prompt_with_turns_is_parsed_and_its_trailing_assistant_dropped(tmp_path):
    for prompt in (HH, HH.strip(), f"Be kind.{HH}"):
        *lead, first, second, third = only(tmp_path, TEXTS | {"prompt": prompt})["prompt"]
        assert [first["content"], second["content"], third["content"]] == ["Hello", "Hi!", "How are you?"]
        assert lead == ([{"role": "system", "content": "Be kind."}] if prompt.startswith("Be") else [])


def test_empty_turns_go_and_neighbours_of_one_role_are_joined(tmp_path):
    prompt = "\n\nHuman: One\n\nAssistant: \n\nHuman: Two\n\nAssistant:"
    assert texts(only(tmp_path, TEXTS | {"prompt": prompt}))[0] == ["One\n\nTwo"]


def test_a_prompt_that_only_mentions_a_turn_is_one_message(tmp_path):
    assert texts(only(tmp_path, TEXTS | {"prompt": "Continue:\n\nHuman: Hi"}))[0] == ["Continue:\n\nHuman: Hi"]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (TEXTS, "canonical"),
        ({"chosen": f"{HH} a", "rejected": f"{HH} b"}, "hh_rlhf"),
        (PKU, "pku_saferlhf"),
        (TEXTS | {"score_chosen": 1, "score_rejected": 0}, "ultrafeedback"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "source": "x"}, "skywork"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "trl_implicit"),
    ],
)
def test_the_format_is_detected_from_most_rows(row, format):
    assert detect_format([{"prompt": "stray"}, row, row]) == format


def test_columns_that_fit_no_format_are_named_with_the_nearest_one(tmp_path):
    path = write_lines(tmp_path / "odd.jsonl", [{"question": "?", "answer": "!"}])
    wanted = "odd.jsonl: no preference format fits the columns answer, question; nearest is .*docs/layouts.md"
    with pytest.raises(UserError, match=wanted):
        plan_sources([SourceConfig(path=str(path))])


# Refusals

REFUSALS = [
    ({"prompt": "a", "chosen": "b"}, "canonical", "missing column: rejected"),
    (TEXTS | {"chosen": "  "}, "canonical", "empty text: chosen"),
    (TEXTS | {"prompt": None}, "canonical", "empty text: prompt"),
    (
        TEXTS | {"chosen": [{"role": "assistant", "content": "See.", "images": ["a.png"]}]},
        "canonical",
        r"unread field: chosen\[0\]\.images; pairs hold text alone",
    ),
    (TEXTS | {"prompt": float("nan")}, "canonical", "empty text: prompt"),
    (TEXTS | {"prompt": "\n\nHuman: \n\nAssistant:"}, "canonical", "empty text: prompt"),
    (TEXTS | {"rejected": " Fine, thanks."}, "canonical", "equal responses"),
    (TEXTS | {"chosen": 3}, "canonical", "wrong type: chosen is number, wanted text or messages"),
    (TEXTS | {"chosen": ["hi"]}, "canonical", r"wrong type: chosen\[0\] is text, wanted a message"),
    (
        TEXTS | {"chosen": [{"role": "assistant", "content": {}}]},
        "canonical",
        r"wrong type: chosen\[0\].content is map",
    ),
    (TEXTS | {"chosen": [USER]}, "canonical", "wrong type: chosen ends with user, wanted assistant"),
    (["prompt"], "canonical", "wrong type: the row is list, wanted a mapping"),
    (TEXTS | {"chosen": "x" * 200}, "canonical", "too long: 212 characters, limit 100"),
    ("{broken", "canonical", "not JSON: "),
    ("[" * 100_000, "canonical", "nested too deep: more than 200 levels"),
    (
        f'{{"a": {"[" * 200}{"]" * 200}, "prompt": "?", "chosen": "a", "rejected": "b"}}',
        "canonical",
        "nested too deep: ",
    ),
    (r'{"prompt": "\ud800", "chosen": "a", "rejected": "b"}', "canonical", "bad UTF-8: a lone surrogate"),
    ({"prompt": "?", "chosen": [USER, GOOD], "rejected": [BAD]}, "canonical", "prompts differ"),
    ({"chosen": f"{HH} a", "rejected": f"{HH} b\n\nHuman: c\n\nAssistant: d"}, "hh_rlhf", "prompts differ"),
    ({"chosen": f"{HH} a", "rejected": HH}, "hh_rlhf", "empty text: rejected"),
    ({"chosen": "a", "rejected": f"{HH} b"}, "hh_rlhf", "wrong type: chosen is plain text, wanted a Human:/Assistant:"),
    ({"chosen": "Yes", "rejected": "No"}, "trl_implicit", "empty text: prompt"),
    ({"chosen": [USER, GOOD], "rejected": "No"}, "trl_implicit", "wrong type: rejected is text, wanted list"),
    ({"chosen": [USER, GOOD], "rejected": [BAD, USER, BAD]}, "trl_implicit", "prompts differ"),
    (PKU | {"safer_response_id": -1}, "pku_saferlhf", "no preference: safer_response_id is -1"),
    (PKU | {"safer_response_id": "me"}, "pku_saferlhf", "wrong type: safer_response_id is text, wanted 0 or 1"),
    (TEXTS | {"score_chosen": 7, "score_rejected": 7.0}, "ultrafeedback", "no preference: both scores are 7"),
    (TEXTS | {"score_chosen": 7}, "ultrafeedback", "missing column: score_rejected"),
    (TEXTS | {"preference_strength": 0}, "canonical", "no preference: preference_strength is 0"),
]


@pytest.mark.parametrize(("row", "format", "reason"), REFUSALS)
def test_a_bad_row_is_refused_with_its_reason(tmp_path, row, format, reason):
    pair = only(tmp_path, row, format=format, max_chars=100)
    assert re.match(reason, pair["refused"]), pair["refused"]
    assert pair["row_key"] == "row.jsonl#0"
    assert pair["source"] == "row.jsonl"
    assert pair["prompt"] is None
    assert 0 < len(pair["raw"]) <= schema.RAW_LIMIT


def test_rows_as_deep_as_may_be_are_read(tmp_path):
    deep = '{"a": ' * 199 + "1" + "}" * 199
    row = f'{{"prompt": "?", "chosen": "a", "rejected": "b", "more": {deep}}}'
    assert only(tmp_path, row)["extra"] == f'{{"more":{deep.replace(" ", "")}}}'


def test_numbers_too_large_are_no_infinities_in_pairs(tmp_path):
    row = '{"prompt": "?", "chosen": "a", "rejected": "b", "id": 1e999, "margin": 1e300, "more": [1e999, -1e999, 0.5]}'
    pair = only(tmp_path, row)
    assert pair["label_margin"] is None
    assert pair["extra"] == '{"id":null,"margin":1e+300,"more":[null,null,0.5]}'
    scores = '{"prompt": "?", "chosen": "a", "rejected": "b", "score_chosen": 3e38, "score_rejected": -3e38}'
    assert only(tmp_path, scores)["label_margin"] is None


def test_bad_utf8_is_refused_and_blank_lines_count_but_do_not_come(tmp_path):
    good = json.dumps(TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + good + b"\r\n\n" + good.replace(b"Fine", b"\xff") + b"\n" + good
    )
    first, second, third = pairs_of(tmp_path / "a.jsonl")
    assert [row["position"] for row in (first, second, third)] == [0, 2, 3]
    assert (first["refused"], third["refused"]) == (None, None)
    assert second["refused"].startswith("bad UTF-8")
    assert "\ufffd" in second["raw"]


def test_a_line_over_the_limit_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr("safer_ray.storage.rows.MAX_ROW", 1000)
    path = write_lines(tmp_path / "a.jsonl", [TEXTS, TEXTS | {"chosen": "x" * 5000}, TEXTS])
    assert [(row["refused"] or "good")[:12] for row in pairs_of(path)] == ["good", "too long: 50", "good"]


def test_a_refused_row_keeps_the_id_that_is_known(tmp_path):
    assert only(tmp_path, TEXTS | {"chosen": "", "id": 7})["pair_id"] == "7"


# What rides along


def test_ids_sections_margins_labels_and_other_columns_ride_along(tmp_path):
    more = {"uid": "u1", "section": "safety", "margin": "0.25", "labels": {"lang": "en", "turns": 2}, "note": [1, "é"]}
    pair = only(tmp_path, TEXTS | more | {"meta": {"subset": "x", "ok": True}, "score": float("nan")}, section="chat")
    assert (pair["pair_id"], pair["section"], pair["label_margin"]) == ("u1", "safety", 0.25)
    assert dict(pair["labels"]) == {"lang": "en", "turns": "2", "subset": "x", "ok": "true"}
    assert pair["extra"] == '{"note":[1,"é"],"score":null}'


def test_without_them_the_id_is_of_the_content_and_the_rest_is_empty(tmp_path):
    one = only(tmp_path, TEXTS, section="chat", name="mine")
    two = only(tmp_path, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    assert one["pair_id"] == two["pair_id"]
    assert len(one["pair_id"]) == 32
    assert len(one["group"]) == 16
    assert (one["section"], one["source"], one["extra"], one["labels"]) == ("chat", "mine", None, [])


def test_pairs_that_were_normalised_before_come_back_the_same(tmp_path):
    first = pairs_of(write_lines(tmp_path / "a.jsonl", [PKU | {"id": "k", "note": 1}]))
    pq.write_table(schema.table(first, schema.PAIRS), tmp_path / "pairs.parquet")
    (again,) = pairs_of(tmp_path / "pairs.parquet")
    same = ("pair_id", "prompt", "chosen", "rejected", "group", "labels", "label_margin")
    assert {name: again[name] for name in same} == {name: first[0][name] for name in same}
    assert json.loads(first[0]["extra"]).items() <= json.loads(again["extra"]).items()


def test_tables_have_their_schemas_even_when_empty(tmp_path):
    assert NormalisePairs([SourceConfig(path="x")], 10)(RAW.empty_table()).schema == NORMALISED
    assert NORMALISED.names == [*schema.PAIRS.names, "refused", "raw", "position", "notes"]


def test_a_source_takes_the_pairs_that_it_asks_for_and_tells_of_the_broken_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "meta": {"subset": ("Natural", "Manual")[i % 2]}}
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q"}]))
    source = SourceConfig(path=str(path), format="canonical", where="labels.subset == Natural")
    (fragment,) = plan_sources([source])
    found = NormalisePairs([source], 1000)(read_raw(fragment, source)).to_pylist()
    assert [row["prompt"][0]["content"] for row in found if not row["refused"]] == ["q0", "q2", "q4", "q6", "q8"]
    assert [row["refused"] for row in found if row["refused"]] == ["missing column: chosen"]
    with pytest.raises(ValidationError, match="unknown column 'subset'"):
        SourceConfig(path=str(path), where="subset == Natural")


def test_train_and_holdout_partition_the_rows_by_prompt(tmp_path):
    rows = [row | {"id": f"{row['id']}-{i}", "chosen": f"{i}"} for row in many(200) for i in range(2)]
    path = write_lines(tmp_path / "a.jsonl", [*rows, *(f"{{broken {i}" for i in range(50))])
    parts = {part: pairs_of(path, part=part, holdout_percent=25) for part in ("all", "train", "holdout")}
    keys = {part: {row["row_key"] for row in found} for part, found in parts.items()}
    assert keys["train"] | keys["holdout"] == keys["all"]
    assert not keys["train"] & keys["holdout"]
    groups = {part: {row["group"] for row in found if row["group"]} for part, found in parts.items()}
    assert not groups["train"] & groups["holdout"]
    assert 30 <= len(groups["holdout"]) <= 70


# Files and fragments


def save(tmp_path, kind, rows):
    """The rows in a file or folder of some kind."""
    path = tmp_path / f"data.{kind}"
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if kind == "jsonl":
        path.write_bytes(text)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text[: len(text) // 2]) + gzip.compress(text[len(text) // 2 :]))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(text))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=7)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list(rows)
        if kind == "dict":
            data = datasets.DatasetDict({"train": data, "test": data.select([0])})
        data.save_to_disk(path)
    return path


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "arrow", "csv", "saved", "dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_fragments_cover_every_row_once(tmp_path, kind):
    path = save(tmp_path, kind, many(23))
    found = row_keys(path, rows=5)
    assert [len(keys) for keys in found] == [5, 5, 5, 5, 3]
    file = found[0][0].partition("#")[0]
    assert [key for keys in found for key in keys] == [f"{file}#{i}" for i in range(23)]
    pairs = pairs_of(path, rows=5)
    assert [row["pair_id"] for row in pairs] == [str(i) for i in range(23)]
    assert not any(row["refused"] for row in pairs)
    assert len(pairs_of(path, rows=5, limit=6)) == 6


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "arrow"])
def test_fragments_are_cut_by_size_too(tmp_path, kind):
    path = save(tmp_path, kind, [row | {"chosen": "long " * 200} for row in many(20)])
    config = SourceConfig(path=str(path))
    assert len(plan_sources([config])) == 1
    assert len(plan_sources([config], size=2500)) >= 5
    assert len(pairs_of(path, size=2500)) == 20


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json"])
def test_fragments_far_into_a_file_begin_at_their_row(tmp_path, kind):
    path = save(tmp_path, kind, [row | {"chosen": f"{row['id']} " * 300} for row in many(3000)])
    pairs = pairs_of(path, rows=700)
    assert [row["pair_id"] for row in pairs] == [str(i) for i in range(3000)]
    assert all(row["row_key"].endswith(f"#{row['pair_id']}") for row in pairs)


def test_multi_line_cells_and_odd_records_of_a_csv_are_read_or_refused(tmp_path):
    lines = ["prompt,chosen,rejected", '"two\nlines",a,b', "", "p,,b", "p,a", "p,a,b,c", "p,\xff,b"]
    (tmp_path / "a.csv").write_bytes("\n".join(lines).encode("latin-1"))
    found = [(row["position"], row["refused"]) for row in pairs_of(tmp_path / "a.csv")]
    assert found[:3] == [
        (0, None),
        (2, "empty text: chosen"),
        (3, "wrong type: the row is 2 cells, wanted 3 as in the header; write its empty cells, too"),
    ]
    assert found[3][1].startswith("wrong type: the row is 4 cells, wanted 3")
    assert found[4][1].startswith("bad UTF-8")


def test_parquet_text_that_is_no_utf8_refuses_only_its_row(tmp_path):
    chosen = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"\xffugh", b"good"]).buffers())
    table = pa.table({"prompt": ["p", "q", "r"], "chosen": chosen, "rejected": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    one, two, three = (row["refused"] for row in pairs_of(tmp_path / "a.parquet", format="canonical"))
    assert (one, three) == (None, None)
    assert two.startswith("bad UTF-8")


def test_folders_are_read_recursively_in_order_and_keys_hold_the_path_inside(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/x.jsonl", "a.jsonl"):
        write_lines(tmp_path / name, [TEXTS])
    (tmp_path / "README.md").write_text("not data")
    assert row_keys(tmp_path, rows=5) == [["a.jsonl#0"], ["b/x.jsonl#0"]]
    assert row_keys(f"{tmp_path}/*/*.jsonl", rows=5) == [["b/x.jsonl#0"]]
    fragments = plan_sources([SourceConfig(path=str(tmp_path)), SourceConfig(path=str(tmp_path / "a.jsonl"))])
    assert [(fragment.number, fragment.source) for fragment in fragments] == [(0, 0), (1, 0), (2, 1)]
    assert fragments[2].size == (tmp_path / "a.jsonl").stat().st_size


def test_an_empty_file_has_no_fragments(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert plan_sources([SourceConfig(path=str(tmp_path))]) == []


def test_paths_that_cannot_be_read_end_in_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").touch()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 100_000)[:-50])
    save(tmp_path, "dict", many(2))
    wanted = {
        "nowhere.jsonl": "no file, folder or glob",
        "empty": "no data files",
        "*.tsv": "no data files",
        "a.docx": "unknown kind of file; supported are .jsonl",
        "a.parquet": "cannot read .*damaged",
        "a.jsonl.gz": "cannot read .*damaged",
        "data.dict": r"no split 'dev'; it has train, test: choose one by --split NAME \(`split: NAME` in a config\)",
    }
    for name, message in wanted.items():
        with pytest.raises(UserError, match=message) as error:
            plan_sources([SourceConfig(path=str(tmp_path / name), **({"split": "dev"} if name == "data.dict" else {}))])
        assert "\n" not in str(error.value)


# The hub


def test_a_hub_name_is_loaded_and_saved_once(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("SAFER_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "repo").mkdir()
    pq.write_table(pa.Table.from_pylist(many(7)), tmp_path / "repo" / "train.parquet")
    for _ in range(2):
        pairs = pairs_of(f"hub:{tmp_path / 'repo'}", rows=3)
        assert [row["pair_id"] for row in pairs] == [str(i) for i in range(7)]
        assert len(list((tmp_path / "cache" / "hub").iterdir())) == 1


def test_a_hub_name_out_of_reach_says_so(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"cannot load hub:nobody/nothing@v1 .*check the name, the split and the network"
    ):
        plan_sources([SourceConfig(path="hub:nobody/nothing@v1")])


# Inspection and real data


def test_inspection_counts_rows_and_reasons_and_shows_examples(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*many(10), "{broken", TEXTS | {"chosen": ""}, "{again", *many(50)])
    found = inspect(str(path), rows=20)
    assert (found.format, found.rows, found.good) == ("canonical", 20, 17)
    assert found.refused == {"not JSON": 2, "empty text: chosen": 1}
    assert found.columns == ("prompt", "chosen", "rejected", "id")
    assert found.files == (str(path),)
    assert len(found.examples) == 3
    assert short(found.examples[0])["chosen"] == [GOOD]
    assert (found.chosen_chars, found.rejected_chars) == (13, 8)


@pytest.mark.skipif(not DATA.exists(), reason="the real data sets are not at hand")
def test_real_transcripts_are_read_with_few_refusals():
    pairs = pairs_of(DATA / "raw/hh-rlhf_harmless-base_test.jsonl.gz", rows=1000)
    assert len(pairs) == len({row["row_key"] for row in pairs}) == 2312
    assert {row["refused"] for row in pairs} == {None, "prompts differ", "empty text: chosen"}
    assert sum(row["refused"] is not None for row in pairs) < 15


@pytest.mark.skipif(not DATA.exists(), reason="the real data sets are not at hand")
@pytest.mark.parametrize(("name", "rows"), [("pku_saferlhf_5k", 3590), ("hh_helpful_test", 2348), ("llmbar", 419)])
def test_real_canonical_rows_are_all_read(name, rows):
    pairs = pairs_of(DATA / f"{name}.jsonl.gz")
    assert len(pairs) == rows
    assert not any(row["refused"] for row in pairs)
    assert all(row["pair_id"].startswith(name.removesuffix("_5k")) for row in pairs)


def test_a_small_file_that_unpacks_to_much_is_cut_off(tmp_path, monkeypatch):
    """What lies behind the limit is not read, and the row says so."""
    from safer_ray.storage import rows

    monkeypatch.setattr(rows, "MAX_ROW", 2**20)
    monkeypatch.setattr(rows, "MAX_SKIPPED", 2**23)
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as out:
        out.write(b'{"a": 1}\n')
        for _ in range(64):
            out.write(b"0" * 2**20)
        out.write(b'\n{"a": 2}\n')
    found = list(rows.read_rows(path, 0, 10))
    assert [position for position, *_ in found] == [0, 1]
    assert "too long" in found[1][2]
    assert "the rest of bomb.jsonl.gz is left unread" in found[1][2]
