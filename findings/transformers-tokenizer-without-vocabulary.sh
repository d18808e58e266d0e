#!/usr/bin/env bash
# transformers 5.24.0: a model's folder without its vocabulary has a tokenizer all the same.
#
# Expected: AutoTokenizer raises where neither vocab.txt nor tokenizer.json is there.
# Happens: it makes one of the five special tokens. Every word of every text is [UNK], so texts of as many words have
# one vector.
# Matters: who copies config.json and model.safetensors alone trains a composer whose texts all say the same.
# Source: none found.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq transformers==5.24.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
import sys

import transformers

json.dump({"model_type": "bert"}, open("config.json", "w"))
tokenizer = transformers.AutoTokenizer.from_pretrained(".")
seen = [len(tokenizer), *(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
                          for text in ("is red", "has sleeves"))]
print("transformers", transformers.__version__, type(tokenizer).__name__, seen)
unknown = ["[CLS]", "[UNK]", "[UNK]", "[SEP]"]
was = [5, unknown, unknown]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
