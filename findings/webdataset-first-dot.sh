#!/usr/bin/env bash
# webdataset 1.0.2: photos dress.1.jpg and dress.2.jpg become one sample, and no sample has a jpg.
#
# Expected: what stands before the suffix is the key, as os.path.splitext has it: dress.1 and dress.2.
# Happens: the key ends at the first dot of the file's name. Both photos and both texts are one sample, with the
# fields 1.jpg, 1.txt, 2.jpg and 2.txt, and none that is called jpg.
# Matters: photos of one product are commonly numbered behind a dot; a dot in a folder's name does no harm.
# Source: base_plus_ext in webdataset/tariterators.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq webdataset==1.0.2 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import io
import sys
import tarfile
from importlib.metadata import version

import webdataset

with tarfile.open("shard.tar", "w") as shard:
    for name in "dress.1.jpg", "dress.1.txt", "dress.2.jpg", "dress.2.txt":
        member = tarfile.TarInfo(name)
        member.size = 1
        shard.addfile(member, io.BytesIO(b"x"))

samples = webdataset.WebDataset("shard.tar", shardshuffle=False)
seen = [[sample["__key__"], *sorted(field for field in sample if not field.startswith("_"))] for sample in samples]
print("webdataset", version("webdataset"), seen)
was = [["dress", "1.jpg", "1.txt", "2.jpg", "2.txt"]]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
