"""Pairs to scores by an auditor bundle alone."""

import pyarrow as pa

from safer_ray.artifacts import Artifact
from safer_ray.auditor import scorer
from safer_ray.config import ScoresConfig
from safer_ray.errors import UserError
from safer_ray.passes import EncodePairs, MeanVectors
from safer_ray.reward import Forward
from safer_ray.runner import WHOLE, Part
from safer_ray.text import PairTokens


class AuditPairs(EncodePairs):
    """Batch function: pairs -> SCORES: one forward pass, and one more where the detector reads mean vectors."""

    def __init__(self, auditor: Artifact, config: ScoresConfig, part: Part = WHOLE) -> None:
        super().__init__(auditor.path / "reward", auditor.path / "sae", part)
        self.score = scorer(auditor, config)
        layers = auditor.metrics.get("vector_layers", []) if config.detector == "combined" else []
        if layers and part.of > 1:
            raise UserError(
                "the `combined` detector reads mean vectors, which a model in parts does not give; choose another"
            )
        self.vectors = MeanVectors(auditor.path / "reward", layers) if layers else None

    def finish(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        codes = super().finish(pairs, tokens, found)
        for name in ("row_key", "extra"):
            codes = codes.append_column(name, pairs[name])
        if self.vectors is not None:
            means = self.vectors(pairs)
            for name in ("response", "prompt"):
                codes = codes.append_column(name, means[name])
        return self.score(codes)
