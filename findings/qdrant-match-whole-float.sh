#!/usr/bin/env bash
# qdrant-client 1.20.0, local mode: a price of 50.0 is not matched by 50, and cannot be matched by 50.0.
#
# Expected: numbers in a payload are JSON numbers, of which 50 and 50.0 are one; Range agrees.
# Happens: match tells integers from floats and finds no float at all, and MatchValue(value=50.0) is refused by the
# client. Range from 50 to 50 finds both.
# Matters: a column of whole numbers with one gap comes out of pandas as floats, and the filter that worked for the
# first table finds nothing for the next.
# Source: values_match in qdrant_client/local/payload_filters.py, which says that the server does so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq qdrant-client==1.20.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sys
from importlib.metadata import version

from qdrant_client import QdrantClient, models

client = QdrantClient(":memory:")
client.create_collection("images", models.VectorParams(size=2, distance=models.Distance.DOT))
client.upsert("images", [models.PointStruct(id=1, vector=[1, 0], payload={"price": 50}),
                         models.PointStruct(id=2, vector=[1, 0], payload={"price": 50.0})])

def found(**condition):
    only = models.Filter(must=[models.FieldCondition(key="price", **condition)])
    return sorted(point.id for point in client.query_points("images", [1.0, 0.0], query_filter=only).points)

seen = [found(match=models.MatchValue(value=50)), found(range=models.Range(gte=50, lte=50))]
try:
    models.MatchValue(value=50.0)
except ValueError as error:
    seen.append(type(error).__name__)
print("qdrant-client", version("qdrant-client"), "match 50, range 50 to 50, match 50.0:", seen)
was = [[1], [1, 2], "ValidationError"]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
