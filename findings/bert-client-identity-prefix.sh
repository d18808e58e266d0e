#!/usr/bin/env bash
# bert-serving-client 1.10.0: a client named run1 takes the answers of run10 for its own.
#
# Expected: identity is a name, and answers go to who has just this name.
# Happens: the identity is a ZeroMQ subscription, which is a prefix: run1 also gets what is sent to run10. Both number
# their requests from 1, so the first answer of this number wins, whosever it is. The vectors are well-formed and are
# of another text. (A str, which the docstring asks for, is refused by pyzmq; it has to be bytes.)
# Matters: runs side by side on one service; a wrong vector trains like a right one.
# Source: ZMQ_SUBSCRIBE in zmq_setsockopt(3), "matches all messages beginning with"; the default, a uuid4, is safe.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq bert-serving-client==1.10.0 numpy==2.4.6 pyzmq==27.3.0
cd "$work"
venv/bin/python - <<'EOF'
import json
import sys

import numpy as np
import zmq
from bert_serving import client

context = zmq.Context()
requests, answers = context.socket(zmq.PULL), context.socket(zmq.XPUB)
port, port_out = (socket.bind_to_random_port("tcp://127.0.0.1") for socket in (requests, answers))

def answer_one():                               # its vector holds the length of the text
    identity, texts, number, _ = requests.recv_multipart()
    vector = np.full((1, 4), len(json.loads(texts)[0]), np.float32)
    answers.send_multipart([identity, b'{"shape": [1, 4], "dtype": "float32"}', vector.tobytes(), number])

first, tenth = (client.BertClient(port=port, port_out=port_out, ignore_all_checks=True, identity=name, timeout=5000)
                for name in (b"run1", b"run10"))
answers.recv(), answers.recv()                  # both have subscribed
tenth.encode(["is dark red"], blocking=False)   # 11 characters
answer_one()
first.encode(["red"], blocking=False)           # 3
answer_one()
got = first.fetch_all()[0][0].tolist()
print("bert-serving-client", client.__version__, "run1 asked for a text of 3 characters and got", got)
was = [11.0] * 4
sys.exit(None if got == was else f"changed: it was {was}")
EOF
