#!/usr/bin/env bash
# faiss-cpu 1.15.1 and torch 2.13.0: whether the two share their number of threads depends on which is imported first.
#
# Expected: each library has a setting of its own, faiss.omp_set_num_threads and torch.set_num_threads.
# Happens: each package brings an OpenMP library, and the first that is loaded answers for both. Imported after torch,
# FAISS sets torch's threads, too; imported before it, it does not.
# Matters: a search that is held to one thread slows the encoder down for good, and sums in another number of threads
# round otherwise, so that a resumed run is no more the same.
# Source: none found. Seen with the wheels for Linux.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import subprocess
import sys

# Asked once in between, torch has set what it was told: it does so when it is first used.
both = "torch.set_num_threads(4); torch.get_num_threads(); faiss.omp_set_num_threads(3)"
seen = []
for order in "torch, faiss", "faiss, torch":
    program = f"import {order}; {both}; print(torch.__version__, faiss.__version__, torch.get_num_threads())"
    *versions, threads = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    print("torch, faiss", *versions, f"import {order}: torch, told 4 and FAISS then 3, has {threads}")
    seen.append(int(threads))
was = [3, 4]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
