# SPDX-License-Identifier: Apache-2.0

"""The precision of scoring is that of the threshold: in a fit, in checkpoints, beside them and in exports."""

import math

import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from helpers import QUIET, folder, skip_unless_computed

from anomalib_stfpm_ext import Predictor, StfpmExt, StfpmExtModel, load_model
from anomalib_stfpm_ext.callbacks import scoring_dtype
from anomalib_stfpm_ext.inference import precision
from anomalib_stfpm_ext.inference.precision import dtype_on, why_not
from anomalib_stfpm_ext.selection import trial
from anomalib_stfpm_ext.selection.judge import Judge
from anomalib_stfpm_ext.selection.record import Measurement
from anomalib_stfpm_ext.selection.trial import Trial


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """Take every CPU for one that is fast in bfloat16 alone."""

    def reason(name, device_type):
        return None if name != "float16" and device_type == "cpu" else "it is not"

    monkeypatch.setattr(precision, "why_not", reason)
    monkeypatch.setattr(trial, "why_not", reason)
    dtype_on.cache_clear()
    yield
    dtype_on.cache_clear()
    why_not.cache_clear()


@pytest.fixture
def told(monkeypatch):
    said: list[str] = []
    for module in ("callbacks.scoring_dtype", "callbacks.student_selection", "inference.precision", "exports"):
        for function in ("rank_zero_warn", "rank_zero_info"):
            target = f"anomalib_stfpm_ext.{module}.{function}"
            monkeypatch.setattr(target, lambda message, *_, **__: said.append(str(message)), raising=False)
    return said


@pytest.fixture
def make_model(small_weights):
    def make(**arguments) -> StfpmExt:
        settings = {"teacher_weights": small_weights, "lr": 0.05, "seed": 0, "image_size": (48, 64)}
        return StfpmExt("test_resnet", ["layer1", "layer2"], **(settings | {"visualizer": False} | arguments))

    return make


@pytest.fixture
def fit(images, tmp_path):
    def run(model, **arguments) -> Engine:
        engine = Engine(default_root_dir=tmp_path, **(QUIET | {"max_epochs": 1} | arguments))
        engine.fit(model, datamodule=folder(images))
        return engine

    return run


def scores(engine: Engine, model: StfpmExt, images, **arguments) -> tuple[list[str], torch.Tensor]:
    (batch,) = engine.predict(model, datamodule=folder(images, eval_batch_size=8), **arguments)
    return batch.image_path, batch.pred_score.flatten()


def scores_of_file(path, images: list[str]) -> torch.Tensor:
    predict = Predictor(path, "cpu")
    return torch.cat([predict(read_image(image, as_tensor=True)).pred_score.flatten() for image in images])


@pytest.mark.parametrize(
    ("given", "trainer"), [("bfloat16", "32-true"), (None, "bf16-mixed"), ("bfloat16", "bf16-mixed")]
)
def test_checkpoint_export_and_predictor_score_in_it(make_model, fit, images, tmp_path, monkeypatch, given, trainer):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = make_model(inference_precision=given)
    engine = fit(model, precision=trainer)
    assert model.model.precision == "bfloat16"
    path = engine.best_model_path
    assert load_model(path).model.precision == "bfloat16"
    files, expected = scores(engine, model, images)
    # Alone, convolutions may round elsewhere than in a batch.
    torch.testing.assert_close(scores_of_file(path, files), expected, rtol=0, atol=5e-3)
    export = model.to_torch(tmp_path / "export")
    torch.testing.assert_close(scores_of_file(export, files), expected, rtol=0, atol=5e-3)


def test_exports_for_other_runtimes_say_that_the_threshold_is_of_it(make_model, tmp_path, told, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)  # it takes seconds
    make_model(inference_precision="bfloat16").to_onnx(tmp_path)
    assert any("threshold and range were set in bfloat16" in line for line in told)


def test_float32_stays_the_default_and_mixed_training_may_have_it(make_model, fit):
    model = make_model()
    fit(model)
    assert model.model.precision == "float32"
    model = make_model(inference_precision="float32")
    engine = fit(model, precision="bf16-mixed")
    assert load_model(engine.best_model_path).model.precision == "float32"


def test_what_is_given_beside_a_checkpoint_is_in_force_and_told(make_model, fit, images, told, tmp_path):
    engine = fit(make_model())
    path = engine.best_model_path
    assert load_model(path).model.precision == "float32"
    assert not any("inference_precision" in line for line in told)
    assert StfpmExt.load_from_checkpoint(path, inference_precision="bfloat16").model.precision == "bfloat16"
    assert any(
        "inference_precision: bfloat16 is in force, and threshold and range were set in float32" in x for x in told
    )
    told.clear()
    model = make_model()
    reduced = Engine(default_root_dir=tmp_path, precision="bf16-true", **QUIET)
    reduced.predict(model, datamodule=folder(images), ckpt_path=path)
    assert model.model.precision == "bfloat16"
    assert any("threshold and range were set in float32" in line for line in told)
    expected = load_model(path).post_processor
    assert torch.equal(model.post_processor.image_threshold, expected.image_threshold)  # not rounded to bfloat16
    assert next(model.model.student_model.parameters()).dtype == torch.float32


def test_true_precisions_score_and_do_not_train(make_model, fit, images, tmp_path):
    model = make_model()
    engine = fit(model)
    _, expected = scores(engine, model, images)
    reduced = Engine(default_root_dir=tmp_path, precision="bf16-true", **QUIET)
    torch.testing.assert_close(scores(reduced, model, images)[1], expected, rtol=0.05, atol=0.02)
    assert model.model.precision == "bfloat16"
    assert reduced.trainer.precision == "bf16-true"  # as the user gave it
    with pytest.raises(ValueError, match=r"precision: wanted one of \('32-true', 'bf16-mixed', '16-mixed'\)"):
        fit(make_model(), precision="bf16-true")


def test_what_the_machine_lacks_is_not_what_checkpoints_are_of(make_model, fit, told):
    model = make_model(inference_precision="float16")
    engine = fit(model)
    assert model.model.precision == "float32"
    assert any("compute in float32, not in float16" in line for line in told)
    assert load_model(engine.best_model_path).model.precision == "float32"


def test_auto_takes_what_is_faster_and_validates_anew(make_model, fit, images, monkeypatch, told):
    skip_unless_computed("bfloat16")
    monkeypatch.setattr(trial, "try_precision", lambda *_: Trial(8, 0.01, 2.0))
    model = make_model(inference_precision="auto")
    engine = fit(model)
    assert model.model.precision == "bfloat16"
    assert any("It is 2.0 times as fast as float32, and moves the scores of 8 held-out images" in x for x in told)
    loaded = load_model(engine.best_model_path)
    assert loaded.model.precision == "bfloat16"
    before = loaded.post_processor.image_max.clone()
    engine.validate(loaded, datamodule=folder(images))
    torch.testing.assert_close(loaded.post_processor.image_max, before, rtol=1e-6, atol=0)
    loaded.model.score_by(None, "float32")
    engine.validate(loaded, datamodule=folder(images))
    assert not torch.equal(loaded.post_processor.image_max, before)


@pytest.mark.parametrize(
    "result", [Trial(8, 0.2, 2.0), Trial(4, 0.01, 2.0), Trial(8, 0.01, 0.9), Trial(8, math.inf, 2.0)]
)
def test_auto_stays_with_float32(make_model, fit, monkeypatch, told, result):
    monkeypatch.setattr(trial, "try_precision", lambda *_: result)
    model = make_model(inference_precision="auto")
    engine = fit(model)
    assert model.model.precision == "float32"
    assert load_model(engine.best_model_path).model.precision == "float32"
    assert any(line.startswith("Inference: the networks compute in float32, since bfloat16 is") for line in told)


def test_auto_without_held_out_images_says_so(make_model, fit, told):
    model = make_model(inference_precision="auto", held_out_share=0)
    fit(model)
    assert model.model.precision == "float32"
    assert any(
        "no images are held out to try other precisions on; the networks compute in float32" in line for line in told
    )


def test_what_moves_scores_is_told(make_model, fit, monkeypatch, told):
    monkeypatch.setattr(scoring_dtype, "try_precision", lambda *_: Trial(8, 0.3, 2.0))
    fit(make_model(inference_precision="bfloat16"))
    assert any("by 0.300 of their standard deviation (0.1 is tolerated). Verdicts may differ" in x for x in told)


def test_the_trial_compares_both_on_the_held_out_images(make_model, fit, monkeypatch):
    skip_unless_computed("bfloat16")
    trials = []

    def record(*arguments):
        trials.append(trial.try_precision(*arguments))
        return trials[-1]

    monkeypatch.setattr(scoring_dtype, "try_precision", record)
    model = make_model(inference_precision="bfloat16", held_out_share=0.5)
    fit(model)
    (result,) = trials
    assert result.images == 4
    assert 0 < result.shift < math.inf
    assert result.speedup > 0
    assert model.model.precision == "bfloat16"


def test_a_precision_that_does_not_exist(make_model):
    with pytest.raises(ValueError, match=r"inference_precision: wanted None or one of .* got 'int4'"):
        make_model(inference_precision="int4")


@pytest.mark.parametrize("given", [{"post_processor": False}, {"limit_val_batches": 0}], ids=str)
def test_what_auto_takes_is_saved_without_a_threshold_too(make_model, fit, monkeypatch, given):
    skip_unless_computed("bfloat16")
    monkeypatch.setattr(trial, "try_precision", lambda *_: Trial(8, 0.01, 2.0))
    of_model = {name: value for name, value in given.items() if name == "post_processor"}
    model = make_model(inference_precision="auto", **of_model)
    engine = fit(model, **{name: value for name, value in given.items() if name not in of_model})
    assert model.model.precision == "bfloat16"
    assert load_model(engine.best_model_path).model.precision == "bfloat16"


def test_a_precision_is_tried_with_the_exponents_of_the_student(make_model, fit, monkeypatch):
    """The first of two students is the better one, and is tried once more when the second has been measured."""
    skip_unless_computed("bfloat16")
    tried = []

    def record(_precision, _judge, _trainer, model):
        tried.append((model.model.level_weights, student_sum(model)))
        return Trial(8, 0.01, 2.0)

    monkeypatch.setattr(scoring_dtype, "try_precision", record)
    monkeypatch.setattr(Judge, "measure", measured((1, 0.9, (1.5, 0.5)), (2, 0.5, (0.5, 1.5))))
    model = make_model(inference_precision="bfloat16", held_out_share=0.5)
    fit(model, max_epochs=2)
    best = model.student_selection.best
    assert best.level_weights == (1.5, 0.5)
    assert tried == [(best.level_weights, student_sum(model))]


def measured(*results):
    """Stand in for the judge: mean map, AUROC and exponents of one student after the other."""
    each = iter(results)

    def measure(judge, trainer, model) -> Measurement:
        value, auroc, weights = next(each)
        model.model.score_by(weights, judge.precision)
        return Measurement(trainer.current_epoch, trainer.global_step, value, auroc, weights)

    return measure


def student_sum(model: StfpmExt) -> float:
    return sum(tensor.double().sum().item() for tensor in model.model.student_model.state_dict().values())


@pytest.mark.parametrize("cache", ["memory", None])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_judge_scores_in_one_precision(make_model, fit, monkeypatch, cache, precision):
    """Whether the teacher's features are kept or not."""
    skip_unless_computed("bfloat16")
    computed = set()
    original = StfpmExtModel._distances

    def record(self, teacher, student, images):
        computed.update(str(level.dtype) for side in (teacher, student) for level in side.values())
        return original(self, teacher, student, images)

    monkeypatch.setattr(StfpmExtModel, "_distances", record)
    fit(make_model(inference_precision=precision, teacher_cache=cache))
    assert computed == {f"torch.{precision}"}
