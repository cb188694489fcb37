"""What a bundle is and where it came from, read of its files without any model."""

from pathlib import Path
from typing import Any

from scipy.special import betaincinv

from safer_ray.config.reading import FLOAT32
from safer_ray.errors import UserError
from safer_ray.features.bundle import DETECTOR, VALUES
from safer_ray.reward.reading import DTYPE, SETTINGS
from safer_ray.reward.referred import REFERENCE
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.files import as_path, read_json
from safer_ray.storage.marks import MANIFEST
from safer_ray.storage.recipes import read_manifest

SIGNS = ("safe", "unsafe")
QUANTILE = 0.05  # at which the share of flags is told


def flag_interval(quantile: float, worth: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval in which the share of new pairs lies that are flagged at a quantile of a reference that is
    worth so many independent pairs, where the new pairs are like those: in [0, 1].

    New pairs are flagged below the k-th lowest of the n draws, k - 1 being n times the quantile, rounded down; the
    share of a distribution that lies there has a beta distribution, of k and n + 1 - k.
    """
    rank = int(quantile * worth + 1e-9) + 1
    if rank > worth:
        return float(quantile == 1), 1.0  # the highest draw, or none, bounds them
    tail = (1 - confidence) / 2
    low, high = (float(betaincinv(rank, worth + 1 - rank, share)) for share in (tail, 1 - tail))
    return low, high


def reference_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a bundle's manifest says of its reference: `kind`, `pairs`, `prompts`, and by detector the interval
    of `flag_interval` at a quantile of 5%; where margins are of other pairs, `reward_margin` has their kind, pairs and
    prompts. Bundles of old say less."""
    told = dict(manifest.get("metrics", {}).get("reference", {}))
    worth = told.pop("worth", {})
    names = {"score": "safer", "reward_margin": "reward_margin", "combined": "combined"}
    intervals = {
        names[name]: list(flag_interval(QUANTILE, value))
        for name, value in worth.items()
        if name in names and told.get(name, told).get("kind") != "in sample"
    }
    return {"kind": "not recorded", "pairs": manifest.get("rows", {}).get("reference")} | told | {"flags": intervals}


def expected_flags(auditor: Artifact, detector: str, quantile: float, pairs: int) -> dict[str, Any]:
    """Return of which kind the reference of a detector is, its pairs, and the interval (`low`, `high`) in which the
    share of flags among new pairs lies that are like those of the reference; None where the bundle does not say it."""
    known = auditor.metrics.get("reference", {})
    kind = "out of fold" if detector == "combined" else known.get(detector, known).get("kind", "not recorded")
    worth = known.get("worth", {}).get("score" if detector == "safer" else detector)
    # Pairs that made the bundle are no sample of new ones: of these more are flagged, nobody knows how many.
    low, high = flag_interval(quantile, worth) if worth and kind != "in sample" else (None, None)
    return {"kind": kind, "pairs": pairs, "low": low, "high": high}


def _optional(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def bundle_facts(folder: str | Path) -> dict[str, Any]:
    """Return what a bundle is, as JSON holds it; of a folder, or in an object store.

    Raises:
        UserError: there is no bundle.
    """
    place = as_path(folder)
    manifest = read_manifest(place) if (place / MANIFEST).exists() else {}
    if manifest.get("stage") != "auditor":
        raise UserError(f"{folder} is no auditor bundle; pass the folder of stage `auditor`, say runs/NAME/auditor-…")
    config, reading = _optional(place / "reward" / "config.json"), _optional(place / "reward" / SETTINGS)
    made, coder = _optional(place / "reward" / MANIFEST), _optional(place / "sae" / "cfg.json")
    features = _optional(place / "features.json")
    referred = _optional(place / "reward" / REFERENCE)
    text = config.get("text_config") or config
    facts = manifest.get("metrics", {})
    return {
        "name": manifest["name"],
        "format": facts.get("format"),
        "model": {
            "named": made.get("metrics", {}).get("use"),
            "architecture": (config.get("architectures") or [None])[0],
            "blocks": text.get("num_hidden_layers"),
            "hidden": text.get("hidden_size"),
            DTYPE: facts.get(DTYPE, FLOAT32),
            "trained_here": bool(made) and "use" not in made.get("metrics", {}),
            "weights": referred.get("files") or made.get("metrics", {}).get("files"),
            "held_by": "reference" if referred else "copy",
            "own_code": facts.get("own_code", []),
        },
        "reading": reading | {"sentence_ends": facts.get("sentence_ends", "ascii")},
        "sae": {
            "layer": coder.get("metadata", {}).get("safer_ray_layer"),
            "architecture": coder.get("architecture"),
            "latents": coder.get("d_sae"),
            "k": coder.get("k"),
        },
        "features": {"mode": features.get("mode")} | {name: features.get(name, []) for name in SIGNS},
        "reference": reference_facts(manifest),
        "detectors": ["safer", "reward_margin", *(["combined"] if (place / DETECTOR / VALUES).exists() else [])],
        "flags_by": "combined" if (place / DETECTOR / VALUES).exists() else "reward_margin",
        "data": facts.get("data", []),
        "licences": manifest.get("licence", []),
        "red_team": manifest.get("red_team", False),
        "made_from": manifest.get("inputs", {}),
        "packages": manifest.get("packages", {}),
    }


def in_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a bundle's facts as names and values, each fit for a line."""
    model, sae, reference, reading = facts["model"], facts["sae"], facts["reference"], facts["reading"]
    origin = "trained here" if model["trained_here"] else model["named"] or "from a folder"
    arguments = ", ".join(f"{name} {value}" for name, value in reading.get("arguments", {}).items())
    hashes = [f"{name} sha256 {found['sha256'][:12]}" for name, found in (model["weights"] or {}).items()]
    lines = [
        ("bundle", f"{facts['name']}, format {facts['format']}"),
        ("model", f"{model['architecture']}, {model['blocks']} blocks of {model['hidden']}, {origin}"),
        (
            "weights",
            f"{model['held_by']}, computes in {model['dtype']}" + (f"; {', '.join(hashes[:3])}" if hashes else ""),
        ),
        ("text", f"template {reading.get('template', 'auto')}" + (f" ({arguments})" if arguments else "")),
        ("", f"up to {_count(reading.get('max_length'))} tokens, sentence ends {reading['sentence_ends']}"),
        ("layer", f"{sae['layer']}"),
        ("SAE", f"{sae['architecture']}, {_count(sae['latents'])} latents, k {sae['k']}"),
        ("features", _features(facts["features"])),
        ("reference", _reference(reference)),
        *([("", f"margins: {_reference(reference['reward_margin'])}")] if "reward_margin" in reference else []),
        *(("", _flags(name, *interval)) for name, interval in reference["flags"].items()),
        ("detectors", ", ".join(facts["detectors"]) + f"; {facts['flags_by']} flags where none is named"),
        *(("data", _source(source)) for source in facts["data"]),
        ("licences", ", ".join(facts["licences"]) or "none recorded"),
        ("made by", ", ".join(f"{name} {version}" for name, version in facts["packages"].items())),
    ]
    if model["own_code"]:
        lines.append(("own code", ", ".join(model["own_code"])))
    if facts["red_team"]:
        lines.append(("red team", "made from pairs that were poisoned on purpose"))
    return lines


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _features(found: dict[str, Any]) -> str:
    told = [f"{len(found[name])} {name}: {' '.join(map(str, found[name][:12]))}" for name in SIGNS if found[name]]
    return f"mode {found['mode']}; {'; '.join(told)}"


def _source(found: dict[str, Any]) -> str:
    told = {"part": found["part"], "section": found["section"], "licence": found["licence"]}
    named = ", ".join(f"{name} {value}" for name, value in told.items() if value not in (None, "all"))
    return f"{found['name'] or found['format']}: {found['input']}" + (f" ({named})" if named else "")


def _flags(name: str, low: float, high: float) -> str:
    return f"{name} flags {low:.1%} to {high:.1%} of new pairs like these at {QUANTILE:.0%} (95% interval)"


def _reference(found: dict[str, Any]) -> str:
    pairs = f"{found['pairs']:,} pairs" if isinstance(found["pairs"], int) else "pairs"
    prompts = f" of {found['prompts']:,} prompts" if "prompts" in found else ""
    more = ": of new pairs more are flagged" if found["kind"] == "in sample" else ""
    return f"{pairs}{prompts}, {found['kind']}{more}"
