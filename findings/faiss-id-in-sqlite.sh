#!/usr/bin/env bash
# faiss-cpu 1.15.1, NumPy 2.4.6 and Python's sqlite3: an id that FAISS has found finds no row.
#
# Expected: a NumPy integer is bound as an integer, or refused: sqlite3 raises for types that it does not know.
# Happens: numpy.int64 has the buffer protocol, so sqlite3 binds its eight bytes as a BLOB. "WHERE id = ?" then matches
# nothing, and an INSERT into a column of INTEGER affinity keeps the bytes. Nothing is raised.
# Matters: FAISS answers int64 and a gallery's paths lie in SQLite, so each search comes back empty; int(id) or
# ids.tolist() mends it.
# Source: sqlite3's table of types names bytes-like objects for BLOB, and Python's own int for INTEGER.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sqlite3
import sys

import faiss
import numpy as np

index = faiss.IndexFlatIP(4)
index.add(np.eye(4, dtype=np.float32))
_, ((found,),) = index.search(np.eye(4, dtype=np.float32)[2:3], 1)

database = sqlite3.connect(":memory:")
database.execute("CREATE TABLE images (id INTEGER, path TEXT)")
database.executemany("INSERT INTO images VALUES (?, ?)", [(number, f"{number}.jpg") for number in range(4)])
asked = "SELECT path FROM images WHERE id = ?"
database.execute("INSERT INTO images VALUES (?, 'new.jpg')", (found,))
seen = [type(found).__name__, database.execute(asked, (int(found),)).fetchall(),
        database.execute("SELECT typeof(id) FROM images WHERE path = 'new.jpg'").fetchone()[0]]
database.execute("DELETE FROM images WHERE path = 'new.jpg'")
seen.append(database.execute(asked, (found,)).fetchall())
print("faiss", faiss.__version__, "numpy", np.__version__, "Python", sys.version.split()[0], seen)
was = ["int64", [("2.jpg",)], "blob", []]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
