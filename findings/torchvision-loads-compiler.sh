#!/usr/bin/env bash
# torch 2.14.1, torchvision 0.29.1: importing torchvision loads torch's compiler, and so does an optimizer's first step.
#
# Expected: torch._dynamo, some thousand modules' worth of work, is loaded by who calls torch.compile; `import torch`
# leaves it out, and torchvision's own decorator for compiled functions says that it does not load it eagerly.
# Happens: torchvision.ops.roi_align, which every torchvision.models imports, takes one function from
# torch._dynamo.utils at its top. A process that avoids torchvision has it from its optimizer: Optimizer.__init__ and
# step() import it within. Nothing was compiled in either.
# Matters: it is about as long as `import torch` itself, in each worker, query and test that compiles nothing.
# Source: torchvision/ops/roi_align.py, torch/_compile.py and torch/optim/optimizer.py of these versions.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'EOF'
import subprocess
import sys

STEP = "import torch; weight = torch.nn.Parameter(torch.ones(1)); torch.optim.SGD([weight], lr=0.1)"
PROGRAMS = {"import torch": "import torch", "import torchvision": "import torchvision", "SGD(...)": STEP}
LOADED = "; import sys; print('torch._dynamo' in sys.modules)"
seen = {name: subprocess.run([sys.executable, "-c", program + LOADED], capture_output=True, text=True,
                             check=True).stdout.strip() for name, program in PROGRAMS.items()}
import torch
import torchvision
print("torch", torch.__version__, "torchvision", torchvision.__version__, "torch._dynamo is loaded after:", seen)
was = {"import torch": "False", "import torchvision": "True", "SGD(...)": "True"}
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
