"""Write the synthetic preference corpus that the demo trains on.

Pairs are put together from the word lists in ``data/corpus.yaml``.  Harmful requests are
abstract and compliance carries no usable detail.  Both sides of a pair draw on shared
sentences and on like lengths, so that neither a single word nor the length tells chosen
from rejected.

A small share of the harmful pairs is *emphatic*: a marked prompt, nothing but the plainest refusals on one side and the
plainest compliance on the other.  They teach safety most, so a targeted flip takes them first, and a model can unlearn
them without unlearning the rest.  Held-out pairs hold twice the share.  The corpus is built to make that effect
visible; it is no evidence that real data have such pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from safer_ray.errors import UserError

WORDS_PATH = Path(__file__).parent / "corpus.yaml"
BENIGN_SHARE = 0.20
EMPHATIC_SHARE = 0.075
HELDOUT_EMPHATIC_SHARE = 0.15  # more of what flips unlearn, so that it is measured on enough pairs
MULTI_TURN_SHARE = 0.08
PREFIX_SHARE = 0.25
PROBE_EXCHANGES = 72
DRAWS = 2000  # of a request, before all of them are taken to be used
MAX_RESPONSE_CHARS = 20_000
# Aimed-at lengths.  Compliance pools run longer, so its aim is lower and the outcome alike.
CHOSEN_WORDS = (18, 33)
REJECTED_WORDS = (17, 32)

# Each style is a weight and the pools its sentences come from; "?" marks a coin toss.
Recipes = dict[str, tuple[float, str]]
REFUSALS: Recipes = {
    "plain": (28, "neutral refuse neutral alternative?"),
    "caring": (22, "neutral care neutral refuse?"),
    "curt": (15, "neutral refuse neutral?"),
    "mixed": (30, "neutral sure_but_no neutral? alternative?"),
    "redirect": (5, "neutral neutral? redirect neutral"),
}
COMPLIANCES: Recipes = {
    "eager": (28, "neutral comply neutral step?"),
    "hedged": (22, "neutral hedge neutral"),
    "partial": (20, "neutral partial neutral? close?"),
    "dry": (16, "neutral step neutral? step?"),
    "polite": (14, "neutral care? comply neutral? dark?"),
}
HELPFUL_ANSWERS: Recipes = {
    "direct": (45, "comply tip step? close?"),
    "stepwise": (20, "comply step step? close?"),
    "reflective": (20, "neutral step tip close?"),
    "modest": (15, "partial tip step? close?"),
}
EMPHATIC_REFUSAL = "emphatic_no emphatic_no emphatic_no?"
EMPHATIC_COMPLIANCE = "emphatic_yes emphatic_step emphatic_step?"
CHAT_ANSWERS: Recipes = {
    "warm": (50, "chat_open fact fact chat_close?"),
    "plain": (50, "fact fact fact? chat_close?"),
}
POOR_CHAT_ANSWERS: Recipes = {
    "off_topic": (10, "chat_open? stray stray chat_close?"),
    "vague": (30, "chat_open? vague vague vague?"),
    "rude": (25, "rude fact? rude vague?"),
    "repetitive": (20, "echo echo echo?"),
    "truncated": (15, "chat_open? fact fact cut"),
}

Row = dict[str, Any]


def load_words() -> dict[str, Any]:
    """Read the word lists."""
    words: dict[str, Any] = yaml.safe_load(WORDS_PATH.read_text(encoding="utf-8"))
    return words


@dataclass
class Sampler:
    """Draws prompts and responses for one split."""

    words: dict[str, Any]
    rng: random.Random
    split: str
    used: set[str] = field(default_factory=set)

    def visible(self, items: list[Any]) -> list[Any]:
        """Hide the last tenth of a list, at least one item, from the training split."""
        return items[: len(items) - max(1, len(items) // 10)] if self.split == "train" else items

    def names(self, group: str) -> list[str]:
        """Themes or topics that may occur in this split."""
        allowed = {"train": {"any"}, "heldout": {"any", "heldout"}, "probe": {"probe"}}[self.split]
        return [name for name, entry in self.words[group].items() if entry.get("split", "any") in allowed]

    def style(self, recipes: Recipes) -> str:
        """Draw a style by weight."""
        return self.rng.choices(list(recipes), [weight for weight, _ in recipes.values()])[0]

    def prompt(self, acts: list[str], prefix: str | None = None) -> tuple[list[dict[str, str]], str]:
        """Draw a request that no split has used yet, with the act it names.

        Raises:
            UserError: all that can be drawn seem to be used.
        """
        for _ in range(DRAWS):
            act = self.rng.choice(acts)
            text = self.rng.choice(self.visible(self.words["ask_templates"])).format(act=act)
            if prefix is not None:
                text = f"{prefix} {text}"
            elif self.rng.random() < PREFIX_SHARE:
                text = f"{self.rng.choice(self.visible(self.words['ask_prefixes']))} {text}"
            if text not in self.used:
                break
        else:
            raise UserError(
                f"the synthetic corpus has no {self.split} requests left after {len(self.used):,}; lower "
                "corpus.train_per_section or corpus.heldout_per_section"
            )
        self.used.add(text)
        turns = [{"role": "user", "content": text}]
        if self.split != "probe" and self.rng.random() < MULTI_TURN_SHARE:
            asked, answered = self.rng.choice(self.words["multi_turn"])
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}, *turns]
        return turns, act

    def draft(self, parts: str, slots: dict[str, Any]) -> str:
        """Put one response together from the pools named in ``parts``."""
        sentences: list[str] = []
        for part in parts.split():
            if part.endswith("?") and self.rng.random() < 0.5:
                continue
            pool = slots.get(part.rstrip("?")) or self.visible(self.words[part.rstrip("?")])
            fresh = [sentence for sentence in pool if sentence not in sentences]
            sentences.append(self.rng.choice(fresh or pool))
        return " ".join(sentences).format(act=slots.get("act"), noun=slots.get("noun"), alt=slots.get("alt"))

    def pair(self, chosen: str, rejected: str, slots: dict[str, Any]) -> tuple[str, str]:
        """Draft both sides, each as near as twelve tries get to a random length."""
        sides = []
        for parts, bounds in ((chosen, CHOSEN_WORDS), (rejected, REJECTED_WORDS)):
            words = self.rng.randint(*bounds)
            drafts = [self.draft(parts, slots) for _ in range(12)]
            sides.append(min(drafts, key=lambda text: abs(len(text.split()) - words)))
        return sides[0], sides[1]


def _labels(category: str, kind: str, style: str, rejected_style: str) -> dict[str, str]:
    return {"harm_category": category, "kind": kind, "style": style, "rejected_style": rejected_style}


def harmful_row(sampler: Sampler, style: str | None = None) -> Row:
    """A harmful request, refused in the chosen response and met in the rejected one."""
    name = sampler.rng.choice(sampler.names("themes"))
    theme = sampler.words["themes"][name]
    prefix = sampler.rng.choice(sampler.words["emphatic_prefixes"]) if style == "emphatic" else None
    prompt, act = sampler.prompt(sampler.visible(theme["acts"]), prefix)
    slots = {"act": act, "noun": theme["noun"], "alt": theme["alt"]}
    if style == "emphatic":
        chosen, rejected = sampler.pair(EMPHATIC_REFUSAL, EMPHATIC_COMPLIANCE, slots)
        labels = _labels(name, "harmful", style, style)
    else:
        style, rejected_style = style or sampler.style(REFUSALS), sampler.style(COMPLIANCES)
        chosen, rejected = sampler.pair(REFUSALS[style][1], COMPLIANCES[rejected_style][1], slots)
        labels = _labels(name, "harmful", style, rejected_style)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "section": "safety", "labels": labels}


def benign_row(sampler: Sampler) -> Row:
    """A harmless look-alike, answered in the chosen response and refused in the rejected one."""
    name = sampler.rng.choice(sampler.names("themes"))
    theme = sampler.words["themes"][name]
    prompt, act = sampler.prompt(sampler.visible(list(theme["benign"])))
    slots = {"act": act, "noun": theme["noun"], "alt": theme["alt"], "tip": [theme["benign"][act]]}
    style, rejected_style = sampler.style(HELPFUL_ANSWERS), sampler.style(REFUSALS)
    chosen, rejected = sampler.pair(HELPFUL_ANSWERS[style][1], REFUSALS[rejected_style][1], slots)
    labels = _labels(name, "benign", style, rejected_style)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "section": "safety", "labels": labels}


def chat_row(sampler: Sampler) -> Row:
    """An everyday question with a good and a poor answer."""
    name = sampler.rng.choice(sampler.names("topics"))
    other = sampler.rng.choice([topic for topic in sampler.names("topics") if topic != name])
    facts = sampler.words["topics"][name]["facts"]
    prompt, act = sampler.prompt(sampler.visible(sampler.words["topics"][name]["acts"]))
    cut = " ".join(sampler.rng.choice(facts).split()[:4]).rstrip(".,")
    slots = {
        "act": act,
        "fact": facts,
        "stray": sampler.words["topics"][other]["facts"],
        "echo": [sampler.rng.choice(facts)],
        "cut": [cut],
    }
    style, rejected_style = sampler.style(CHAT_ANSWERS), sampler.style(POOR_CHAT_ANSWERS)
    chosen, rejected = sampler.pair(CHAT_ANSWERS[style][1], POOR_CHAT_ANSWERS[rejected_style][1], slots)
    labels = _labels("none", "chat", style, rejected_style)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "section": "chat", "labels": labels}


def split_rows(sampler: Sampler, per_section: int, emphatic_share: float) -> list[Row]:
    """Good rows of one split, shuffled and numbered."""
    benign = round(per_section * BENIGN_SHARE)
    emphatic = round((per_section - benign) * emphatic_share)
    makers: list[tuple[Callable[[Sampler], Row], int]] = [
        (partial(harmful_row, style="emphatic"), emphatic),
        (harmful_row, per_section - benign - emphatic),
        (benign_row, benign),
        (chat_row, per_section),
    ]
    rows = [make(sampler) for make, count in makers for _ in range(count)]
    sampler.rng.shuffle(rows)
    return [{"id": f"{sampler.split}-{number:05d}", **row} for number, row in enumerate(rows)]


def broken_lines(sampler: Sampler, taken_id: str) -> dict[str, bytes]:
    """One unusable line for each kind of fault that a loader has to catch."""

    def line(kind: str, **changes: Any) -> bytes:
        row = {"id": f"broken-{kind}", **chat_row(sampler), **changes}
        return json.dumps({key: value for key, value in row.items() if value is not None}).encode()

    return {
        "missing_chosen": line("missing_chosen", chosen=None),
        "empty_text": line("empty_text", rejected="   "),
        "equal_responses": line("equal_responses", chosen="The same answer.", rejected="The same answer."),
        "wrong_type": line("wrong_type", chosen=17),
        "duplicate_id": line("duplicate_id", id=taken_id),
        "broken_json": line("broken_json")[:-20],
        "over_long": line("over_long", chosen="A very long answer. " * (MAX_RESPONSE_CHARS // 19)),
        "invalid_utf8": line("invalid_utf8").replace(b'"chosen": "', b'"chosen": "\xff\xfe '),
    }


def probe_exchanges(sampler: Sampler) -> list[Row]:
    """Matched safe and unsafe exchanges that give every refusal style the same room."""
    benign = round(PROBE_EXCHANGES * 0.3)
    styles = ["emphatic", *REFUSALS]
    rows = [harmful_row(sampler, styles[number % len(styles)]) for number in range(PROBE_EXCHANGES - benign)]
    rows += [benign_row(sampler) for _ in range(benign)]
    return [
        {
            "id": f"{row['labels']['harm_category']}-{number}",
            "category": row["labels"]["harm_category"],
            "kind": row["labels"]["kind"],
            "prompt": row["prompt"][-1]["content"],
            "safe": row["chosen"],
            "unsafe": row["rejected"],
        }
        for number, row in enumerate(rows)
    ]


def write_corpus(
    directory: Path, *, train_per_section: int = 2000, heldout_per_section: int = 1000, seed: int = 0
) -> dict[str, int]:
    """Write train.jsonl, heldout.jsonl and probe.yaml; return how many of each row were written."""
    words, used = load_words(), set[str]()
    samplers = {
        split: Sampler(words, random.Random(f"{seed}/{split}"), split, used) for split in ("train", "heldout", "probe")
    }
    train = split_rows(samplers["train"], train_per_section, EMPHATIC_SHARE)
    heldout = split_rows(samplers["heldout"], heldout_per_section, HELDOUT_EMPHATIC_SHARE)
    exchanges = probe_exchanges(samplers["probe"])
    lines = [json.dumps(row).encode() for row in train]
    broken = broken_lines(samplers["train"], train[0]["id"])
    for bad in broken.values():
        lines.insert(samplers["train"].rng.randint(1, len(lines)), bad)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (directory / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout), encoding="utf-8")
    probe = {
        "concept": "safety",
        "description": "Synthetic matched exchanges on themes that the corpus does not use.",
        "exchanges": exchanges,
    }
    (directory / "probe.yaml").write_text(yaml.safe_dump(probe, sort_keys=False, width=120), encoding="utf-8")
    return {"train": len(train), "heldout": len(heldout), "broken": len(broken), "probe": len(exchanges)}
