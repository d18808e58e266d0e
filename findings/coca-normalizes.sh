#!/usr/bin/env bash
# open_clip_torch 3.3.0: encode_image of a CoCa model gives unit vectors, of a CLIP model it does not.
#
# Expected: one method of one factory's models has one default: encode_image(images) is the bare feature.
# Happens: normalize is False by default in CLIP and CustomTextCLIP, and True in CoCa, for images and for texts.
# Matters: sums of image and text features, the simplest baseline of composed retrieval, weigh the two sides by their
# lengths in one model and equally in the other; so does any composer over features that were kept.
# Source: open_clip/model.py and open_clip/coca_model.py. PyPI's torch is some gigabytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import sys

import open_clip
import torch

seen = {}
for name in "ViT-B-32", "coca_ViT-B-32":
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval()
    with torch.no_grad():
        length = model.encode_image(torch.rand(1, 3, 224, 224)).norm().item()
    seen[name] = abs(length - 1) < 1e-5
    print("open_clip", open_clip.__version__, name, f"length {length:.4f}")
was = {"ViT-B-32": False, "coca_ViT-B-32": True}
sys.exit(None if seen == was else f"changed: of length 1 were {was}")
EOF
