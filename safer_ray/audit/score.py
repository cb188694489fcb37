"""Raw rows to scores by an auditor bundle alone: read, tokenise, one forward pass, arithmetic."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from safer_ray import schema
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.config.sections import ScoresConfig, SourceConfig
from safer_ray.data.sources import NormalisePairs
from safer_ray.features.bundle import scorer, vector_layers
from safer_ray.features.passes import EncodePairs
from safer_ray.formats.messages import fields_of
from safer_ray.reward.forward import Forward
from safer_ray.reward.referred import reward_folder
from safer_ray.reward.sentences import SideSentences
from safer_ray.reward.text import PairTokens
from safer_ray.reward.tokens import TEXTS, TokenisePairs
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.work import WHOLE, Part

CARRIED = ("source", "section", "labels", "label_margin", "notes")


class PreparePairs:
    """Batch function: raw rows -> pairs, tokenised, their texts beside them as JSON; or reasons to refuse."""

    def __init__(
        self, auditor: Artifact, sources: Sequence[SourceConfig], max_chars: int, reading: Reading = AS_IT_COMES
    ) -> None:
        self.normalise = NormalisePairs(sources, max_chars)
        self.tokenise = TokenisePairs(reward_folder(auditor.path), reading)

    def __call__(self, raw: pa.Table) -> pa.Table:
        rows = self.normalise(raw)
        bad = pc.is_valid(rows["refused"])
        good, refused = rows.filter(pc.invert(bad)), rows.filter(bad)
        said = good.select(TEXTS).to_pylist()
        tokenised = self.tokenise(good.append_column("texts", pa.array(map(schema.to_json, said), pa.string())))
        return pa.concat_tables([tokenised, refused.drop_columns(TEXTS)], promote_options="default")


class AuditPairs(EncodePairs):
    """Batch function: pairs -> SCORES, by one forward pass."""

    def __init__(
        self, auditor: Artifact, config: ScoresConfig, part: Part = WHOLE, reading: Reading = AS_IT_COMES
    ) -> None:
        super().__init__(reward_folder(auditor.path), auditor.path / "sae", part, reading)
        self.auditor = auditor
        self.configure(config)

    def configure(self, config: ScoresConfig) -> None:
        """Score and suspect by another config from now on; the model stays.

        Raises:
            UserError: the bundle holds no such detector.
        """
        score = scorer(self.auditor, config)
        self.add_means(vector_layers(self.auditor) if config.detector == "combined" else [])
        self.score = score

    def coded(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        """Codes, and what else scores are made of."""
        codes = super().finish(pairs, tokens, found)
        for name in ("row_key", "extra"):
            codes = codes.append_column(name, pairs[name])
        return codes

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        return self.score(self.coded(pairs, tokens, found))


class AuditRows(AuditPairs):
    """Batch function: what `PreparePairs` makes -> AUDITED; texts stay with the pairs that are flagged."""

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        rows = super().finish(pairs, tokens, found)
        longest = [max(len(side.ids) - side.n_prompt for side in (t.chosen, t.rejected)) for t in tokens]
        flags, texts, reasons = (column.to_pylist() for column in (rows["flag"], pairs["texts"], rows["reasons"]))
        told = [self._told(*row[1:]) if row[0] else None for row in zip(flags, texts, reasons, strict=True)]
        for name in CARRIED:
            rows = rows.append_column(name, pairs[name])
        rows = rows.append_column("tokens", pa.array(np.array(longest, dtype=np.int32)))
        return rows.append_column("texts", pa.array(told, pa.string()))

    def _told(self, texts: str, reasons: list[dict[str, Any]]) -> str:
        """The texts of a pair with the sentence of each reason."""
        pair = json.loads(texts)
        sides = {side: SideSentences(self.reward.pairs, pair, side) for side in {r["side"] for r in reasons}}
        found = [sides[reason["side"]].ending_at(reason["end"]) for reason in reasons]
        said = {name: [fields_of(message) for message in pair[name] or []] for name in TEXTS}
        return schema.to_json(said | {"sentences": [sentence.text if sentence else "" for sentence in found]})
