#!/usr/bin/env bash
# transformers 5.24.0: ConvBERT's vectors of a text depend on how far its batch is padded, in spite of the mask.
#
# Expected: with attention_mask a text has one vector, alone or beside longer ones, but for rounding.
# Happens: attention is masked, but the convolution beside it runs over the padding, so the words near the text's end
# change. BERT's are equal to rounding, ConvBERT's differ in the third digit, of random weights.
# Matters: sentence vectors that are kept on disk depend on which texts were encoded together.
# Source: ConvBertSelfAttention in modeling_convbert.py.
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
from transformers import AutoModel, BertConfig, ConvBertConfig

small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
text, padding, seen = [5, 6, 7, 8], [0, 0, 0, 0], {}
for config in BertConfig(**small), ConvBertConfig(**small):
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        alone, padded = (model(torch.tensor([ids]), attention_mask=torch.tensor([[1] * 4 + [0] * (len(ids) - 4)]))
                         .last_hidden_state[0, :4] for ids in (text, text + padding))
    seen[config.model_type] = (alone - padded).abs().max().item()
print("transformers", transformers.__version__, "torch", torch.__version__, "largest difference:", seen)
as_it_was = seen["bert"] < 1e-5 and seen["convbert"] > 1e-3
sys.exit(None if as_it_was else "changed: it was below 1e-5 for bert, above 1e-3 for convbert")
EOF
