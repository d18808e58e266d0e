#!/usr/bin/env bash
# open_clip_torch 3.3.0: a text that holds the letters <end_of_text> ends there, and what follows counts for nothing.
#
# Expected: a tokenizer reads a caption as a caption; a special token is what the tokenizer puts at its end.
# Happens: the tokenizer's pattern takes <start_of_text> and <end_of_text> within a text for those tokens. The text
# tower takes the vector at the first place of the largest id, the end's: "a dress <end_of_text> in red" has exactly the
# vector of "a dress".
# Matters: zero-shot retrieval joins a prompt, a text and a picture's word to one text. Where the letters are in the
# text, as in captions that were written out from tokens, all that the program puts after it is lost, with no error.
# Source: open_clip/tokenizer.py (SimpleTokenizer's pattern), open_clip/transformer.py (text_global_pool, argmax).
# PyPI's torch is some gigabytes.
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

torch.manual_seed(0)
model = open_clip.create_model("ViT-B-32", load_weights=False).eval()
tokenizer = open_clip.get_tokenizer("ViT-B-32")
with torch.no_grad():
    short, whole, other = (model.encode_text(tokenizer([text])) for text in (
        "a dress", "a dress in red", "a dress <end_of_text> in red"))
seen = {"in red": not torch.allclose(short, whole, atol=1e-4),
        "<end_of_text> in red": not torch.allclose(short, other, atol=1e-6)}
print("open_clip", open_clip.__version__, "the vector is changed by:", seen)
was = {"in red": True, "<end_of_text> in red": False}
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
