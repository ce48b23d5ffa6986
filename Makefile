# make demo   set up, train both stages on this machine, evaluate, draw the curves; a second call goes on where it stopped
# make demo-2hop   after it, both stages again for questions of two hops
# make test   set up, run the tests
# make test-gpu   of the tests, those that need a GPU
# make lint   set up, check style
# make install   set up

SEED ?= 0
STEPS_1 ?= 6
STEPS ?= 15
STEPS_2HOP ?= 9
PYTHON ?= python3

BIN := .venv/bin
REQUIREMENTS := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo requirements.txt || echo requirements-cpu.txt)
# By its name, so that a GPU node does not take what a machine without one has installed in a shared folder.
INSTALLED := .venv/installed-$(REQUIREMENTS)
TORCH_CPU := https://download.pytorch.org/whl/cpu

DEMO := demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))
DATA := --retriever $(DEMO)/passages.jsonl --prompt_file $(DEMO)/prompt.txt --max_context 768
LIMITS := --documents_per_search 1 --max_searches 3 --max_turn_tokens 48
TRAIN = $(BIN)/torchrun --standalone --nproc-per-node 1 train.py --preset demo --resume --seed $(SEED) --eval_every 3
QUESTIONS := --questions $(DEMO)/train.jsonl --eval_questions $(DEMO)/validation.jsonl
EVALUATE = $(BIN)/python evaluate.py run --questions $(DEMO)/heldout.jsonl $(LIMITS)

.PHONY: demo demo-2hop test test-gpu lint install
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py --out $(DEMO) --seed $(SEED)
	$(EVALUATE) $(DATA) --model $(DEMO)/model --out $(DEMO)/eval-untrained
	$(TRAIN) $(DATA) $(QUESTIONS) --stage 1 --steps $(STEPS_1) --model $(DEMO)/model --out $(DEMO)/stage1
	$(EVALUATE) $(DATA) --model $(DEMO)/stage1/model --out $(DEMO)/eval-stage1-$(STEPS_1)
	$(TRAIN) $(DATA) $(QUESTIONS) --stage 2 --steps $(STEPS) --model $(DEMO)/stage1/model --out $(DEMO)/stage2
	$(EVALUATE) $(DATA) --model $(DEMO)/stage2/model-best --out $(DEMO)/eval-stage2-$(STEPS)
	$(BIN)/python tools/report.py plot --runs $(DEMO)/stage1 $(DEMO)/stage2 --out $(DEMO)/curves.png \
		--evaluations $(DEMO)/eval-untrained $(DEMO)/eval-stage1-$(STEPS_1) $(DEMO)/eval-stage2-$(STEPS)
	$(BIN)/python tools/report.py learning $(DEMO) --out $(DEMO)/learning.png
	$(BIN)/python tools/report.py page $(DEMO)/stage1 $(DEMO)/stage2 $(DEMO)/eval-untrained $(DEMO)/eval-stage1-$(STEPS_1) \
		$(DEMO)/eval-stage2-$(STEPS) --out $(DEMO)/report.html

DEMO_2HOP := $(DEMO)/2hop
DATA_2HOP := --retriever $(DEMO)/passages.jsonl --prompt_file $(DEMO)/prompt_2hop.txt --max_context 1024
QUESTIONS_2HOP := --questions $(DEMO)/train_2hop.jsonl --eval_questions $(DEMO)/validation_2hop.jsonl

demo-2hop: demo
	$(EVALUATE) $(DATA_2HOP) --model $(DEMO)/model --out $(DEMO_2HOP)/eval-untrained
	$(TRAIN) $(DATA_2HOP) $(QUESTIONS_2HOP) --stage 1 --reward stage1_two_hops --learning_rate 3e-5 --steps $(STEPS_1) \
		--model $(DEMO)/stage1/model --out $(DEMO_2HOP)/stage1
	$(EVALUATE) $(DATA_2HOP) --model $(DEMO_2HOP)/stage1/model --out $(DEMO_2HOP)/eval-stage1-$(STEPS_1)
	$(TRAIN) $(DATA_2HOP) $(QUESTIONS_2HOP) --stage 2 --steps $(STEPS_2HOP) --model $(DEMO_2HOP)/stage1/model --out $(DEMO_2HOP)/stage2
	$(EVALUATE) $(DATA_2HOP) --model $(DEMO_2HOP)/stage2/model-best --out $(DEMO_2HOP)/eval-stage2-$(STEPS_2HOP)
	$(BIN)/python tools/report.py learning $(DEMO_2HOP) --out $(DEMO_2HOP)/learning.png

# Not in parallel on a GPU: engines share it.
test: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_house.py
	$(BIN)/python -m pytest --ignore tests/test_house.py $(if $(findstring cpu,$(REQUIREMENTS)),-n 2 --dist loadfile --no-loadscope-reorder)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(INSTALLED)

# The configured indexes first, PyTorch's own CPU index only if they lack the CPU build. vLLM brings the torch companions
# along; text models do not use them, and where they come from another build than torch they break its import.
$(INSTALLED): $(REQUIREMENTS) requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r $(REQUIREMENTS) -r requirements-dev.txt || \
		$(BIN)/python -m pip install --quiet --extra-index-url $(TORCH_CPU) -r $(REQUIREMENTS) -r requirements-dev.txt
	if [ $(REQUIREMENTS) = requirements-cpu.txt ]; then \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	touch $@
