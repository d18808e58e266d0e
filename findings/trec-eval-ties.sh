#!/usr/bin/env bash
# pytrec_eval-terrier 0.5.11 (trec_eval): scores are compared in float32, and ties go to the last name.
#
# Expected: the ranking is the one of the scores as given, or of the order as given.
# Happens: trec_eval keeps scores in single precision and sorts by them, then by name, Z first. Of two images whose
# cosines differ in the ninth digit the better one comes second; of three equal ones the last name has rank 1.
# Matters: cosines of near-duplicates are that near, and a collapsed model, to which all images are equal, is scored by
# the names of the files.
# Source: none in pytrec_eval; form_res_rels.c of trec_eval.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq pytrec_eval-terrier==0.5.11 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sys
from importlib.metadata import version

from pytrec_eval import RelevanceEvaluator

def reciprocal_rank(right, scores):
    return RelevanceEvaluator({"query": {right: 1}}, {"recip_rank"}).evaluate({"query": scores})["query"]["recip_rank"]

near = {"a.jpg": 0.912345671, "b.jpg": 0.912345670}
equal = {"a.jpg": 0.5, "b.jpg": 0.5, "c.jpg": 0.5}
seen = [max(near, key=near.get), reciprocal_rank("a.jpg", near),
        *(round(reciprocal_rank(name, equal), 3) for name in equal)]
print("pytrec_eval", version("pytrec_eval-terrier"), "best by score, its reciprocal rank; of three equal ones:", seen)
was = ["a.jpg", 0.5, 0.333, 0.5, 1.0]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
