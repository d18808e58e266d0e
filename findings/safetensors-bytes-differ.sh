#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors and metadata, saved twice, are two different files.
#
# Expected: the format has no time and no names of machines in it, so that equal content is an equal file.
# Happens: metadata passes through a hash map with a seed of its own for each save, and the header has its entries in
# that order. With one entry the files are equal, with several they hardly ever are.
# Matters: weights are told apart, cached and deduplicated by the digest of their file.
# Source: issue 584 of safetensors/safetensors. The tensors themselves are sorted, by type and name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq safetensors==0.8.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

weights = {"weight": np.ones(3, np.float32)}
several = {str(number): "" for number in range(16)}
files = {save(weights, several) for _ in range(20)}
seen = [len({save(weights, {"format": "np"}) for _ in range(20)}) == 1, len(files) > 1,
        all(np.array_equal(load(file)["weight"], weights["weight"]) for file in files)]
print("safetensors", version("safetensors"), "equal with one entry, unequal with 16, tensors equal:", seen)
was = [True, True, True]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
