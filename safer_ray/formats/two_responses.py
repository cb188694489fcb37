"""Formats of two responses a row, and a column that says which is better.

What the columns mean stands in the data sets' cards: HelpSteer2's `preference_strength` is above 0 where response 2 is
better, HelpSteer3's `overall_preference` likewise below 0 where response 1 is; SHP's `labels` is 1 where A is.
"""

from collections.abc import Mapping

from safer_ray.formats.canonical import by_any_prompt, canonical, has_sides, without_lists
from safer_ray.formats.declaration import (
    OWN_MARGIN,
    Options,
    PreferenceFormat,
    Refused,
    Row,
    as_flag,
    as_mapping,
    as_number,
    as_text,
    type_name,
)
from safer_ray.formats.messages import as_messages

Names = tuple[str, str]
NAME_CHARS = 12  # of a label that names a response
STRONGEST = 3  # of HelpSteer's preferences
_TIED = frozenset({"tie", "both", "neither", "draw"})
TIES = ("tie", "tie (bothbad)", "bothbad", "both_bad", "both", "neither", "none", "draw", "")


def has_no_sides(row: Row) -> bool:
    """Return whether a row does not say itself which response is which."""
    return not has_sides(row)


def _preferred(row: Row, responses: Names, better: int, used: tuple[str, ...], sides: Mapping[str, Names]) -> Row:
    """Return a row with `chosen` and `rejected`, without the columns that said them; what is said of each response
    becomes labels of its side."""
    own = as_mapping(row.get("labels")) or {}
    labels = {
        f"{side}_{name}": as_text(row[columns[number]])
        for side, number in (("chosen", better), ("rejected", 1 - better))
        for name, columns in sides.items()
        if row.get(columns[number]) is not None
    }
    gone = {*responses, *used, *(column for columns in sides.values() for column in columns)}
    kept = {name: value for name, value in row.items() if name not in gone}
    picked = {"chosen": row.get(responses[better]), "rejected": row.get(responses[1 - better])}
    return kept | picked | ({"labels": own | labels} if own or labels else {})


def _margin(row: Row, scores: Names, better: int) -> Row:
    """Return by how much the scores of two responses prefer the better one as a margin, nothing without them."""
    high, low = as_number(row.get(scores[better])), as_number(row.get(scores[1 - better]))
    return {} if high is None or low is None else {OWN_MARGIN: high - low}


def _by_strength(row: Row, column: str, responses: Names) -> list[Row]:
    """Return the row of a preference of -3 to 3, above 0 where the second response is better."""
    value = row.get(column)
    strength = as_number(value)
    if strength is None:
        raise Refused(f"wrong type: {column} is {type_name(value)}, wanted a number")
    if strength == 0:
        raise Refused(f"no preference: {column} is 0")
    if abs(strength) > STRONGEST:
        raise Refused(f"unknown label: {column} is {strength:g}, wanted -{STRONGEST} to {STRONGEST}")
    return [_preferred(row, responses, int(strength > 0), (column,), {}) | {OWN_MARGIN: abs(strength)}]


def helpsteer2(row: Row, options: Options) -> list[Row]:
    """Read HelpSteer2's preferences by their strength."""
    return _by_strength(row, "preference_strength", ("response_1", "response_2"))


def helpsteer3(row: Row, options: Options) -> list[Row]:
    """Read HelpSteer3's preferences by their strength; the `context` is messages."""
    return _by_strength(row, "overall_preference", ("response1", "response2"))


def shp(row: Row, options: Options) -> list[Row]:
    """Read Stanford Human Preferences: a post with two comments; `labels` is 1 where A is better, 0 where B is."""
    label = as_number(row.get("labels"))
    if row.get("labels") is None:
        raise Refused("no preference: labels is null")
    if label not in (0, 1):
        raise Refused(f"unknown label: labels is {as_text(row['labels'])}, wanted 1 where A is better, 0 where B is")
    row = {name: value for name, value in row.items() if name != "labels"}
    scores, better = ("score_A", "score_B"), int(label == 0)
    picked = _preferred(row, ("human_ref_A", "human_ref_B"), better, (), {"score": scores})
    return [picked | _margin(row, scores, better)]


def stack_exchange(row: Row, options: Options) -> list[Row]:
    """Read paired answers of Stack Exchange: `response_j` has the more votes, `response_k` the fewer."""
    scores = ("score_j", "score_k")
    return [_preferred(row, ("response_j", "response_k"), 0, (), {"score": scores}) | _margin(row, scores, 0)]


def _winner(row: Row) -> int:
    """Return which of two models won: 0 for the first.

    Raises:
        Refused: it is a tie, or unknown, or the columns contradict each other.
    """
    told = [name for name in _WINNERS[1:] if row.get(name) not in (None, "")]
    if row.get("winner") in (None, "") and told:
        won = _flagged(row)
        if won is None:
            raise Refused("no preference: winner_tie, or no winner")
        return won
    won = _named_winner(row)
    if told and _flagged(row) != won:
        raise Refused(
            f"unknown label: winner is {as_text(row.get('winner'))[:40]}, but {', '.join(told)} say otherwise"
        )
    if won is None:
        raise Refused(f"no preference: winner is {as_text(row.get('winner')).strip().lower() or 'null'}")
    return won


def _flagged(row: Row) -> int | None:
    """Return which model won by the columns of truth values, None for a tie, or for neither."""
    said = {name: row.get(name) for name in _WINNERS[1:] if row.get(name) not in (None, "")}
    flags = {name: as_flag(value) for name, value in said.items()}
    unknown = next((name for name, flag in flags.items() if flag is None), None)
    if unknown is not None:
        raise Refused(f"unknown label: {unknown} is {as_text(said[unknown])[:40]}, wanted 1 or 0")
    won = [name for name, flag in flags.items() if flag]
    if len(won) > 1:
        raise Refused(f"unknown label: {' and '.join(won)} are both set")
    return _WINNERS.index(won[0]) - 1 if won and won[0] != "winner_tie" else None


def _named_winner(row: Row) -> int | None:
    """Return which model won by the name that `winner` says, None for a tie."""
    said = "" if row.get("winner") is None else as_text(row["winner"]).strip().lower()
    names: dict[str, int] = {}
    for number, letter in enumerate("ab"):
        names |= dict.fromkeys((letter, *(f"{kind}{letter}" for kind in _WON)), number)
        if isinstance(model := row.get(f"model_{letter}"), str) and row.get("model_a") != row.get("model_b"):
            names.setdefault(model.strip().lower(), number)
    if said in names:
        return names[said]
    if said in TIES:
        return None
    raise Refused(f"unknown label: winner is {said[:40]}, wanted model_a, model_b, a model's name, or tie")


_WINNERS = ("winner", "winner_model_a", "winner_model_b", "winner_tie")
_WON = ("model_", "model ", "response_", "response ", "assistant_")  # what stands before a letter that names a winner
ARENA_SIDES = {"model": ("model_a", "model_b")}


def arena(row: Row, options: Options) -> list[Row]:
    """Read battles of Chatbot Arena: a prompt with two responses, each text or a list of turns in JSON.

    Raises:
        Refused: a tie, or more than one turn: what follows differs between the sides from the first answer on.
    """
    names = ("response_a", "response_b")
    won = _winner(row)
    return [_preferred(without_lists(row, ("prompt", *names)), names, won, _WINNERS, ARENA_SIDES)]


def arena_conversations(row: Row, options: Options) -> list[Row]:
    """Read battles of Chatbot Arena: two conversations of the same questions.

    Raises:
        Refused: a tie, or more than one turn: what follows differs between the sides from the first answer on.
    """
    won = _winner(row)
    names = ("conversation_a", "conversation_b")
    for name in names:
        turns = sum(message["role"] == "assistant" for message in as_messages(row.get(name) or [], name))
        if turns > 1:
            raise Refused(f"several turns: {name} has {turns}, whose answers of two models follow each other")
    picked = _preferred(row, names, won, _WINNERS, ARENA_SIDES)
    first = as_messages(row[names[0]], names[0])
    return [picked | {"prompt": [message for message in first if message["role"] != "assistant"]}]


# Pairs of columns that hold two responses, and what a label calls them, the first and the second.
_NAMED: tuple[tuple[Names, Names], ...] = tuple(
    ((f"{kind}{break_}{one}", f"{kind}{break_}{two}"), (one, two))
    for kind in ("response", "answer", "output", "completion")
    for break_ in ("_", "")
    for one, two in (("a", "b"), ("0", "1"), ("1", "2"))
)


def _is_tied(row: Row) -> bool:
    """Return whether `chosen` and `rejected` say that neither of two columns of responses is better."""
    said = {as_text(row.get(side)).strip().lower() for side in ("chosen", "rejected")}
    return said <= _TIED and any(set(columns) <= row.keys() for columns, _ in _NAMED)


def _named(row: Row) -> list[tuple[Names, int]]:
    """Return the columns of two responses that `chosen` and `rejected` may name, and which is chosen."""
    sides = [as_text(row.get(side)).strip().lower() for side in ("chosen", "rejected")]
    found: list[tuple[Names, int]] = []
    if max(map(len, sides)) > NAME_CHARS:
        return found
    for columns, names in _NAMED:
        if set(columns) <= row.keys():
            known = {
                text: i for i in (0, 1) for text in (names[i], columns[i], f"model_{names[i]}", f"response {names[i]}")
            }
            places = [known.get(side, -1) for side in sides]
            if sorted(places) == [0, 1]:
                found.append((columns, places[0]))
    return found


def named_responses(row: Row, options: Options) -> list[Row]:
    """Read `chosen` and `rejected` that name two other columns, which hold the responses."""
    found = _named(row)
    if not found and _is_tied(row):
        raise Refused(f"no preference: chosen is {as_text(row['chosen'])}")
    if not found:
        raise Refused("unknown label: chosen and rejected name no two columns of responses")
    if len(found) > 1:
        told = " or ".join(", ".join(columns) for columns, _ in found)
        raise Refused(f"unknown label: chosen and rejected may name {told}; leave one of these out")
    columns, better = found[0]
    return [_preferred(row, columns, better, (), {})]


NAMED_RESPONSES = PreferenceFormat(
    "named_responses",
    ("chosen", "rejected"),
    "response_a, response_b, and chosen, rejected that name them",
    by_any_prompt,
    named_responses,
    holds=lambda row: bool(_named(row)) or _is_tied(row),
    ordered=True,
)
HELPSTEER2 = PreferenceFormat(
    "helpsteer2",
    ("prompt", "response_1", "response_2", "preference_strength"),
    "prompt, response_1, response_2, preference_strength (above 0: the second is better)",
    canonical,
    helpsteer2,
    holds=has_no_sides,
    ordered=True,
)
HELPSTEER3 = PreferenceFormat(
    "helpsteer3",
    ("context", "response1", "response2", "overall_preference"),
    "context, response1, response2, overall_preference (below 0: the first is better)",
    by_any_prompt,
    helpsteer3,
    holds=has_no_sides,
    ordered=True,
)
SHP = PreferenceFormat(
    "shp",
    ("history", "human_ref_A", "human_ref_B", "labels"),
    "history, human_ref_A, human_ref_B, labels (1: A is better)",
    by_any_prompt,
    shp,
    holds=has_no_sides,
    ordered=True,
)
STACK_EXCHANGE = PreferenceFormat(
    "stack_exchange",
    ("question", "response_j", "response_k"),
    "question, response_j (the better one), response_k",
    by_any_prompt,
    stack_exchange,
    holds=has_no_sides,
    ordered=True,
)
ARENA = PreferenceFormat(
    "arena",
    ("prompt", "response_a", "response_b"),
    "prompt, response_a, response_b, winner or winner_model_a and winner_model_b",
    canonical,
    arena,
    holds=lambda row: has_no_sides(row) and ("winner" in row or {"winner_model_a", "winner_model_b"} <= row.keys()),
    ordered=True,
)
ARENA_CONVERSATIONS = PreferenceFormat(
    "arena_conversations",
    ("conversation_a", "conversation_b", "winner"),
    "conversation_a, conversation_b, winner",
    canonical,
    arena_conversations,
    holds=has_no_sides,
    ordered=True,
)
