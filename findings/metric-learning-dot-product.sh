#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0: DotProductSimilarity gives cosines.
#
# Expected: the dot product, beside CosineSimilarity, which is another class.
# Happens: every distance normalizes both sides unless normalize_embeddings=False is said, this one too: the product of
# (3, 0) and (5, 0) is 1.
# Matters: composed image retrieval learns a scale of its features, or compares without normalizing them; its length
# is lost, and its gradient with it.
# Source: BaseDistance in the package's documentation, normalize_embeddings=True.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 pytorch-metric-learning==2.9.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sys

import pytorch_metric_learning
import torch
from pytorch_metric_learning.distances import DotProductSimilarity

query, images = torch.tensor([[3.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 2.0]])
seen = [distance(query, images).tolist() for distance in
        (DotProductSimilarity(), DotProductSimilarity(normalize_embeddings=False))]
print("pytorch-metric-learning", pytorch_metric_learning.__version__, "torch", torch.__version__, seen)
was = [[[1.0, 0.0]], [[15.0, 0.0]]]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
