# SPDX-License-Identifier: Apache-2.0

"""What can go wrong, by the rows of docs/trouble.md: no wrong verdict in silence."""

import copy
import errno
import math
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import ImageBatch
from anomalib.data.utils import read_image
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from helpers import folder
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from PIL import Image
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.prune import identity
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import CenterCrop, Compose, GaussianBlur, Normalize, Resize

from anomalib_stfpm_ext import Predictor, StfpmExt, figures, load_model
from anomalib_stfpm_ext.backbones import pretrained_name
from anomalib_stfpm_ext.cli import draw
from anomalib_stfpm_ext.convert import save_checkpoint
from anomalib_stfpm_ext.data.images import check_file
from anomalib_stfpm_ext.feature_pyramid import Teacher
from anomalib_stfpm_ext.files import lock
from anomalib_stfpm_ext.watch.service import watch
from anomalib_stfpm_ext.watch.table import ScoreTable

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
IMAGENET = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture
def make_model(small_weights):
    def make(**arguments) -> StfpmExt:
        settings = {"layers": ["layer1", "layer2"], "teacher_weights": small_weights, "lr": 0.05, "seed": 0}
        if "pre_processor" not in arguments:
            settings["image_size"] = (48, 64)
        return StfpmExt("test_resnet", **(settings | {"visualizer": False} | arguments))

    return make


@pytest.fixture
def fit(images, tmp_path):
    def run(model, epochs=1, **arguments) -> Engine:
        engine = Engine(default_root_dir=tmp_path, max_epochs=epochs, **QUIET, **arguments)
        engine.fit(model, datamodule=folder(images))
        return engine

    return run


@pytest.fixture
def told(monkeypatch):
    """What the user is told, once each."""
    said: list[str] = []
    modules = ["callbacks.checks", "callbacks.student_selection", "checkpoints", "feature_pyramid", "settings"]
    for module in (*modules, "selection.thresholds", "torch_model"):
        for function in ("rank_zero_warn", "rank_zero_info"):
            target = f"anomalib_stfpm_ext.{module}.{function}"
            monkeypatch.setattr(target, lambda message, *_, **__: said.append(str(message)), raising=False)
    return said


def trained_student(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.student_model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_transforms_that_a_checkpoint_cannot_hold_are_refused_before_training(make_model, fit):
    model = make_model(pre_processor=PreProcessor(Compose([Resize((48, 64)), GaussianBlur(3), IMAGENET])))
    with pytest.raises(ValueError, match=r"pre_processor: wanted transforms that a checkpoint can hold.*GaussianBlur"):
        fit(model)


@pytest.fixture
def checkpoint_without_transform(make_model, tmp_path):
    """Write what anomalib makes of a transform that it cannot save."""
    path = tmp_path / "lost.ckpt"
    save_checkpoint(make_model(), path)
    content = torch.load(path, weights_only=True)
    content["anomalib_pre_processor_config"] = {"transform": None}
    torch.save(content, path)
    return path


def test_checkpoints_that_have_lost_their_transform_are_refused(checkpoint_without_transform):
    with pytest.raises(ValueError, match="pre_processor: wanted the one of the training"):
        load_model(checkpoint_without_transform)
    given = PreProcessor(Compose([Resize((48, 64)), IMAGENET]))
    model = StfpmExt.load_from_checkpoint(checkpoint_without_transform, pre_processor=given)
    assert model.pre_processor.transform is given.transform


def test_models_without_transform_have_none_in_their_checkpoint(make_model, tmp_path):
    save_checkpoint(make_model(pre_processor=PreProcessor()), tmp_path / "none.ckpt")
    assert load_model(tmp_path / "none.ckpt").pre_processor.transform is None


@pytest.mark.parametrize("limit", [{"epochs": 1}, {"epochs": -1, "max_steps": 2}])
def test_an_engine_that_has_trained_is_refused(make_model, fit, images, limit):
    model = make_model()
    engine = fit(model, **limit)
    for other in (make_model(), model):  # neither another model nor the same one would be trained
        with pytest.raises(ValueError, match="engine: wanted a new Engine"):
            engine.fit(other, datamodule=folder(images))


def test_an_engine_that_has_not_finished_goes_on_with_its_model_alone(make_model, fit, images):
    model = make_model()
    engine = fit(model, epochs=1)
    before = trained_student(model)
    engine.trainer.fit_loop.max_epochs = 2
    engine.fit(model, datamodule=folder(images))
    assert engine.trainer.current_epoch == 2
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained_student(model).items())
    engine.trainer.fit_loop.max_epochs = 3
    with pytest.raises(ValueError, match="engine: wanted a new Engine"):
        engine.fit(make_model(), datamodule=folder(images))


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", "resnet18.tv_in1k"),
        ("wide_resnet50_2", "wide_resnet50_2.tv_in1k"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"),
    ],
)
def test_names_without_tag_stand_for_torchvisions_weights(name, weights, monkeypatch, told):
    asked = []
    create = timm.create_model

    def spy(backbone, pretrained=False, **arguments):
        if pretrained:
            asked.append(backbone)
        return create(backbone, pretrained=False, **arguments)

    assert pretrained_name(name) == weights
    monkeypatch.setattr(timm, "create_model", spy)
    Teacher(name, ["layer1"] if "resnet" in name else ["blocks.1"])
    assert asked == [weights]
    assert (told == []) == (name == weights)
    assert all(f"backbone {name!r} stands for the weights {weights!r}" in message for message in told)


def test_what_is_given_beside_a_checkpoint_is_in_force(make_model, tmp_path, told):
    path = tmp_path / "model.ckpt"
    save_checkpoint(make_model(), path)
    model = StfpmExt.load_from_checkpoint(path, post_processor=PostProcessor(image_sensitivity=0.9))
    assert model.post_processor.image_sensitivity == 0.9
    assert any(message.startswith("post_processor: what was given is in force") for message in told)
    told.clear()
    model = StfpmExt.load_from_checkpoint(path, image_size=(32, 40))
    assert model.pre_processor.transform.transforms[0].size == [32, 40]
    assert any(message.startswith("pre_processor: what was given is in force") for message in told)
    told.clear()
    model = StfpmExt.load_from_checkpoint(path)
    assert model.pre_processor.transform.transforms[0].size == [48, 64]
    assert told == []


def test_the_image_size_leaves_the_normalisation_alone(make_model, tmp_path):
    model = make_model(image_size=(32, 40))
    resize, normalise = model.pre_processor.transform.transforms
    assert list(resize.size) == [32, 40]
    assert list(normalise.mean) == [0.5, 0.5, 0.5]  # the teacher's, not ImageNet's
    save_checkpoint(model, tmp_path / "model.ckpt")
    assert list(load_model(tmp_path / "model.ckpt").pre_processor.transform.transforms[0].size) == [32, 40]
    with pytest.raises(ValueError, match="image_size: wanted None where pre_processor is given"):
        make_model(image_size=(32, 40), pre_processor=PreProcessor())


def test_another_normalisation_than_the_teachers_is_told(make_model, fit, told):
    fit(make_model(pre_processor=PreProcessor(Resize((48, 64)))))
    assert any("these get no normalisation" in message for message in told)
    told.clear()
    fit(make_model())
    assert not any("normalisation" in message for message in told)


def test_backbones_of_one_size():
    model = StfpmExt("swin_tiny_patch4_window7_224", ["layers.0", "layers.1"], teacher_weights=False)
    assert list(model.pre_processor.transform.transforms[0].size) == [224, 224]


def test_other_sizes_of_such_backbones_are_refused(fit):
    model = StfpmExt("swin_tiny_patch4_window7_224", ["layers.0"], teacher_weights=False, image_size=(64, 64))
    with pytest.raises(ValueError, match=r"image_size: wanted \(224, 224\), the one size of 'swin_tiny"):
        fit(model)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_change_the_weights_are_refused(make_model, fit, precision):
    with pytest.raises(ValueError, match="precision: wanted one of"):
        fit(make_model(), precision=precision)


def test_scores_after_a_mixed_precision_training_are_the_same_everywhere(make_model, fit, images):
    model = make_model()
    engine = fit(model, precision="bf16-mixed")
    (batch,) = engine.predict(model, datamodule=folder(images, eval_batch_size=8), ckpt_path=engine.best_model_path)
    predict = Predictor(engine.best_model_path, "cpu")
    for image, score in zip(batch.image_path, batch.pred_score, strict=True):
        assert predict(read_image(image, as_tensor=True)).pred_score.item() == pytest.approx(score.item(), abs=1e-4)


@pytest.mark.parametrize(("other", "backbone"), [("resnet34", "resnet18"), ("resnet101", "resnet50")])
def test_weights_of_a_deeper_network_are_refused(other, backbone, tmp_path):
    torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"teacher_weights: wanted weights of '{backbone}', got those of another"):
        Teacher(backbone, ["layer1", "layer2"], tmp_path / "other.pth")


def test_predictions_without_a_threshold_are_told(make_model, fit, images, told):
    model = make_model()
    engine = fit(model, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.predict(model, datamodule=folder(images), ckpt_path=engine.best_model_path)
    assert any("there is no threshold" in message for message in told)


@pytest.mark.parametrize(("good", "defective"), [(1, 0), (0, 3), (2, 0), (3, 0), (1, 1)])
def test_a_threshold_that_can_tell_nothing_is_none(make_model, images, tmp_path, told, good, defective):
    """A single score or defective images alone; of several good ones, the highest score is a threshold."""
    for role, count in (("good", 6), ("good_test", good), ("bad", defective)):
        (tmp_path / "few" / role).mkdir(parents=True)
        for path in sorted((images / role).iterdir())[:count]:
            shutil.copy(path, tmp_path / "few" / role)
    roles = {"normal_test_dir": good and "good_test", "abnormal_dir": defective and "bad"}
    present = {name: role or None for name, role in roles.items()}
    data = folder(tmp_path / "few", val_split_mode="same_as_test", **present)
    if not good:  # anomalib would take good images of the training for the test
        data.setup()
        data.val_data.samples = data.val_data.samples[data.val_data.samples.label_index == 1].reset_index(drop=True)
        data.setup = lambda *_, **__: None
    model = make_model(held_out_share=0)
    Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(model, datamodule=data)
    useful = good > 1 or (good == 1 and defective == 1)
    assert model.post_processor.image_threshold.isnan() != useful
    assert model.post_processor.image_max.isnan() != useful
    assert any("no threshold is set, since the validation has" in message for message in told) != useful


@pytest.mark.parametrize("own_loaders", [False, True])
def test_a_shortened_validation_of_defective_images_sets_no_threshold(make_model, images, tmp_path, told, own_loaders):
    """Images are sorted by folder, so that the first batches may be all of one kind."""
    data, model = folder(images, eval_batch_size=2), make_model()
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, limit_val_batches=1, **QUIET)
    if own_loaders:
        data.setup()
        engine.fit(model, data.train_dataloader(), data.val_dataloader())
    else:
        engine.fit(model, datamodule=data)
        assert any("0 good and 2 defective ones to validate on" in message for message in told)
    assert model.post_processor.image_threshold.isnan()
    assert model.post_processor.image_max.isnan()
    assert any("the validation has no image that is known to be good" in message for message in told)


@pytest.mark.parametrize("steps", [{"epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}], ids=str)
def test_a_fit_without_steps_is_told(make_model, fit, told, steps):
    fit(make_model(), **({"epochs": 1} | steps))
    assert any("fit: no step was made" in message for message in told)


def finder() -> BatchSizeFinder:
    return BatchSizeFinder("power", steps_per_trial=2, init_val=2, max_trials=1, batch_arg_name="train_batch_size")


def test_a_fit_that_only_finds_its_batch_size_is_told(make_model, images, tmp_path, told):
    """The steps of the finder, which it takes back, are none of the fit. What a validation has set stays."""
    model, data = make_model(), folder(images)
    Engine(default_root_dir=tmp_path, **QUIET).validate(model, datamodule=data)

    def tensors() -> dict[str, torch.Tensor]:  # no image has masks, so pixels have no threshold
        return {name: t.nan_to_num(9) for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}

    before = tensors()
    Engine(callbacks=[finder()], default_root_dir=tmp_path, max_epochs=0, **QUIET).fit(model, datamodule=data)
    assert any("fit: no step was made" in message for message in told)
    assert same(tensors(), before)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_batch_size_finder_leaves_the_steps_to_the_fit(make_model, images, tmp_path, told, is_training):
    """It sets max_steps for its trials, at whose end the fit that follows must not end, too.

    It makes them without callbacks. An aborted test leaves a model that is not in training mode.
    """
    model = make_model().train(is_training)
    before = trained_student(model)
    engine = Engine(callbacks=[finder()], default_root_dir=tmp_path, max_epochs=2, **QUIET)
    engine.fit(model, datamodule=folder(images))
    assert [measurement.epoch for measurement in model.student_selection.history] == [0, 1]
    assert not same(trained_student(model), before)
    assert same(trained_student(load_model(engine.best_model_path)), trained_student(model))
    assert not any("fit: no step was made" in message for message in told)


def test_an_untrained_student_is_told(fit, images, tmp_path, told, monkeypatch):
    """Whatever is made of it; a fit that makes no step leaves it untrained, and so does a checkpoint."""
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)  # it takes seconds
    make_model = partial(StfpmExt, "test_resnet", ["layer1"], False, image_size=(48, 64), visualizer=False)

    def tells(use, *arguments) -> bool:
        told.clear()
        use(*arguments)
        return any("student: wanted one that is trained" in message for message in told)

    engine, data, file = Engine(default_root_dir=tmp_path, **QUIET), folder(images), tmp_path / "now.ckpt"
    uses = [partial(getattr(engine, stage), datamodule=data) for stage in ("validate", "test", "predict")]
    uses += [lambda model: model.to_torch(tmp_path), lambda model: model.to_onnx(tmp_path)]
    uses += [lambda model: save_checkpoint(model, file), lambda _: load_model(file)]
    model = make_model()
    fit(model, epochs=0)
    assert all(tells(use, model) for use in uses)
    copied = make_model()
    copied.load_state_dict(model.state_dict())  # as processes that Lightning starts give a model back
    assert tells(uses[0], copied)
    fit(model)
    assert not any(tells(use, model) for use in uses)
    stfpm = {name: tensor for name, tensor in model.state_dict().items() if "extra_state" not in name}
    model = make_model()
    model.load_state_dict(stfpm, strict=False)
    assert not tells(uses[0], model)


def test_torchs_default_dtype_does_no_harm(make_model, fit, images):
    path = fit(make_model()).best_model_path
    image = read_image(images / "bad" / "0.png", as_tensor=True)
    expected = Predictor(path, "cpu")(image).pred_score
    torch.set_default_dtype(torch.float64)
    try:
        for picture in (image, image.double()):
            assert torch.equal(Predictor(path, "cpu")(picture).pred_score, expected)
        again = make_model()
        fit(again)
        assert next(again.parameters()).dtype == torch.float32
        assert not again.post_processor.image_threshold.isnan()
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_as_one_vector(make_model):
    """As optimisers of other libraries and attacks on networks want them."""
    model, image = make_model().eval(), torch.rand(1, 3, 48, 64)
    student = model.model.student_model
    with torch.no_grad():
        model(image)
        vector = parameters_to_vector(student.parameters())
        vector_to_parameters(1.5 * vector, student.parameters())
        found = model(image).pred_score
        copied = copy.deepcopy(model)
        assert torch.equal(parameters_to_vector(copied.model.student_model.parameters()), 1.5 * vector)
        torch.testing.assert_close(found, copied(image).pred_score)


@pytest.mark.parametrize("gradients", [False, True])
def test_scores_do_not_depend_on_a_callers_autocast(make_model, fit, tmp_path, gradients, monkeypatch):
    """Whether it is asked by itself, through `Predictor`, or by anomalib through an export."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model, image = make_model(), torch.rand(3, 48, 64)
    checkpoint = fit(model).best_model_path
    forms = [Predictor(checkpoint, "cpu"), lambda image: model.eval()(image[None])]
    forms.append(lambda image: TorchInferencer(model.to_torch(tmp_path), "cpu").predict(image))
    for form in forms:
        with torch.set_grad_enabled(gradients):
            expected = form(image)
            with torch.autocast("cpu", torch.bfloat16):
                found = form(image)
        assert torch.equal(found.pred_score, expected.pred_score)
        assert torch.equal(found.anomaly_map, expected.anomaly_map)


def test_a_model_in_evaluation_mode_is_trained(make_model, fit):
    model = make_model()
    before = trained_student(model)
    fit(model.eval())
    assert not same(trained_student(model), before)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_end"])
def test_a_callback_that_leaves_evaluation_mode_behind_does_no_harm(make_model, images, tmp_path, hook):
    """As one that scores an image now and then; Lightning does not train such a model by itself."""
    expected = make_model()
    Engine(default_root_dir=tmp_path, max_epochs=2, **QUIET).fit(expected, datamodule=folder(images))
    callback = Callback()
    setattr(callback, hook, lambda _, pl_module, *__: pl_module.eval())
    model = make_model()
    Engine(callbacks=[callback], default_root_dir=tmp_path, max_epochs=2, **QUIET).fit(model, datamodule=folder(images))
    assert same(trained_student(model), trained_student(expected))


def test_gradients_are_clipped(make_model, fit):
    """A model's own arguments of the trainer override the user's in anomalib."""
    assert fit(make_model(), gradient_clip_val=0.5).trainer.gradient_clip_val == 0.5


def test_tiles_are_in_the_checkpoint(make_model, images, tmp_path):
    tiles = TilerConfigurationCallback(enable=True, tile_size=32, stride=16)
    model = make_model(image_size=(64, 64))
    engine = Engine(callbacks=[tiles], default_root_dir=tmp_path, max_epochs=1, **QUIET)
    engine.fit(model, datamodule=folder(images))
    (expected,) = engine.predict(model, datamodule=folder(images, eval_batch_size=8))
    predict = Predictor(engine.best_model_path, "cpu")
    for path, score in zip(expected.image_path, expected.pred_score, strict=True):
        assert predict(read_image(path, as_tensor=True)).pred_score.item() == pytest.approx(score.item(), abs=1e-4)
    with pytest.raises(ValueError, match=r"tiler: wanted .*as in the checkpoint, got None"):
        Engine(default_root_dir=tmp_path, max_epochs=2, **QUIET).fit(
            make_model(image_size=(64, 64)), datamodule=folder(images), ckpt_path=engine.best_model_path
        )


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("share", [0.2, 0])
def test_the_student_that_is_kept_has_its_own_threshold(make_model, images, tmp_path, every, share):
    model = make_model(held_out_share=share)
    engine = Engine(default_root_dir=tmp_path, max_epochs=5, check_val_every_n_epoch=every, **QUIET)
    engine.fit(model, datamodule=folder(images))
    for kept in (model, load_model(engine.best_model_path)):
        found = {name: tensor.clone() for name, tensor in kept.post_processor.state_dict().items()}
        Engine(default_root_dir=tmp_path, **QUIET).validate(kept, datamodule=folder(images))
        for name, tensor in kept.post_processor.state_dict().items():
            torch.testing.assert_close(tensor, found[name], equal_nan=True)
        assert not kept.post_processor.image_threshold.isnan()


@pytest.mark.parametrize("share", [0.2, 0])
@pytest.mark.parametrize(("epochs", "every"), [(3, 2), (1, 2), (2, 2), (2, 1)])
def test_a_student_that_no_checkpoint_holds_is_told(make_model, fit, images, tmp_path, told, share, epochs, every):
    """Lightning writes checkpoints after validations alone, where not every epoch has one."""
    message = "ModelCheckpoint: it wrote no checkpoint after the student that is kept"
    model, path = make_model(held_out_share=share, lr=0.4), tmp_path / "kept.ckpt"
    engine = fit(model, epochs, check_val_every_n_epoch=every)
    found = engine.best_model_path
    is_saved = bool(found) and same(trained_student(load_model(found)), trained_student(model))
    assert is_saved != any(message in line for line in told)
    assert is_saved == (epochs % every == 0) or share
    engine.trainer.save_checkpoint(path)
    assert same(trained_student(load_model(path)), trained_student(model))
    told.clear()
    resumed = Engine(default_root_dir=tmp_path, max_epochs=epochs, **QUIET)
    resumed.fit(make_model(held_out_share=share, lr=0.4), datamodule=folder(images), ckpt_path=path)
    assert not any(message in line for line in told)  # there was nothing left to train


@pytest.mark.parametrize("share", [0.2, 0])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_checkpoints_of_own_callbacks_have_no_threshold_of_another_student(make_model, images, tmp_path, share, hook):
    """Such callbacks come before those of the model: after a step, and after a validation."""
    model, callback, paths = make_model(held_out_share=share, lr=0.4), Callback(), []

    def save(trainer, *_):
        paths.append(tmp_path / f"{len(paths)}.ckpt")
        trainer.save_checkpoint(paths[-1])

    setattr(callback, hook, save)
    engine = Engine(callbacks=[callback], default_root_dir=tmp_path, max_epochs=2, **QUIET)
    engine.fit(model, datamodule=folder(images))
    thresholds = []
    for path in paths:
        loaded = load_model(path)
        thresholds.append(loaded.post_processor.image_threshold.item())
        Engine(default_root_dir=tmp_path, **QUIET).validate(loaded, datamodule=folder(images))
        own = loaded.post_processor.image_threshold.item()
        assert math.isnan(thresholds[-1]) or thresholds[-1] == pytest.approx(own)
    if hook == "on_validation_end":
        assert len(thresholds) == 2
        assert not any(map(math.isnan, thresholds))


def test_a_validation_sees_the_student_of_its_step(make_model, images, tmp_path):
    seen = {}

    class Look(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen[trainer.global_step] = trained_student(pl_module)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                assert same(trained_student(pl_module), seen[trainer.global_step])

    model = make_model(lr=0.4)
    engine = Engine(callbacks=[Look()], default_root_dir=tmp_path, max_epochs=3, **QUIET)
    engine.fit(model, datamodule=folder(images))
    best = model.student_selection.best
    assert same(trained_student(model), seen[best.step])


@pytest.mark.parametrize(
    "callback",
    [EMAWeightAveraging, partial(StochasticWeightAveraging, swa_lrs=0.1), partial(ModelPruning, "l1_unstructured")],
)
def test_other_averages_are_refused(make_model, images, tmp_path, callback):
    engine = Engine(callbacks=[callback()], default_root_dir=tmp_path, max_epochs=2, **QUIET)
    with pytest.raises(ValueError, match="callbacks: wanted none that averages, prunes or replaces weights"):
        engine.fit(make_model(), datamodule=folder(images))


class OwnAverage(Callback):
    """An average of weights as people write it: in the network from one hook to another."""

    def __init__(self, put: str, take: str) -> None:
        self._average: dict[str, torch.Tensor] = {}
        self._training: dict[str, torch.Tensor] = {}
        setattr(self, put, self._put)
        setattr(self, take, self._take)

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, tensor in pl_module.model.student_model.named_parameters():
            self._average[name] = (self._average.get(name, tensor) + tensor.detach()) / 2

    @torch.no_grad()
    def _put(self, trainer, pl_module, *_):
        for name, tensor in pl_module.model.student_model.named_parameters():
            self._training[name] = tensor.clone()
            tensor.copy_(self._average[name])

    @torch.no_grad()
    def _take(self, trainer, pl_module, *_):
        for name, tensor in pl_module.model.student_model.named_parameters():
            tensor.copy_(self._training.get(name, tensor))


@pytest.mark.parametrize("share", [0.2, 0])
@pytest.mark.parametrize(
    "hooks",
    [
        ("on_validation_start", "on_validation_end"),
        ("on_validation_epoch_start", "on_validation_epoch_end"),
        ("on_validation_epoch_start", "on_train_epoch_start"),
        ("on_train_epoch_end", "on_train_epoch_start"),
        ("on_train_end", "on_train_batch_start"),
    ],
    ids=str,
)
def test_own_averages_of_weights_are_refused(make_model, images, tmp_path, share, hooks):
    """Threshold and range would be those of a student that is not the saved one."""
    model = make_model(held_out_share=share)
    engine = Engine(callbacks=[OwnAverage(*hooks)], default_root_dir=tmp_path, max_epochs=2, **QUIET)
    with pytest.raises(ValueError, match=r"callbacks: wanted none that changes the student .* with \['OwnAverage'\]"):
        engine.fit(model, datamodule=folder(images))


def test_averages_that_stay_in_the_network_are_kept(make_model, images, tmp_path):
    """What a callback does between steps is training."""
    callback = OwnAverage("on_train_batch_start", "on_fit_start")
    callback._average = dict(make_model().model.student_model.named_parameters())
    model = make_model()
    engine = Engine(callbacks=[callback], default_root_dir=tmp_path, max_epochs=2, **QUIET)
    engine.fit(model, datamodule=folder(images))
    assert same(trained_student(load_model(engine.best_model_path)), trained_student(model))


def test_compiled_networks_are_refused(make_model, fit):
    model = make_model()
    model.model.student_model = torch.compile(model.model.student_model)
    with pytest.raises(ValueError, match="model: wanted compile_mode="):
        fit(model)


def test_a_frozen_student_is_refused(make_model, fit):
    model = make_model()
    model.freeze()  # as for inference
    with pytest.raises(ValueError, match=r"model: wanted a student to train \(model.unfreeze\(\)\)"):
        fit(model)
    model.unfreeze()
    fit(model)


def test_data_without_a_validation(make_model, images, tmp_path):
    data = folder(images, val_split_mode="none")
    with pytest.raises(ValueError, match=r"val_split_mode: wanted images .*limit_val_batches=0"):
        Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(make_model(), datamodule=data)
    with pytest.raises(ValueError, match="val_split_mode: wanted images"):
        Engine(default_root_dir=tmp_path, **QUIET).validate(make_model(), datamodule=data)
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, limit_val_batches=0, **QUIET)
    engine.fit(make_model(), datamodule=data)
    assert Predictor(engine.best_model_path, "cpu").threshold is None


@pytest.mark.parametrize("change", [weight_norm, spectral_norm, partial(identity, name="weight")])
def test_pruned_or_parametrised_networks_are_refused(make_model, fit, change):
    model = make_model()
    change(model.model.student_model.feature_extractor.conv1[0])
    with pytest.raises(ValueError, match=r"model: wanted .* neither pruned nor parametrised.*conv1"):
        fit(model)


@pytest.mark.parametrize(
    "options",
    [{"fast_dev_run": True}, {"overfit_batches": 1}, {"limit_train_batches": 1}, {"limit_val_batches": 1}],
)
def test_shortened_fits_leave_the_right_student(make_model, fit, options):
    model = make_model()
    fit(model, epochs=2, **options)
    selection = model.student_selection
    assert selection.best is not None
    assert same(trained_student(model), selection.students.kept.weights())


def test_crops_are_told(make_model, fit, told):
    pre_processor = PreProcessor(Compose([Resize((64, 64)), CenterCrop((48, 48)), IMAGENET]))
    engine = fit(make_model(pre_processor=pre_processor))
    message = "What a crop cuts away is not looked at"
    assert sum(message in line for line in told) == 1
    told.clear()
    Predictor(engine.best_model_path, "cpu")  # as watch and draw do
    assert sum(message in line for line in told) == 1


def test_maps_of_a_crop_lie_where_the_model_looks(make_model, tmp_path, monkeypatch):
    """The picture beside the maps is the crop, and so is the mask."""
    pre_processor = PreProcessor(Compose([Resize((64, 64)), CenterCrop((32, 32)), IMAGENET]))
    save_checkpoint(make_model(pre_processor=pre_processor), tmp_path / "model.ckpt")
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[40:56, 48:80] = 255
    for folder_name in ("images", "masks"):
        (tmp_path / folder_name).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder_name / "0.png")
    drawn = []
    monkeypatch.setattr(figures, "draw_levels", lambda *arguments: drawn.append(arguments) or Image.new("RGB", (1, 1)))
    draw.levels(tmp_path / "model.ckpt", tmp_path / "images", tmp_path / "output", tmp_path / "masks")
    ((image, levels, mask, _),) = drawn
    assert image.shape[:2] == mask.shape == levels.product.shape == (32, 32)
    assert mask[4:12, 8:24].all()
    assert (mask > 0).sum() == 8 * 16
    assert image[5:11, 9:23].min() > 0.9
    assert image[14:].max() < 0.1


@pytest.mark.parametrize("batch", [2, 1])
def test_one_image_of_features_of_one_position(make_model, images, tmp_path, told, batch):
    """Batch norm cannot train on a single value; the rest of the epoch can."""
    model = make_model(layers=["layer3"], image_size=(16, 16), held_out_share=0.3)  # holds 3 out of 8
    before = trained_student(model)
    engine = Engine(default_root_dir=tmp_path, max_epochs=2, **QUIET)
    if batch == 1:
        with pytest.raises(ValueError, match="train_batch_size: wanted at least two images in each batch"):
            engine.fit(model, datamodule=folder(images, train_batch_size=batch))
        return
    engine.fit(model, datamodule=folder(images, train_batch_size=batch))
    assert any("the last image of each epoch is passed over" in message for message in told)
    assert not same(before, trained_student(model))


@pytest.mark.parametrize("kind", ["truncated.png", "truncated.jpg", "zeros.jpg", "pages.tif", "empty.png", "text.jpg"])
def test_broken_files_are_named_before_anything_is_trained(make_model, images, tmp_path, kind, monkeypatch):
    shutil.copytree(images, tmp_path / "images")
    path = tmp_path / "images" / "bad" / kind
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    picture.save(path, **({"save_all": True, "append_images": [picture]} if kind == "pages.tif" else {}))
    content = path.read_bytes()
    half = content[: len(content) // 2]
    path.write_bytes(
        {
            "truncated": half,
            "zeros": half + bytes(len(content) - len(half)),
            "pages": content,
            "empty": b"",
            "text": b"no image",
        }[path.stem]
    )
    monkeypatch.setattr(StfpmExt, "training_step", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=f"data: wanted images that can be read, got .*{kind}"):
        Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(
            make_model(), datamodule=folder(tmp_path / "images")
        )


def test_what_a_camera_appends_to_a_file_does_no_harm(tmp_path):
    for suffix in ("png", "jpg"):
        path = tmp_path / f"appended.{suffix}"
        Image.new("RGB", (32, 32)).save(path)
        path.write_bytes(path.read_bytes() + bytes(1000))
        check_file(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"", "it is empty"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_weights_say_what_they_are(tmp_path, content, reason, suffix):
    (tmp_path / f"teacher{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"teacher_weights: .*teacher{suffix}.*{reason}"):
        Teacher("resnet18", ["layer1"], tmp_path / f"teacher{suffix}")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("half", [False, True])
def test_weights_of_other_programs_are_read(tmp_path, prefix, half, monkeypatch):
    weights = timm.create_model("test_resnet").state_dict()
    saved = {prefix + name: tensor.half() if half else tensor for name, tensor in weights.items()}
    torch.save({"state_dict": saved, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "training.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    teacher = Teacher("test_resnet", ["layer1"], "~/training.pth")
    torch.testing.assert_close(
        teacher.feature_extractor.conv1[0].weight, weights["conv1.0.weight"], rtol=1e-3, atol=1e-3
    )


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = timm.create_model("test_resnet").state_dict()
    weights["conv1.0.weight"][0] = torch.nan
    torch.save(weights, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"teacher_weights: .*wanted finite numbers, got others in conv1.0.weight"):
        Teacher("test_resnet", ["layer1"], tmp_path / "nan.pth")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_a_warning(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with ScoreTable(tmp_path / "scores.csv") as table:
        assert table.known == {}
    assert "the file system knows no locks" in capsys.readouterr().err


def test_operating_system_without_such_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_stfpm_ext.files.fcntl", None)
    with (tmp_path / ".lock").open("w") as file:
        assert "this operating system knows no such locks" in lock(file, tmp_path, "another process")


def test_two_reproductions_into_one_folder(tmp_path):
    with (tmp_path / ".lock").open("w") as first, (tmp_path / ".lock").open("w") as second:
        assert lock(first, tmp_path, "another process") is None
        with pytest.raises(BlockingIOError, match="another process"):
            lock(second, tmp_path, "another process")


def test_what_is_trained_on_is_told_once(make_model, fit, told):
    fit(make_model(), epochs=2)
    expected = "Images: 6 images to train on, 2 held out, 2 good and 2 defective ones to validate on."
    assert [message for message in told if message.startswith("Images")] == [expected]
    assert not any(message.startswith("validation") for message in told)


@pytest.mark.parametrize(("steps", "is_told"), [(4, True), (700, False), (2000, False), (25_000, True)])
def test_steps_far_from_the_papers_are_told(make_model, fit, told, steps, is_told):
    class End(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    fit(make_model(), epochs=None, max_steps=steps, callbacks=[End()])
    expected = f"max_steps: this training has {steps:,} steps, the paper's some 700, whatever the number of images."
    assert is_told == any(message.startswith(expected) for message in told)


def test_a_validation_of_good_images_only_is_told(make_model, images, tmp_path, told):
    data = folder(images, abnormal_dir=None, test_split_mode="from_dir", val_split_mode="same_as_test")
    Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(make_model(), datamodule=data)
    assert any("it has 4 good and 0 defective images" in message for message in told)


@pytest.mark.parametrize("suffix", ["ckpt", "pt"])
def test_the_threshold_can_be_moved(make_model, fit, images, tmp_path, suffix, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = make_model()
    path = Path(fit(model).best_model_path)
    path = path if suffix == "ckpt" else model.to_torch(tmp_path)
    predict = Predictor(path, "cpu")
    pictures = [read_image(file, as_tensor=True) for file in (images / "bad").iterdir()]
    picture = min(pictures, key=lambda each: predict(each).pred_score.item())  # of the others, one has a score of 1
    for sensitivity, defective in ((0.01, False), (0.99, True)):
        predict = Predictor(path, "cpu", sensitivity=sensitivity)
        assert predict.threshold == pytest.approx(1 - sensitivity)
        assert predict(picture).pred_label.item() is defective
    with pytest.raises(ValueError, match="sensitivity: wanted a number from 0 to 1, got 2"):
        Predictor(path, "cpu", sensitivity=2)


def test_loaders_that_stretch_images_are_told(make_model, images, tmp_path, told):
    data = folder(images)
    data.setup()
    for augmentations, stretched in ((None, True), (Resize((48, 64)), False)):
        told.clear()
        data.train_data.augmentations = augmentations
        loader = DataLoader(data.train_data, batch_size=4, collate_fn=data.train_data.collate_fn)
        engine = Engine(default_root_dir=tmp_path, max_epochs=1, limit_val_batches=0, **QUIET)
        engine.fit(make_model(), train_dataloaders=loader)
        assert any(message.startswith("DataLoader: images of a batch") for message in told) == stretched


class OtherRange(Dataset):
    """Images as a data set of one's own may give them: 0 to 255, or normalised."""

    def __init__(self, source, change) -> None:
        self._source, self._change = source, change

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        item = self._source[index]
        item.image = self._change(item.image)
        return item


@pytest.mark.parametrize("change", [lambda image: 255 * image, IMAGENET], ids=["0 to 255", "normalised"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_images_of_another_range_are_refused(make_model, images, tmp_path, change, stage):
    """A model that is trained on them would find all images defective that come from files."""
    data = folder(images)
    data.setup()
    loader = DataLoader(OtherRange(data.test_data, change), batch_size=4, collate_fn=data.test_data.collate_fn)
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET)
    with pytest.raises(ValueError, match=r"data: wanted images of 0 to 1 from data sets, .* got values from"):
        getattr(engine, stage)(make_model(), loader)


@pytest.mark.parametrize("junk", ["bad/._0.png", "good_test/.ipynb_checkpoints/0.png"])
def test_junk_ends_a_run_before_it_is_paid_for(make_model, images, tmp_path, junk):
    shutil.copytree(images, tmp_path / "data")
    path = tmp_path / "data" / junk
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"resource fork")
    with pytest.raises(ValueError, match=f"data: wanted images without hidden files.*{Path(junk).name}"):
        Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(make_model(), datamodule=folder(tmp_path / "data"))


@pytest.mark.parametrize("share", [0.2, 0])
def test_an_exception_within_a_validation_leaves_the_student_without_a_threshold(
    make_model, images, tmp_path, share, told
):
    seen = []

    class Stop(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            seen.append(trained_student(pl_module))  # what is validated
            trainer.save_checkpoint(tmp_path / "within.ckpt")
            msg = "stop"
            raise RuntimeError(msg)

    model = make_model(held_out_share=share, lr=0.4)
    engine = Engine(callbacks=[Stop()], default_root_dir=tmp_path, max_epochs=1, **QUIET)
    with pytest.raises(RuntimeError, match="stop"):
        engine.fit(model, datamodule=folder(images))
    loaded = load_model(tmp_path / "within.ckpt")
    for each in (model, loaded):
        assert same(trained_student(each), seen[0])
        assert each.post_processor.image_threshold.isnan()
    assert any("no validation has set a threshold" in line for line in told)
    for each in (model, loaded):  # nothing of the validation that was broken off is left
        Engine(default_root_dir=tmp_path, **QUIET).validate(each, datamodule=folder(images))
    assert model.post_processor.image_threshold.isfinite()
    assert torch.equal(model.post_processor.image_threshold, loaded.post_processor.image_threshold)
    assert torch.equal(model.post_processor.image_max, loaded.post_processor.image_max)


def test_callbacks_with_states_of_their_own_do_not_stop_the_end_of_a_fit(make_model, images, tmp_path):
    class Own(Callback):
        def state_dict(self):
            return {"own": Path("a class that torch does not load with weights_only")}

    model = make_model(held_out_share=0)
    engine = Engine(callbacks=[Own()], default_root_dir=tmp_path, max_epochs=3, check_val_every_n_epoch=2, **QUIET)
    engine.fit(model, datamodule=folder(images))
    saved = torch.load(engine.best_model_path, weights_only=False)
    assert not model.post_processor.image_threshold.isnan()
    assert saved["callbacks"][Own().state_key]["own"] == Own().state_dict()["own"]


def few_images(images: Path, target: Path, **counts: int) -> Path:
    """Copy the first images of each folder."""
    for name, count in counts.items():
        (target / name).mkdir(parents=True)
        for index in range(count):
            shutil.copy(images / name / f"{index}.png", target / name)
    return target


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_images_to_train_on(make_model, images, tmp_path, told, count):
    data = folder(few_images(images, tmp_path / "few", good=count, good_test=4, bad=4))
    if count == 1:
        with pytest.raises(ValueError, match=r"held_out_share: .*\(or 0 to hold nothing out\), got 0.2 of 1 good"):
            Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(make_model(), datamodule=data)
    model = make_model(held_out_share=0.2 if count > 1 else 0)
    Engine(default_root_dir=tmp_path, max_epochs=1, **QUIET).fit(model, datamodule=data)
    held_out = 1 if count > 1 else 0
    expected = f"Images: {count - held_out} images to train on, {held_out} held out, 2 good and 2 defective ones"
    assert len([message for message in told if message.startswith(expected)]) == 1
    assert not model.post_processor.image_threshold.isnan()


@pytest.mark.parametrize(
    ("good", "defective", "threshold"),
    [
        ([0.1, 0.2], [0.4], 0.3),  # anomalib's is 0.4, and only what is above is defective
        ([0.1], [0.4], 0.25),
        ([0.1, 0.2], [0.4, 0.6], 0.3),
        ([0.1, 0.5], [0.4, 0.6], 0.25),
        ([0.1, 0.2], [], 0.2),  # anomalib's
        ([], [0.4, 0.6], math.nan),
        ([0.3, 0.3], [0.3], 0.3),
    ],
)
def test_no_defective_image_of_the_validation_lies_on_the_threshold(make_model, good, defective, threshold):
    post_processor = make_model().post_processor
    scores = torch.tensor([*good, *defective])
    labels = torch.tensor([False] * len(good) + [True] * len(defective))
    maps = scores[:, None, None].expand(-1, 4, 4).clone()
    batch = ImageBatch(torch.rand(len(scores), 3, 4, 4), gt_label=labels, pred_score=scores, anomaly_map=maps)
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    assert post_processor.state_dict()["_image_threshold"].item() == pytest.approx(threshold, nan_ok=True)
    post_processor.post_process_batch(batch)
    if good and defective and threshold not in good:
        assert batch.pred_label[labels].all()


def test_overlays_of_a_crop_show_what_the_model_sees(make_model, tmp_path, monkeypatch):
    pre_processor = PreProcessor(Compose([Resize((64, 64)), CenterCrop((32, 32)), IMAGENET]))
    save_checkpoint(make_model(pre_processor=pre_processor), tmp_path / "model.ckpt")
    (tmp_path / "images").mkdir()
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[40:56, 48:80] = 255
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    shown = []
    monkeypatch.setattr(ImageVisualizer, "visualize", lambda _, batch: shown.append(batch) or Image.new("RGB", (1, 1)))
    paths = {"csv": tmp_path / "scores.csv", "overlays": tmp_path / "overlays"}
    watch(tmp_path / "model.ckpt", tmp_path / "images", once=True, patience=0, **paths)
    (batch,) = shown
    assert batch.image.shape[-2:] == batch.anomaly_map.shape[-2:] == (32, 32)
    assert batch.image[0, :, 5:11, 9:23].min() > 0.9
    assert batch.image[0, :, 14:].max() < 0.1


def test_a_forked_worker_with_one_thread_scores(make_model, tmp_path, forked):
    """With more threads torch itself hangs there, where its parent has used them."""
    save_checkpoint(make_model(), tmp_path / "model.ckpt")
    forked(
        f"""
import os, sys, time
import torch
from anomalib_stfpm_ext import Predictor
torch.set_num_threads(2)
predict, image = Predictor({str(tmp_path / "model.ckpt")!r}, "cpu"), torch.rand(3, 200, 200)
expected = predict(image).pred_score.item()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(abs(predict(image).pred_score.item() - expected) > 1e-6)
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done: break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    sys.exit("the child hangs")
assert status == 0
"""
    )
