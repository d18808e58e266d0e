#!/usr/bin/env bash
# tensorboardX 2.6.5: two writers on one folder, made within one second, and the first one's events are gone.
#
# Expected: each writer has an event file of its own, as with torch.utils.tensorboard, whose names also have the
# process id and a count.
# Happens: the name is the second and the host alone. The second writer empties the file of the first, and both write
# from its beginning, one over the other; neither says a word.
# Matters: a writer for training and one for testing, or a run that is resumed at once after a short failure.
# Source: EventsWriter.__init__ in tensorboardX/event_file_writer.py. A filename_suffix keeps them apart.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq tensorboardX==2.6.5
cd "$work"
venv/bin/python - <<'EOF'
import glob
import sys
import time

import tensorboardX

time.sleep(1.05 - time.time() % 1)              # the beginning of a second
training, testing = tensorboardX.SummaryWriter("run"), tensorboardX.SummaryWriter("run")
training.add_scalar("loss", 0.5, 1)
training.close()
testing.add_scalar("recall", 0.25, 1)
testing.close()

files = glob.glob("run/events*")
content = b"".join(open(path, "rb").read() for path in files)
seen = (len(files), b"loss" in content, b"recall" in content)
print("tensorboardX", tensorboardX.__version__, "two writers left: files, loss, recall =", seen)
was = (1, False, True)
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
