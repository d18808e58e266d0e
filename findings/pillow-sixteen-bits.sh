#!/usr/bin/env bash
# Pillow 12.3.0 beside OpenCV 5.0.0: of 16 bits a colour PNG keeps the upper eight, a grey one is clipped white.
#
# Expected: a PNG of 16 bits is scaled to 8, grey or colour, by either library.
# Happens: Pillow scales colour when it opens the file, but opens grey as I;16, whose convert("RGB") clips: all above
# 255, a two-hundred-and-fifty-sixth of the range, is white. OpenCV's imread scales both.
# Matters: convert("RGB") is how every image data set is read; scans, X-rays and depth pictures become white squares,
# and features of them are compared with those of the same file read by OpenCV.
# Source: Pillow's handbook lists I;16 among modes with limited support.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq pillow==12.3.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import sys

import cv2
import numpy as np
import PIL
from PIL import Image

grey = np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16)
cv2.imwrite("grey.png", grey)
cv2.imwrite("colour.png", np.stack([grey] * 3, axis=-1))
seen = {}
for name in "grey.png", "colour.png":
    with Image.open(name) as picture:
        seen[name] = [picture.mode, np.asarray(picture.convert("RGB"))[0, :, 0].tolist(),
                      cv2.imread(name)[0, :, 0].tolist()]
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__, seen)
scaled = [0, 0, 1, 3, 128, 255]
was = {"grey.png": ["I;16", [0, 255, 255, 255, 255, 255], scaled], "colour.png": ["RGB", scaled, scaled]}
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
