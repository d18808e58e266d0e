#!/usr/bin/env bash
# torch 2.13.0: after torch.onnx.export a model that makes a table at its first call answers without numbers.
#
# Expected: an export reads the model; afterwards it gives what it gave before.
# Happens: what is first made while it is traced, and kept in a buffer, is a FakeTensor, a shape without values. It
# stays, and from then on the model returns FakeTensors, without an error, until one looks at a number. A model that
# was called once before it is exported is left alone.
# Matters: tables of positions, masks and rotary angles are commonly made at the first call, and an exported model is
# compared with its original right afterwards.
# Source: none found. What is kept in a plain attribute is taken back, a registered buffer is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2
cd "$work"
venv/bin/python - <<'EOF'
import logging
import sys
import warnings

import torch

logging.disable(logging.WARNING)                # onnxscript's, of a torchvision that is not there
warnings.simplefilter("ignore", FutureWarning)  # torch's, of itself

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, features):
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.arange(4.0), persistent=False)
        return self.layer(features) + self.positions

features, seen = torch.zeros(2, 4), []
for called_before in True, False:
    encoder = Encoder().eval()
    if called_before:
        encoder(features)
    torch.onnx.export(encoder, (features,), "encoder.onnx", dynamo=True, verbose=False)
    seen.append(type(encoder(features)).__name__)
print("torch", torch.__version__, "answers after an export, of a model called before, and of one that was not:", seen)
was = ["Tensor", "FakeTensor"]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
