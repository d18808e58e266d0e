# make demo: toy data, a short training, its recall table.  make test: the test suite.  Both install what they need.
PYTHON ?= python3
BIN := .venv/bin
DEMO := --dataset mitstates --dataset_path data/toy/mitstates --model composeAE --loss batch_based_classification \
	--image_weights none --image_size 32 --num_iters 400 --learning_rate 0.03 --learning_rate_decay_frequency 330 \
	--eval_frequency 0 --log_frequency 20 --baselines True --log_dir logs --comment _demo

.PHONY: install demo test lint bench clean

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

data/toy/complete: data/make_toy.py | install
	$(BIN)/python data/make_toy.py data/toy --force
	touch $@

demo: install data/toy/complete
	$(BIN)/python main.py $(DEMO)
	@echo "To look at the run: $(BIN)/tensorboard --logdir logs, then open http://localhost:6006"

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .

bench: install
	$(BIN)/python bench.py

clean:
	rm -rf .venv data/toy
