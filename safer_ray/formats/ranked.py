"""Formats of one prompt with several responses in an order: Nectar's ranks, UltraFeedback's and distilabel's scores."""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from safer_ray.formats.canonical import by_any_prompt, canonical
from safer_ray.formats.declaration import (
    NOTED,
    OWN_MARGIN,
    Options,
    PreferenceFormat,
    Refused,
    Row,
    as_mapping,
    as_number,
    as_text,
    check_count,
    identity,
    type_name,
)

PAIRS = ("best_worst", "adjacent", "all")  # which pairs of a row's responses are made, the first by default


class Ranked(NamedTuple):
    """A response, its rank (1 is best) and what becomes labels of its side."""

    response: Any
    rank: float
    labels: Mapping[str, str]


def ranked_pairs(
    row: Row, answers: Sequence[Ranked], options: Options, drop: frozenset[str], unscored: int = 0
) -> list[Row]:
    """Return the best response with the worst one, each with the next worse one (`pairs: adjacent`), or each with every
    worse one (`pairs: all`), as rows without the columns `drop`, with a note on how many responses are `unscored`.

    Responses whose rank others share stand for these, in the order of the row. The ids of several pairs end in the
    places of their two responses, `…/I-J`.

    Raises:
        Refused: fewer than two responses, all of one rank, or too many pairs.
    """
    if len(answers) < 2:
        others = f", and {unscored} without a score" if unscored else ""
        raise Refused(f"fewer than two answers: {len(answers)}{others}")
    ranks = [answer.rank for answer in answers]
    if len(set(ranks)) == 1:
        raise Refused(f"no preference: all {len(answers)} answers are equally good")
    kind = options.get("pairs", PAIRS[0])
    order = sorted(range(len(answers)), key=ranks.__getitem__)
    if kind == "best_worst":
        places = [(ranks.index(min(ranks)), ranks.index(max(ranks)))]
    elif kind == "adjacent":
        firsts = [place for number, place in enumerate(order) if number == 0 or ranks[place] > ranks[order[number - 1]]]
        places = list(pairwise(firsts))
    else:
        check_count(len(answers) * (len(answers) - 1) // 2)
        places = [(i, j) for i, j in combinations(order, 2) if ranks[i] < ranks[j]]
    several = kind != "best_worst"
    if unscored:
        row = row | {NOTED: [f"{unscored} of {unscored + len(answers)} responses have no score, and are in no pair"]}
    return [_pair(row, answers, best, worst, drop, several=several) for best, worst in places]


def _pair(row: Row, answers: Sequence[Ranked], best: int, worst: int, drop: frozenset[str], *, several: bool) -> Row:
    kept = {name: value for name, value in row.items() if name not in drop}
    key, name = identity(row)
    if several and name is not None:
        kept[name] = f"{key}/{best}-{worst}"
    sides = {"chosen": answers[best], "rejected": answers[worst]}
    labels = {f"{side}_{name}": text for side, answer in sides.items() for name, text in answer.labels.items()}
    responses = {side: answer.response for side, answer in sides.items()}
    return kept | responses | {"labels": (as_mapping(row.get("labels")) or {}) | labels}


def _listed(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise Refused(f"wrong type: {name} is {type_name(value)}, wanted a list")
    return value


def _text_of(item: Any, key: str, place: str, wanted: str) -> str:
    if not isinstance(item, dict):
        raise Refused(f"wrong type: {place} is {type_name(item)}, wanted a mapping with {wanted}")
    if not isinstance(item.get(key), str) or not item[key].strip():
        raise Refused(f"empty text: {place}.{key}")
    return item[key]


def _number(value: Any, place: str, what: str) -> float:
    if value is None:
        raise Refused(f"missing {what}: {place}")
    number = as_number(value)
    if number is None:
        raise Refused(f"wrong type: {place}.{what} is {type_name(value)}, wanted a number")
    return number


def nectar(row: Row, options: Options) -> list[Row]:
    """Read `answers`, each with its `rank`, 1 the best, and its model.

    Raises:
        Refused: an answer has no text or no rank; or as `ranked_pairs`.
    """
    answers = []
    for i, item in enumerate(_listed(row, "answers")):
        place = f"answers[{i}]"
        text = _text_of(item, "answer", place, "answer and rank")
        rank = _number(item.get("rank"), place, "rank")
        labels = {name: as_text(item[name]) for name in ("model", "rank") if item.get(name) is not None}
        answers.append(Ranked(text, rank, labels))
    return ranked_pairs(row, answers, options, frozenset({"answers"}))


def completions(row: Row, options: Options) -> list[Row]:
    """Read UltraFeedback as published: an `instruction` and `completions`, each with an `overall_score`, high the best.

    Raises:
        Refused: a completion has no response or no score; or as `ranked_pairs`.
    """
    answers, unscored = [], 0
    for i, item in enumerate(_listed(row, "completions")):
        place = f"completions[{i}]"
        text = _text_of(item, "response", place, "response and overall_score")
        if item.get("overall_score") is None:
            unscored += 1  # not ranked; the others are
            continue
        score = _number(item["overall_score"], place, "overall_score")
        model = {"model": as_text(item["model"])} if item.get("model") is not None else {}
        answers.append(Ranked(text, -score, model | {"score": f"{score:g}"}))
    return _with_margins(ranked_pairs(row, answers, options, frozenset({"completions"}), unscored))


def generations(row: Row, options: Options) -> list[Row]:
    """Read distilabel's and Argilla's: `generations` and as many `ratings` (or `rating`), high the best.

    Raises:
        Refused: the lists differ in length, or a rating is missing; or as `ranked_pairs`.
    """
    column = next((name for name in ("ratings", "rating") if name in row), "ratings")
    texts, ratings = _listed(row, "generations"), _listed(row, column)
    names = row.get("generation_models") or row.get("generation_model") or []
    models = names if isinstance(names, list) and len(names) == len(texts) else []
    if len(texts) != len(ratings):
        raise Refused(f"wrong type: {column} has {len(ratings)} numbers of {len(texts)} generations")
    answers, unscored = [], 0
    for i, (text, rating) in enumerate(zip(texts, ratings, strict=True)):
        if not isinstance(text, str | list) or not text:
            raise Refused(f"empty text: generations[{i}]")
        if rating is None:
            unscored += 1  # not ranked; the others are
            continue
        score = _number(rating, f"{column}[{i}]", "number")
        model = {"model": as_text(models[i])} if models else {}
        answers.append(Ranked(text, -score, model | {"score": f"{score:g}"}))
    return _with_margins(ranked_pairs(row, answers, options, frozenset({"generations", column}), unscored))


def _with_margins(rows: list[Row]) -> list[Row]:
    """Rows with the difference of their two scores."""
    return [
        row | {OWN_MARGIN: float(row["labels"]["chosen_score"]) - float(row["labels"]["rejected_score"])}
        for row in rows
    ]


def _is_list(column: str, *keys: str) -> Any:
    def holds(row: Row) -> bool:
        items = row[column]
        return isinstance(items, list) and all(
            isinstance(item, dict) and set(keys) <= item.keys() for item in items[:1]
        )

    return holds


NECTAR = PreferenceFormat(
    "nectar",
    ("prompt", "answers"),
    "prompt, answers with answer, model and rank (1 the best)",
    canonical,
    nectar,
    options={"pairs": PAIRS},
)
ULTRAFEEDBACK_RAW = PreferenceFormat(
    "ultrafeedback_raw",
    ("instruction", "completions"),
    "instruction, completions with response and overall_score",
    by_any_prompt,
    completions,
    holds=_is_list("completions", "response"),
    options={"pairs": PAIRS},
)
DISTILABEL = PreferenceFormat(
    "distilabel",
    ("generations",),
    "instruction, input or prompt, generations and as many ratings",
    by_any_prompt,
    generations,
    holds=lambda row: (
        isinstance(row["generations"], list)
        and any(isinstance(row.get(name), list) for name in ("ratings", "rating"))
        and not {"chosen", "rejected"} <= row.keys()
    ),
    options={"pairs": PAIRS},
)
