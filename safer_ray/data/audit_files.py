"""The files of an audit: beside them, in the same folder, data may lie."""

from safer_ray.storage.artifacts import ASKED, MANIFEST, PLAN, SCRATCH

SCORES, FLAGGED = "scores", "flagged"  # folders
LISTED, SUMMARY, PAGE = "flagged.jsonl", "summary.json", "report.html"
REVIEWS = "reviews.json"
OWN = (ASKED, PLAN, MANIFEST, LISTED, SUMMARY, PAGE, SCORES, FLAGGED, "quarantine", "done", *SCRATCH)
