#!/usr/bin/env bash
# datasets 5.2.0: a class that is called train hides all other classes, and its own name.
#
# Expected: a folder of folders is a data set of classes: three folders give three labels.
# Happens: folder and file names are first searched for train, test, val, dev and the like as words. If one is found,
# only what has such a word is read, as that split, and the labels are gone. "test tube" and "dress_test_2.jpg" do so
# as well. No warning.
# Matters: train is a class of COCO, and a photograph's name may hold any word.
# Source: KEYWORDS_IN_DIR_NAME_BASE_PATTERNS in datasets/data_files.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq datasets==5.2.0 pillow==12.3.0 numpy==2.4.6
cd "$work"
HF_HOME="$work/hub" HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import os
import sys

import datasets
from PIL import Image

datasets.disable_progress_bars()
seen = []
for third in "tram", "train":
    for label in "bus", "car", third:
        os.makedirs(f"{third}/{label}")
        for number in range(2):
            Image.new("RGB", (8, 8)).save(f"{third}/{label}/{number}.jpg")
    made = datasets.load_dataset("imagefolder", data_dir=third)
    seen.append({name: (len(split), split.features["label"].names if "label" in split.features else None)
                 for name, split in made.items()})
print("datasets", datasets.__version__, seen)
was = [{"train": (6, ["bus", "car", "tram"])}, {"train": (2, None)}]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
