# make test and make demo need Python >= 3.10, a C++ compiler and make; the rest they install into .venv.

PYTHON ?= python3
BIN := .venv/bin
OUTPUT := demo/output
CHECKPOINT := $(OUTPUT)/results/StfpmExt/elpv/latest/weights/lightning/model.ckpt
CPP_SOURCES := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/ops/cuda_on_threads/*)
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc autoload anomalib_stfpm_ext -type f ! -name "*.so" ! -name "*.pyc")

FUZZ_SECONDS ?= 600
TESTS_OF_CSRC := $(addprefix tests/ops/test_, scorer.py properties.py processes.py cuda_on_threads.py loss.py) tests/inference/test_pooling.py

.PHONY: test test-all oldest demo fuzz sanitize sanitize-address sanitize-thread lint format wheels try-wheels clean

# Threads that wait by spinning, as OpenMP's do, would take the processor from the other process.
IN_TWO_PROCESSES := --numprocesses 2 --dist loadfile --durations 20
test: .venv/test.stamp
	OMP_WAIT_POLICY=passive $(BIN)/pytest $(IN_TWO_PROCESSES) -m "not slow"

test-all: .venv/test.stamp
	OMP_WAIT_POLICY=passive $(BIN)/pytest $(IN_TWO_PROCESSES)

# The lower bounds of pyproject.toml, with the oldest Python: the tests of `make test`.
OLDEST_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) python3.10)
oldest: build/oldest.stamp
	OMP_WAIT_POLICY=passive build/oldest/bin/pytest $(IN_TWO_PROCESSES) -m "not slow"

build/oldest.stamp: $(SOURCES)
	test -x build/oldest/bin/python || $(OLDEST_PYTHON) -m venv build/oldest
	build/oldest/bin/pip install --upgrade pip uv
	build/oldest/bin/uv pip install --python build/oldest/bin/python --resolution lowest-direct ".[test]"
	touch $@

# Half of the seconds for calls of the scorer, half for lives of a model.
fuzz: .venv/test.stamp
	STFPM_EXT_FUZZ_SECONDS=$$(($(FUZZ_SECONDS) / 2)) $(BIN)/pytest tests/ops/test_properties.py tests/test_lives.py

# The tests of csrc/ on builds with sanitizers, which PYTHONPATH puts before the build in .venv. Leaks are not looked
# for, since Python and torch leave theirs; nor what happens at the interpreter's end, where UBSan objects to pybind11.
# ThreadSanitizer takes minutes for all tests, so it gets those in which threads meet.
PRELOAD = LD_PRELOAD="$$($(CXX) -print-file-name=$(1)) $$($(CXX) -print-file-name=libstdc++.so)" \
	PYTHONPATH=build/$(2) STFPM_EXT_SANITIZE=$($(2)_SANITIZERS)
address_SANITIZERS := address,undefined
thread_SANITIZERS := thread

sanitize: sanitize-address sanitize-thread

sanitize-address: build/address.stamp
	$(call PRELOAD,libasan.so,address) ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
		$(BIN)/pytest --capture=sys $(TESTS_OF_CSRC) -k "not interpreter_ends"

sanitize-thread: build/thread.stamp
	$(call PRELOAD,libtsan.so,thread) TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
		setarch -R $(BIN)/pytest --capture=sys $(TESTS_OF_CSRC) \
		-k "(threads or layouts or reference or combin) and not fork"

build/%.stamp: .venv/test.stamp
	$(BIN)/pip install --no-deps --upgrade --target build/$* \
		-C cmake.define.STFPM_EXT_SANITIZE=$($*_SANITIZERS) -C cmake.define.STFPM_EXT_CUDA=OFF .
	touch $@

demo: .venv/demo.stamp $(CHECKPOINT)
	$(BIN)/python demo/report.py $(CHECKPOINT) $(OUTPUT)

$(CHECKPOINT): $(OUTPUT)/tf_efficientnet_lite0.safetensors
	rm -rf $(OUTPUT)/results
	$(BIN)/anomalib train --config demo/elpv.yaml

$(OUTPUT)/tf_efficientnet_lite0.safetensors: | .venv/demo.stamp
	$(BIN)/python demo/prepare.py $(OUTPUT)

# One stamp for each extra: test.stamp, demo.stamp. Bytecode is made of what is imported, since all of it takes minutes.
.venv/%.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade "pip>=25.1"
	$(BIN)/pip install --no-compile ".[$*]"
	touch $@

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# Without .venv, since torch is not needed. ARGUMENTS are those of the program.
wheels: build/wheels.stamp
	build/wheels/bin/python release/wheels.py $(ARGUMENTS)

try-wheels: build/wheels.stamp
	build/wheels/bin/python release/try_wheels.py $(ARGUMENTS)

build/wheels.stamp: release/requirements.txt
	test -x build/wheels/bin/python || $(PYTHON) -m venv build/wheels
	build/wheels/bin/pip install --requirement release/requirements.txt
	touch $@

clean:
	rm -rf .venv build dist $(OUTPUT)
