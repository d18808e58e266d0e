#!/usr/bin/env bash
# transformers 5.24.0: a word that is added to CLIP's vocabulary becomes the place where its text is read out.
#
# Expected: the text's feature is taken at its end token, wherever an added word stands.
# Happens: where the configuration says eos_token_id=2, as those of before transformers' pull request 24773 do, the
# feature is taken at the largest id. An added word has a larger one than the end token, so the text ends there, and
# what follows it does not count. With the end token's true id it is right.
# Matters: composed image retrieval without training puts the picture into the text as an added word: "a photo of *,
# but red" is then encoded without "but red".
# Source: a comment in CLIPTextModel.forward, modeling_clip.py, names such configurations.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import sys

import torch
import transformers
from transformers import CLIPTextConfig, CLIPTextModel

start, end, added = 48, 49, 50
texts = torch.tensor([[start, 5, added, 7, 8, end], [start, 5, added, 9, 9, end]])
seen = []
for eos in 2, end:
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=51, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=8, bos_token_id=start, eos_token_id=eos)).eval()
    with torch.no_grad():
        feature, other = model(texts).pooler_output
    seen.append(torch.allclose(feature, other, atol=1e-5))
print("transformers", transformers.__version__, "torch", torch.__version__,
      "texts that differ behind the added word are equal, with eos_token_id=2, with the true one:", seen)
was = [True, False]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
