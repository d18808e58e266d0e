#!/usr/bin/env bash
# tensorboardX 2.6.5: add_embedding makes white squares of pictures in uint8.
#
# Expected: label_img takes what add_image takes: floats of 0 to 1, or uint8 of 0 to 255, told apart by their type.
# Happens: add_image tells them apart; add_embedding multiplies every type by 255 and clips, so that each pixel that is
# not 0 is 255. Nothing is raised, and the projector shows points as blank squares.
# Matters: pictures that have just been decoded are uint8, and the projector is where one looks at an image encoder.
# Source: make_sprite in tensorboardX/embedding.py, beside convert_to_HWC and image in summary.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq tensorboardX==2.6.5 pillow==12.3.0
cd "$work"
venv/bin/python - <<'EOF'
import glob
import sys

import numpy as np
import tensorboardX
from PIL import Image

grey = np.full((4, 3, 8, 8), 51, np.uint8)      # 51 is a fifth of 255
with tensorboardX.SummaryWriter("run") as writer:
    writer.add_embedding(np.eye(4), label_img=grey, global_step=1)
    writer.add_embedding(np.eye(4), label_img=grey / 255, global_step=2)

seen = [np.unique(np.asarray(Image.open(path))).tolist() for path in sorted(glob.glob("run/*/*/sprite.png"))]
print("tensorboardX", tensorboardX.__version__, "sprite of 51 in uint8, and of 0.2:", seen)
was = [[255], [51]]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
