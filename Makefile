# make test and make demo need Python >= 3.10, a C++ compiler and make; the rest they install into .venv.

PYTHON ?= python3
BIN := .venv/bin
OUTPUT := demo/output
CHECKPOINT := $(OUTPUT)/results/StfpmExt/elpv/latest/weights/lightning/model.ckpt
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/* autoload/* anomalib_stfpm_ext/*.py*)

.PHONY: test demo lint format clean

test: .venv/test.stamp
	$(BIN)/pytest

demo: .venv/demo.stamp $(CHECKPOINT)
	$(BIN)/python demo/report.py $(CHECKPOINT) $(OUTPUT)

# On a CPU, training spends half its time in page faults unless glibc keeps the memory that it has.
$(CHECKPOINT): export MALLOC_TRIM_THRESHOLD_ = -1
$(CHECKPOINT): export MALLOC_MMAP_MAX_ = 0
$(CHECKPOINT): $(OUTPUT)/tf_efficientnet_lite0.safetensors
	rm -rf $(OUTPUT)/results
	$(BIN)/anomalib train --config demo/elpv.yaml

$(OUTPUT)/tf_efficientnet_lite0.safetensors: | .venv/demo.stamp
	$(BIN)/python demo/prepare.py $(OUTPUT)

# One stamp for each extra: test.stamp, demo.stamp.
.venv/%.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade "pip>=25.1"
	$(BIN)/pip install ".[$*]"
	touch $@

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/*

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/cpu/*

clean:
	rm -rf .venv build dist $(OUTPUT)
