# SPDX-License-Identifier: Apache-2.0

"""Whole lives of a model: whatever its user does, in any order, every form of it says the same of an image.

``make fuzz`` makes lives for as long as STFPM_EXT_FUZZ_SECONDS says; hypothesis prints the shortest life that fails.
"""

import copy
import csv
import math
import os
import pickle
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.engine import Engine
from helpers import QUIET
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lightning.pytorch.callbacks import BatchSizeFinder
from lives import (
    BATCH_SIZE,
    Accident,
    Accidents,
    Sayings,
    World,
    ask,
    is_attached,
    scoring_of,
    student_of,
    verdict_of,
    watch_exponents,
)
from omegaconf import OmegaConf

from anomalib_stfpm_ext import StfpmExt, load_model
from anomalib_stfpm_ext.convert import save_checkpoint
from anomalib_stfpm_ext.data.images import read_image
from anomalib_stfpm_ext.inference import precision
from anomalib_stfpm_ext.selection import judge, trial
from anomalib_stfpm_ext.watch.service import watch

pytestmark = pytest.mark.usefixtures("one_thread")
FUZZ_SECONDS = float(os.environ.get("STFPM_EXT_FUZZ_SECONDS", "0"))
STEPS = 8  # of a life
COMPUTES_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
PRECISIONS = ["float32", "bfloat16"] if COMPUTES_BFLOAT16 else ["float32"]

MODELS = st.fixed_dictionaries(
    {
        "layers": st.sampled_from([("layer1", "layer3"), ("layer1",), OmegaConf.create(["layer1", "layer3"])]),
        "held_out_share": st.sampled_from([0.5, np.float32(0.5), Fraction(3, 10), 0]),
        "selection": st.sampled_from(["synthetic", "held_out_map"]),
        "hard_share": st.sampled_from([1, 0.1]),
        "precise_bn": st.booleans(),
        "inference_precision": st.sampled_from([None, "auto", *PRECISIONS]),
        "post_processor": st.sampled_from([True, True, False]),
        "save_teacher": st.booleans(),
        "seed": st.integers(0, 9) | st.integers(0, 9).map(np.int64),
    }
)


def accidents(doing: str) -> st.SearchStrategy:
    """Choose when what happens meanwhile; mostly nothing."""
    moments, errors = st.sampled_from(Accidents.MOMENTS[doing]), st.sampled_from([Accident, KeyboardInterrupt])
    return st.none() | st.none() | st.tuples(moments, st.integers(1, 3), errors)


class Plan(NamedTuple):
    """What a fit is asked to do."""

    data: str
    epochs: int
    every: int
    validates: bool
    finds: bool  # its batch size


PLANS = st.builds(
    Plan,
    st.sampled_from(["line", "line", "few"]),
    st.integers(0, 3),
    st.integers(1, 2),
    st.sampled_from([True, True, False]),
    st.sampled_from([False] * 5 + [True]),
)


class Fitted(NamedTuple):
    """A fit that came to its end, and the checkpoint that it left."""

    path: str
    plan: Plan
    asked_precision: str | None
    validated_on: str | None


class Life(RuleBasedStateMachine):
    """A model in its user's hands. Its invariants hold after everything that a user can do, and after accidents."""

    world: World
    patch: pytest.MonkeyPatch
    lives = steps = 0

    def __init__(self) -> None:
        super().__init__()
        Life.lives += 1
        self.folder = Path(tempfile.mkdtemp(prefix="life"))
        self.accidents = Accidents()
        self.images = self.world.images()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(arguments=MODELS, tiled=st.sampled_from([False, False, True]))
    def make(self, arguments, tiled):
        self.arguments, self.tiled = arguments, tiled
        self.engine: Engine | None = None  # which has the model
        self.engine_validates = True  # not with limit_val_batches=0, which holds for all that it does
        self.fitted: Fitted | None = None
        self.validated_on: str | None = None  # what threshold and range are of
        self.scored_in: str | None = None  # then, if the user has asked for another precision since
        self.model = self._new_model(arguments["inference_precision"])

    # What a user does.

    @rule(plan=PLANS, accident=accidents("fit"))
    def fit(self, plan, accident):
        self._fit(self.model, plan, accident)

    @precondition(lambda self: self.fitted)
    @rule(more=st.integers(1, 2), accident=accidents("fit"))
    def resume(self, more, accident):
        path, plan, asked_precision, self.validated_on = self.fitted
        self.scored_in = None
        plan = plan._replace(epochs=plan.epochs + more, finds=False)
        self._fit(self._new_model(asked_precision), plan, accident, path)

    @rule(data=st.sampled_from(["line", "other"]), anew=st.booleans(), accident=accidents("validate"))
    def validate(self, data, anew, accident):
        engine = self._engine(anew or not self.engine_validates)
        ended = self._run(
            partial(engine.validate, self.model, datamodule=self.world.data[data], verbose=False), accident
        )
        if ended or accident[0] == "on_validation_end":  # when threshold and range have been set
            self.validated_on, self.scored_in = data, None

    @rule(data=st.sampled_from(["line", "other"]), anew=st.booleans(), accident=accidents("test"))
    def test(self, data, anew, accident):
        engine = self._engine(anew)
        self._run(partial(engine.test, self.model, datamodule=self.world.data[data], verbose=False), accident)

    @rule(data=st.sampled_from(["line", "other"]), anew=st.booleans(), accident=accidents("predict"))
    def predict(self, data, anew, accident):
        engine, batches = self._engine(anew), []
        call = partial(engine.predict, self.model, datamodule=self.world.data[data])
        if not self._run(lambda: batches.extend(call()), accident):
            return
        paths = [path for batch in batches for path in batch.image_path]
        expected = ask(self.model, [read_image(path) for path in paths]).scores
        found = torch.cat([batch.pred_score.flatten() for batch in batches])
        tolerance = 1e-3 if self.model.model.precision == "float32" else 0.2  # a batch is rounded otherwise
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=tolerance)
        if self.validated_on is None and self.model.post_processor:
            assert self._is_told("there is no threshold")

    @rule(sensitivity=st.sampled_from([0.2, 0.5, 0.8]))
    def move_the_threshold(self, sensitivity):
        if self.model.post_processor:
            self.model.post_processor.image_sensitivity = self.model.post_processor.pixel_sensitivity = sensitivity

    @rule(asked=st.sampled_from([None, None, *PRECISIONS]))
    def load_what_is_saved_now(self, asked):
        before = self.model.model.precision
        self._become(self._load(self._save(), asked))
        if asked not in (None, before) and self.scored_in is None:
            self.scored_in = before

    @precondition(lambda self: self.fitted)
    @rule()
    def load_what_the_fit_has_saved(self):
        self._become(self._load(self.fitted.path))
        self.validated_on, self.scored_in = self.fitted.validated_on, None

    @rule(way=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, way):
        self._become(way(self.model))

    @rule(exported=st.booleans(), sensitivity=st.sampled_from([None, 0.2, 0.8]))
    def watch(self, exported, sensitivity):
        path, table = self._export() if exported else self._save(), self.folder / "scores.csv"
        call = partial(watch, path, self.world.shown, table, once=True, interval=1e-3, patience=0, device="cpu",
            teacher_weights=self._teacher, sensitivity=sensitivity)  # fmt: skip
        if sensitivity is not None and (self.validated_on is None or not self.model.post_processor):
            with pytest.raises(ValueError, match="sensitivity: wanted a model with a threshold"):
                call()
            return
        call()
        with table.open(newline="", encoding="utf-8") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["file"])
        table.unlink()
        scores = [float(row["score"]) for row in rows]
        expected = ask(self.model, self.images)
        assert scores == pytest.approx(expected.scores, abs=1e-5)
        if sensitivity is None:
            verdicts = {True: "defective", False: "good", None: ""}
            assert [row["verdict"] for row in rows] == [verdicts[label] for label in expected.labels]
        else:
            assert [row["verdict"] == "defective" for row in rows] == [score > 1 - sensitivity for score in scores]

    # What holds at all times.

    @invariant()
    def all_forms_say_the_same_by_the_threshold_of_the_last_validation(self):
        Life.steps += 1
        loaded, exported = self._load(self._save()), torch.load(self._export(), weights_only=False)["model"]
        assert_same(loaded, self.model)
        assert_same(exported, self.model)
        assert_same_sayings(ask(loaded, self.images), ask(self.model, self.images))
        if self.scored_in is not None:
            loaded = self._load(self._save(), self.scored_in)
        self._check_threshold(loaded, self.validated_on)

    def _check_threshold(self, model: StfpmExt, validated_on: str | None) -> None:
        """Validate a loaded model again: others come out if it is not the student, or scores otherwise than then."""
        found = verdict_of(model)
        if validated_on is None or not found:
            assert all(map(math.isnan, found.values())), found
            return
        data = self.world.data[validated_on]
        Engine(default_root_dir=self.folder, **QUIET).validate(model, datamodule=data, verbose=False)
        assert found == pytest.approx(verdict_of(model), rel=1e-5, nan_ok=True)

    # How it is done.

    def _fit(self, model, plan, accident, path=None):
        """Fit a model, or resume the fit of a checkpoint, and note what its threshold should be of."""
        before = student_of(self._load(path) if path else model)
        options = {} if plan.validates else {"limit_val_batches": 0}
        engine = self._new_engine(
            *([finder()] if plan.finds else []),
            max_epochs=plan.epochs,
            check_val_every_n_epoch=plan.every,
            **options,
        )
        data = self.world.data[plan.data]
        with watch_exponents(self.patch) as seen:
            came_to_its_end = self._run(partial(engine.fit, model, datamodule=data, ckpt_path=path), accident)
        data.train_batch_size = BATCH_SIZE  # a finder has changed it
        self.model, self.engine, self.engine_validates = model, engine, plan.validates
        is_trained = student_of(model) != before
        assert model.model.is_trained or not is_trained
        has_threshold = not all(map(math.isnan, verdict_of(model).values()))
        if is_trained:
            may_be_set = plan.validates if came_to_its_end else has_threshold
            self.validated_on, self.scored_in = plan.data if may_be_set else None, None
        elif self.validated_on is None and came_to_its_end and plan.epochs and plan.validates:
            self.validated_on = plan.data
        if not came_to_its_end:
            return
        assert is_trained or path or self._is_told("no step was made")
        if plan.epochs and not has_threshold and model.post_processor:
            assert self._is_told("no validation has set a threshold")
        exponents = seen.get(student_of(model), set())
        assert exponents <= {model.model.level_weights}, "the student that is kept was scored by another's exponents"
        if engine.best_model_path:
            self._check_file(engine.best_model_path, plan)

    def _check_file(self, path, plan):
        """Check the checkpoint that a fit has left, which may hold an earlier student."""
        loaded = self._load(path)
        if student_of(loaded) == student_of(self.model):
            assert_same(loaded, self.model)
            validated_on = self.validated_on
        else:
            validated_on = plan.data if plan.validates else None
            self._check_threshold(loaded, validated_on)
        self.fitted = Fitted(path, plan, self.model.inference_precision, validated_on)

    def _run(self, call: Callable[[], object], accident) -> bool:
        """Have a trainer do something, and tell whether it came to its end."""
        self.accidents.expect(accident)
        handler = signal.getsignal(signal.SIGINT)  # which Lightning takes away for good after Ctrl-C
        with warnings.catch_warnings(record=True) as self.told:
            warnings.simplefilter("always")
            try:
                call()
            except (Accident, SystemExit):
                assert self.accidents.happened
            finally:
                signal.signal(signal.SIGINT, handler)
        return not self.accidents.happened

    def _is_told(self, words: str) -> bool:
        return any(words in str(warning.message) for warning in self.told)

    def _new_model(self, asked_precision) -> StfpmExt:
        arguments = {**self.arguments, "inference_precision": asked_precision}
        return StfpmExt("test_resnet", teacher_weights=self.world.teacher, image_size=(48, 64), evaluator=False,
            visualizer=False, **arguments)  # fmt: skip

    def _new_engine(self, *callbacks, **arguments) -> Engine:
        tiles = [TilerConfigurationCallback(enable=True, tile_size=32, stride=16)] if self.tiled else []
        return Engine([self.accidents, *tiles, *callbacks], default_root_dir=self.folder, **QUIET, **arguments)

    def _engine(self, anew: bool) -> Engine:
        """Return the engine that the model was last in, or a new one."""
        if anew or self.engine is None:
            self.engine, self.engine_validates = self._new_engine(), True
        return self.engine

    def _become(self, model: StfpmExt) -> None:
        self.model, self.engine = model, None

    def _save(self, model: StfpmExt | None = None) -> Path:
        model, path = model or self.model, self.folder / "now.ckpt"
        if self.engine is not None and is_attached(model, self.engine.trainer):
            self.engine.trainer.save_checkpoint(path)
        else:
            save_checkpoint(model, path)
        return path

    def _export(self) -> Path:
        return self.model.to_torch(self.folder)

    @property
    def _teacher(self) -> Path | None:
        return None if self.arguments["save_teacher"] else self.world.teacher

    def _load(self, path, asked=None) -> StfpmExt:
        if asked is None:
            return load_model(path, teacher_weights=self._teacher)
        return StfpmExt.load_from_checkpoint(path, teacher_weights=self._teacher or False, inference_precision=asked)


def finder() -> BatchSizeFinder:
    return BatchSizeFinder("power", 2, init_val=2, max_trials=1, batch_arg_name="train_batch_size")


def assert_same(model: StfpmExt, expected: StfpmExt) -> None:
    assert scoring_of(model) == scoring_of(expected)
    assert verdict_of(model) == pytest.approx(verdict_of(expected), nan_ok=True)


def assert_same_sayings(sayings: Sayings, expected: Sayings) -> None:
    assert sayings.scores == pytest.approx(expected.scores, abs=1e-5)
    assert sayings.labels == expected.labels


@pytest.fixture
def lives(tmp_path_factory, monkeypatch):
    """Let small data have exponents, the CPU be fast in bfloat16 if it computes in it, and a trial of it succeed."""
    Life.world, Life.patch, Life.lives, Life.steps = World.make(tmp_path_factory.mktemp("world")), monkeypatch, 0, 0
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr(judge, "FEWEST_IMAGES", 4)
    trial_of = trial.Trial
    monkeypatch.setattr(trial, "Trial", lambda *_: trial_of(images=100, shift=0.01, speedup=2.0))
    if COMPUTES_BFLOAT16:
        for module in (precision, trial):
            monkeypatch.setattr(module, "why_not", lambda name, _: None if name != "float16" else "it is not")
    precision.dtype_on.cache_clear()
    yield Life
    precision.dtype_on.cache_clear()


def live(lives: type[Life], number: int, **options: object) -> None:
    run_state_machine_as_test(
        lives,
        settings=settings(
            max_examples=number,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_whole_lives(lives):
    live(lives, 4, derandomize=True)


@pytest.mark.slow
def test_more_lives(lives):
    live(lives, 8, derandomize=True)
    live(seed(1)(lives), 40)


def test_lives_for_as_long_as_asked(lives, capsys):
    """Rounds of fresh lives until the time is up; each round prints its seed if it fails."""
    deadline = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < deadline:
        round_seed = int.from_bytes(os.urandom(4), "little")
        print(f"seed of the round: {round_seed}")
        live(seed(round_seed)(lives), 20)
    with capsys.disabled():
        print(f" {lives.lives} lives of {lives.steps} steps in {FUZZ_SECONDS:.0f} s" if FUZZ_SECONDS else "")
