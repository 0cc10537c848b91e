# SPDX-License-Identifier: Apache-2.0

"""Every export and inferencer of anomalib gives the maps of the eager model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import Stfpm
from anomalib.pre_processing import PreProcessor
from helpers import folder
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, RandomApply, Resize

from anomalib_stfpm_ext import StfpmExt, StfpmExtModel
from anomalib_stfpm_ext.exports.resizing import apply_quickly, exportable, resize_by_matrices

BACKBONE, LAYERS = "test_efficientnet", ["blocks.1", "blocks.2"]
SIZE = (64, 96)
# The post-processor has shifted and scaled the maps to 0 to 1: where they are near 0, only absolute errors count.
SAME = {"rtol": 1e-4, "atol": 1e-5}
# Weights of 16 or 8 bits, activations of 8 bits: the map's error must stay below its own spread.
LOSSY = {"FP16": 0.05, "INT8": 0.3, "INT8_PTQ": 1, "INT8_ACQ": 1}


@pytest.fixture(scope="module")
def data(images) -> Folder:
    return folder(images, eval_batch_size=4)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> StfpmExt:
    output = tmp_path_factory.mktemp("trained")
    engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=output, logger=False, enable_progress_bar=False)
    model = StfpmExt(
        BACKBONE,
        LAYERS,
        teacher_weights=False,
        lr=0.1,
        seed=0,
        pre_processor=StfpmExt.configure_pre_processor(SIZE),
        visualizer=False,
    )
    engine.fit(model, datamodule=data)
    return model.eval()


@pytest.fixture(scope="module")
def batch(data) -> torch.Tensor:
    data.setup()
    return torch.stack([data.test_data[index].image for index in range(3)])


@pytest.fixture(scope="module")
def expected(model, batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        predictions = model(batch)
    assert predictions.anomaly_map.std() > 0.05  # else nothing were compared
    return {"anomaly_map": predictions.anomaly_map.numpy(), "pred_score": predictions.pred_score.numpy()}


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory) -> Path:
    return model.to_onnx(tmp_path_factory.mktemp("onnx"), opset_version=18)


def run(path: Path, batch: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    return dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))


def test_onnx(onnx_file, batch, expected):
    for images in (batch, batch[:1]):  # of any number
        result = run(onnx_file, images)
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value[: len(images)], **SAME)


@pytest.fixture(scope="module")
def raw_model() -> StfpmExt:
    """Raw scores, which nothing cuts off at 0 and 1, of levels with exponents."""
    pre_processor = StfpmExt.configure_pre_processor(SIZE)
    model = StfpmExt(BACKBONE, LAYERS, False, seed=0, pre_processor=pre_processor, post_processor=False).eval()
    model.model.level_weights = (0.45, 1.55)
    return model


@pytest.fixture(scope="module")
def exports(raw_model, tmp_path_factory) -> dict[str, Callable[[torch.Tensor], Mapping[str, np.ndarray]]]:
    root = tmp_path_factory.mktemp("exports")
    network = torch.load(raw_model.to_torch(root), weights_only=False)["model"]
    path = raw_model.to_onnx(root)
    with pytest.MonkeyPatch.context() as patch:  # OpenVINO's way goes by such a file
        patch.setattr(raw_model, "to_onnx", lambda *_args, **_settings: path)
        openvino = OpenVINOInferencer(raw_model.to_openvino(root), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {
        "torch": lambda images: network(images)._asdict(),
        "onnx": lambda images: run(path, images),
        "openvino": lambda images: vars(openvino.predict(images)),
    }


@pytest.mark.parametrize("export", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("size", [(600, 500), (40, 90), SIZE], ids=["photograph", "small", "fitting"])
def test_images_of_any_size_get_the_scores_of_anomalib_predict(raw_model, exports, size, export):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    pre_processor = raw_model.pre_processor
    with torch.no_grad():
        expected = raw_model.model(pre_processor.transform(images))
        without_antialias = raw_model.model(pre_processor.export_transform(images)).pred_score
    if size == (600, 500):  # else antialiasing were not seen
        assert abs(without_antialias / expected.pred_score - 1) > 0.05
    result = exports[export](images)
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(result[name].squeeze(), getattr(expected, name).squeeze(), rtol=1e-4)


@pytest.mark.parametrize("before", [(600, 500), (64, 96), (40, 90), (97, 7)])
def test_matrices_resize_as_torch_does(before):
    images = torch.rand(2, 3, *before)
    expected = interpolate(images, SIZE, mode="bilinear", antialias=True)
    torch.testing.assert_close(resize_by_matrices(images, SIZE), expected, rtol=0, atol=1e-5)


def test_no_integers_are_clamped(onnx_file):
    """OpenVINO 2025.4, which anomalib Studio wants, makes 0 of them: all images had a score of 1."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(onnx_file)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    clamped = [types[node.input[0]] for node in graph.node if node.op_type == "Clip"]
    assert clamped
    assert set(clamped) == {onnx.TensorProto.FLOAT}


def test_shorter_side_and_crop(tmp_path):
    pre_processor = PreProcessor(Compose([Resize(72), CenterCrop((64, 64))]))
    model = StfpmExt(BACKBONE, LAYERS, False, pre_processor=pre_processor, post_processor=False).eval()
    images = torch.rand(1, 3, 200, 300)
    with torch.no_grad():
        expected = model.model(pre_processor.transform(images)).anomaly_map
    path = model.to_onnx(tmp_path, opset_version=18, input_size=(200, 300))
    np.testing.assert_allclose(run(path, images)["anomaly_map"], expected, rtol=1e-4)


def test_antialias_that_onnx_lacks(tmp_path):
    pre_processor = PreProcessor(Resize(SIZE, "bicubic"))
    model = StfpmExt(BACKBONE, LAYERS, False, pre_processor=pre_processor)
    with pytest.raises(ValueError, match=r"^pre_processor: wanted Resize with bilinear .* got antialias with bicubic$"):
        model.to_onnx(tmp_path, opset_version=18)


def test_pre_processor_with_a_forward_of_its_own():
    class Brighter(PreProcessor):
        def forward(self, batch):
            return super().forward(batch) + 1

    model = StfpmExt(BACKBONE, LAYERS, False, pre_processor=Brighter(), post_processor=False).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.model(images + 1))


def test_other_models_resize_as_before(tmp_path, monkeypatch):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create_model(*a, **{**k, "pretrained": False}))
    pre_processor = StfpmExt.configure_pre_processor(SIZE)
    stock = Stfpm(BACKBONE, LAYERS, pre_processor=pre_processor, post_processor=False).eval()
    images = torch.rand(1, 3, 200, 300)
    with torch.no_grad():
        before = stock(images)
        StfpmExt(BACKBONE, LAYERS, False, pre_processor=pre_processor).to_onnx(tmp_path, opset_version=18)
        torch.testing.assert_close(stock(images), before, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(pre_processor(images), pre_processor.transform(images))


def test_torchs_older_onnx_exporter(model, batch, tmp_path):
    """Torch still has it, anomalib 2.7 no longer."""
    settings = {"input_names": ["input"], "output_names": ["pred_score", "anomaly_map"]}
    settings |= {"dynamic_axes": {name: {0: "batch"} for names in settings.values() for name in names}}
    network = torch.nn.Sequential(exportable(model.pre_processor.transform), model.model).eval()
    torch.onnx.export(network, (batch[:2],), tmp_path / "model.onnx", dynamo=False, **settings)
    with torch.no_grad():
        raw = network(batch)
    result = run(tmp_path / "model.onnx", batch)
    np.testing.assert_allclose(result["anomaly_map"], raw.anomaly_map, rtol=1e-4)
    np.testing.assert_allclose(result["pred_score"], raw.pred_score, rtol=1e-4)


@pytest.fixture
def to_openvino(model, data, onnx_file, tmp_path, monkeypatch):
    """Export and load again, by way of the ONNX file that is there already."""
    monkeypatch.chdir(tmp_path)  # the inferencer leaves a cache where it is
    monkeypatch.setattr(model, "to_onnx", lambda *_args, **_settings: onnx_file)

    def export(compression: CompressionType | None = None) -> OpenVINOInferencer:
        path = model.to_openvino(tmp_path, compression_type=compression, datamodule=data)
        return OpenVINOInferencer(path, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})

    return export


def test_openvino(to_openvino, onnx_file, batch, expected):
    for inferencer in (to_openvino(), OpenVINOInferencer(onnx_file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})):
        for images in (batch, batch[:1]):
            result = inferencer.predict(images)
            for name, value in expected.items():
                of_batch = value[: len(images)]
                np.testing.assert_allclose(getattr(result, name).reshape(of_batch.shape), of_batch, **SAME)


@pytest.mark.parametrize("compression", LOSSY)
def test_openvino_compression(to_openvino, batch, expected, compression):
    result = to_openvino(CompressionType[compression]).predict(batch).anomaly_map
    error = np.abs(result - expected["anomaly_map"]).mean()
    assert 0 < error < LOSSY[compression] * expected["anomaly_map"].std(), error / expected["anomaly_map"].std()


@pytest.fixture(scope="module")
def faint_model() -> StfpmExt:
    """A student so near its teacher that scores, products of three distances, are some 1e-7."""
    layers, pre_processor = ["blocks.1", "blocks.2", "blocks.3"], StfpmExt.configure_pre_processor((64, 64))
    model = StfpmExt(BACKBONE, layers, False, seed=0, pre_processor=pre_processor).eval()
    model.model.student_model.load_state_dict(model.model.teacher_model.state_dict(), strict=False)
    model.model.level_weights = (0.5, 1.1, 1.4)
    with torch.no_grad():
        for parameter in model.model.student_model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
        raw = model.model(pre_processor.transform(faint_images()))
        for statistic, values in (("image", raw.pred_score), ("pixel", raw.anomaly_map)):
            for name, function in (("_min", torch.min), ("_max", torch.max), ("_threshold", torch.median)):
                prefix = "_" if name == "_threshold" else ""
                getattr(model.post_processor, f"{prefix}{statistic}{name}").copy_(function(values))
    assert 1e-8 < raw.pred_score.max() < 1e-6
    return model


def faint_images() -> torch.Tensor:
    """Images with more and less contrast."""
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return images * torch.linspace(0.2, 1, 8)[:, None, None, None]


def test_float16_holds_the_scores(faint_model, tmp_path):
    path = faint_model.to_onnx(tmp_path, opset_version=18)
    # ONNX's reference computes in float16; onnxruntime has no such kernels for CPUs, and computes in float32.
    half = ReferenceEvaluator(convert_float_to_float16(onnx.load(path)))
    images = faint_images()
    (scores,) = half.run(["pred_score"], {"input": images.half().numpy()})
    with torch.no_grad():
        expected = faint_model(images).pred_score.numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=0.1)
    np.testing.assert_allclose(run(path, images)["pred_score"], expected, rtol=1e-3, atol=1e-5)


def test_export_leaves_model_and_statistics_as_they_are(faint_model, tmp_path, monkeypatch):
    statistics = dict(faint_model.post_processor.named_buffers(recurse=False))
    assert set(statistics) == {
        "_image_threshold",
        "_pixel_threshold",
        "image_min",
        "image_max",
        "pixel_min",
        "pixel_max",
    }
    before = {name: value.clone() for name, value in statistics.items()}

    def fail(*_args, **_settings):
        assert faint_model.model.gain > 10
        assert faint_model.post_processor.pixel_max == pytest.approx(1, rel=1e-3)
        msg = "full"
        raise OSError(msg)

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(OSError, match="full"):
        faint_model.to_onnx(tmp_path)
    assert faint_model.model.gain == 1
    assert all(
        torch.equal(before[name], value) for name, value in faint_model.post_processor.named_buffers(recurse=False)
    )


def test_float16_and_raw_scores(raw_model, tmp_path):
    with pytest.raises(ValueError, match="compression_type: wanted another than FP16"):
        raw_model.to_openvino(tmp_path, compression_type=CompressionType.FP16)


def test_torch_inferencer(model, batch, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(model.to_torch(tmp_path), device="cpu")
    inferencer.predict(batch[0])  # folds batch norms
    for index, image in enumerate(batch):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            prediction = inferencer.predict(image)
        names = {event.key for event in profiler.key_averages()}
        assert "anomalib_stfpm_ext::anomaly_map" in names
        assert not any("batch_norm" in name for name in names)
        np.testing.assert_allclose(prediction.anomaly_map.squeeze(), expected["anomaly_map"][index, 0], **SAME)
        np.testing.assert_allclose(prediction.pred_score.item(), expected["pred_score"][index, 0], rtol=1e-4)


@pytest.fixture(scope="module", params=["image", "finest"])
def network(model, request) -> StfpmExtModel:
    network = StfpmExtModel(BACKBONE, LAYERS, False, combine_at=request.param)
    network.load_state_dict(model.model.state_dict())
    return network.eval()


def open_size() -> tuple[dict[int, torch.export.Dim]]:
    """Say that batch, height and width are not known yet."""
    return ({axis: torch.export.Dim(name, min=size) for axis, name, size in ((0, "b", 1), (2, "h", 32), (3, "w", 32))},)


def test_compiled_model(network):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()  # what the other network has shown to be symbols
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    for size in ((64, 96), (96, 128)):  # the second time, height and width become symbols
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images).anomaly_map, network(images).anomaly_map, rtol=1e-4, atol=0)
    assert len(graphs) == 2
    assert all("anomalib_stfpm_ext.anomaly_map" in code for code in graphs)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_model_holds_the_fused_operator_and_takes_images_of_any_size(network, strict):
    try:
        torch.export.export(network.teacher_model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=open_size())
    except torch._dynamo.exc.UserError as error:
        pytest.skip(f"this torch exports no such network at any size: {str(error)[:60]}")
    # As most people call it, with gradients enabled.
    exported = torch.export.export(network, (torch.rand(2, 3, 64, 96),), dynamic_shapes=open_size(), strict=strict)
    assert "anomalib_stfpm_ext.anomaly_map" in str(exported.graph)
    for size in ((5, 3, 32, 48), (1, 3, 300, 64)):  # features larger than the 64 channels of layer1, too
        images = torch.rand(size)
        with torch.no_grad():
            result = exported.module()(images).anomaly_map
            torch.testing.assert_close(result, network(images).anomaly_map, rtol=1e-4, atol=0)


def test_exported_model_can_be_saved(network, tmp_path):
    images = torch.rand(2, 3, 64, 96)
    torch.export.save(torch.export.export(network, (images,)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        result, expected = loaded(images), network(images)
    assert type(result) is type(expected)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)


def test_onnx_of_a_model_that_leaves_the_size_to_the_user(network, tmp_path):
    model = StfpmExt(BACKBONE, LAYERS, False, network.combine_at, pre_processor=False, post_processor=False)
    model.model.load_state_dict(network.state_dict())
    path = model.eval().to_onnx(tmp_path, opset_version=18, dynamic_shapes=open_size())
    images = torch.rand(3, 3, 96, 80)
    with torch.no_grad():
        expected = model(images).anomaly_map
    np.testing.assert_allclose(run(path, images)["anomaly_map"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "transform",
    [
        Compose([Resize((32, 48), antialias=True), Normalize([0.4] * 3, [0.2] * 3)]),
        Compose([Compose([Resize(40)]), CenterCrop(32), Normalize([0.4] * 3, [0.2] * 3)]),
        Normalize([0.4] * 3, [0.2] * 3),
        RandomApply([Normalize([0.4] * 3, [0.2] * 3)], p=0),
    ],
    ids=str,
)
def test_transforms_are_applied_as_torchvision_does(transform):
    images = torch.rand(2, 3, 50, 64)
    assert torch.equal(apply_quickly(transform, images), transform(images))
