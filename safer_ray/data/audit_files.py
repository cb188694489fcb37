"""The files of an audit: beside them, in the same folder, data may lie."""

from safer_ray.storage.artifacts import MANIFEST, PLAN, SCRATCH, SETTINGS_FILE

SCORES, FLAGGED = "scores", "flagged"  # folders
FLAGGED_FILE, SUMMARY, PAGE = "flagged.jsonl", "summary.json", "report.html"
REVIEWS = "reviews.json"
OWN_FILES = (
    SETTINGS_FILE,
    PLAN,
    MANIFEST,
    FLAGGED_FILE,
    SUMMARY,
    PAGE,
    SCORES,
    FLAGGED,
    "quarantine",
    "done",
    *SCRATCH,
)
