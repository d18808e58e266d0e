#!/usr/bin/env bash
# tensorboardX 2.6.5: add_scalar writes another tag than the one it is given.
#
# Expected: a curve is called what it was logged as, "recall@10".
# Happens: every character but letters, digits and - / _ . becomes "_", so the file has "recall_10", and a second
# curve that is really called "recall_10" goes into the same one. All that tells of it is a log record of level INFO.
# Matters: R@1, R@10, R@50 are this field's metrics, and who reads event files looks for them by these names.
# Source: _clean_tag in tensorboardX/summary.py.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq tensorboardX==2.6.5
cd "$work"
venv/bin/python - <<'EOF'
import glob
import struct
import sys

import tensorboardX
from tensorboardX.proto.event_pb2 import Event

with tensorboardX.SummaryWriter("run") as writer:
    writer.add_scalar("recall@10", 0.25, 1)
    writer.add_scalar("recall_10", 0.75, 1)

(path,) = glob.glob("run/events*")
content, tags = open(path, "rb").read(), []
while content:                                  # records: length, its checksum, content, its checksum
    length, = struct.unpack("<Q", content[:8])
    tags += [(value.tag, value.simple_value) for value in Event.FromString(content[12:12 + length]).summary.value]
    content = content[16 + length:]
print("tensorboardX", tensorboardX.__version__, "wrote", tags)
was = [("recall_10", 0.25), ("recall_10", 0.75)]
sys.exit(None if tags == was else f"changed: it was {was}")
EOF
