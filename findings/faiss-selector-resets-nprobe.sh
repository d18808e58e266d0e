#!/usr/bin/env bash
# faiss-cpu 1.15.1: a search among chosen ids in an IVF index looks at one cell, whatever index.nprobe says.
#
# Expected: SearchParametersIVF(sel=selector) changes what it names, the selector, and leaves index.nprobe as set.
# Happens: the parameters replace all of the index's own: nprobe is 1 unless it is given there too. With every id
# chosen the answer is that of a single cell.
# Matters: "among dresses below 50" then finds fewer and worse results than without the filter, which looks like the
# model's fault; the recall of the index, measured without a filter, is fine.
# Source: struct SearchParametersIVF in faiss/IndexIVF.h.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sys

import faiss
import numpy as np

vectors = np.random.default_rng(0).standard_normal((5000, 32), dtype=np.float32)
faiss.normalize_L2(vectors)
index = faiss.index_factory(32, "IVF50,Flat", faiss.METRIC_INNER_PRODUCT)
index.train(vectors)
index.add(vectors)
queries, everything = vectors[:100], faiss.IDSelectorRange(0, 5000)

index.nprobe = 1
_, one_cell = index.search(queries, 10)
index.nprobe = 50
_, all_cells = index.search(queries, 10)
_, chosen = index.search(queries, 10, params=faiss.SearchParametersIVF(sel=everything))
_, told = index.search(queries, 10, params=faiss.SearchParametersIVF(sel=everything, nprobe=50))
seen = [np.array_equal(chosen, one_cell), np.array_equal(chosen, all_cells), np.array_equal(told, all_cells)]
print("faiss", faiss.__version__, "nprobe 50; with a selector of all ids as one cell, as all; nprobe said again:", seen)
was = [True, False, True]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
