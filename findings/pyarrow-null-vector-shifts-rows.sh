#!/usr/bin/env bash
# pyarrow 26.0.1: one image without a vector, and all vectors after it belong to other images.
#
# Expected: a column of vectors of a fixed size, flattened and reshaped to (-1, size), has a row for each of its rows.
# Happens: flatten() leaves null rows out, so what follows moves up by one. The other way, .values, keeps the null's
# place, but on a slice gives the whole column, not the slice. Neither raises.
# Matters: vectors travel between vector databases as Parquet, next to a column of paths.
# Source: the docstrings of FixedSizeListArray.flatten and .values.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq pyarrow==26.0.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sys

import pyarrow
from pyarrow import parquet

vectors = pyarrow.array([[1.0, 1.0], None, [3.0, 3.0], [4.0, 4.0]], pyarrow.list_(pyarrow.float32(), 2))
parquet.write_table(pyarrow.table({"path": ["1.jpg", "2.jpg", "3.jpg", "4.jpg"], "vector": vectors}), "v.parquet")

column = parquet.read_table("v.parquet")["vector"].combine_chunks()
flat = column.flatten().to_numpy().reshape(-1, 2)[:, 0].tolist()
sliced = len(column[2:].values) // 2
print("pyarrow", pyarrow.__version__, "4 rows, the second null, flattened:", flat, "values of the last 2:", sliced)
was = ([1.0, 3.0, 4.0], 4)
sys.exit(None if (flat, sliced) == was else f"changed: it was {was}")
EOF
