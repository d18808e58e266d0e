#!/usr/bin/env bash
# bert-serving-client 1.10.0: an answer that comes after its timeout breaks the next fetch, or is kept for ever.
#
# Expected: a request that has timed out is over: its late answer is dropped, and the client works on.
# Happens: the timeout forgets the request's number alone. Its answer still arrives: encode() puts it aside in
# pending_response, from where nothing ever takes it, and fetch() raises KeyError for a number it does not know,
# although the requests that it was asked for were answered.
# Matters: the vectors of BERT-as-service are what published composers were trained on; a busy server is late.
# Source: _recv in bert_serving/client/__init__.py. Its own server needs TensorFlow 1: here some lines of ZeroMQ answer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq bert-serving-client==1.10.0 numpy==2.4.6 pyzmq==27.3.0
cd "$work"
venv/bin/python - <<'EOF'
import sys
import threading

import numpy as np
import zmq
from bert_serving import client

context = zmq.Context()
requests, answers = context.socket(zmq.PULL), context.socket(zmq.XPUB)
port, port_out = (socket.bind_to_random_port("tcp://127.0.0.1") for socket in (requests, answers))

late = threading.Event()

def serve():                                    # a vector of ones for each text; for "slow" once it is late
    while True:
        identity, texts, number, _ = requests.recv_multipart()
        if b"slow" in texts:
            late.wait()
            late.clear()
        answers.send_multipart([identity, b'{"shape": [1, 4], "dtype": "float32"}',
                                np.ones((1, 4), np.float32).tobytes(), number])

def encode_late():
    asking.timeout = 300
    try:
        asking.encode(["slow"])
    except TimeoutError:
        seen.append("timeout")
    asking.timeout = 10000
    late.set()

asking, seen = client.BertClient(port=port, port_out=port_out, ignore_all_checks=True), []
answers.recv()                                  # it has subscribed
threading.Thread(target=serve, daemon=True).start()
encode_late()                                   # request 1
asking.encode(["fast"])                         # 2
seen.append(list(asking.pending_response))      # the answer to 1, found while waiting for the one to 2
encode_late()                                   # 3
asking.encode(["fast"], blocking=False)         # 4
try:
    asking.fetch_all()
except KeyError as error:
    seen.append(repr(error))
print("bert-serving-client", client.__version__, seen)
was = ["timeout", [1], "timeout", "KeyError(3)"]
sys.exit(None if seen == was else f"changed: it was {was}")
EOF
