# An existing .venv is used as it is if it has what is needed.
PYTHON ?= python3
PY := .venv/bin/python
NEEDED := torch, safetensors, huggingface_hub, tokenizers, numpy, filelock, tqdm, pytest, xdist, matplotlib, pyarrow, \
	sacrebleu

.PHONY: setup demo test test-interop
setup:
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -c "import $(NEEDED)" 2>/dev/null \
		|| $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt

demo: setup
	$(PY) train.py --gate scalar --threshold global --sparsity-cost macs --kv dense --schedule uniform \
		--budget-end 0.4 --compute compact --steps 800 --lr 5e-4 --gate-lr-scale 2 \
		--calibrate 0.8 0.6 0.5 0.4 --out runs/demo --overwrite
	$(PY) eval_gsm8k.py --model runs/demo --dense examples/tiny-llama
	$(PY) generate.py --model runs/demo --budget 0.6 --show-compute --show-branches \
		--question "Tom has 31 red pens and 14 blue pens. Then he gives Ann 9. How many pens does Tom have now?"

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto tests

# transformers and LM Evaluation Harness have an environment of their own
IPY := .venv-interop/bin/python
test-interop:
	@test -x $(IPY) || $(PYTHON) -m venv .venv-interop
	@$(IPY) -c "import torch, transformers, lm_eval, accelerate, pytest, xdist" 2>/dev/null \
		|| $(IPY) -m pip install --quiet --disable-pip-version-check -r requirements-interop.txt
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(IPY) -m pytest -q -n auto interop/tests
