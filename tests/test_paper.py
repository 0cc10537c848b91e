# SPDX-License-Identifier: Apache-2.0

"""StfpmExt, trained by anomalib, against the paper's algorithm in plain torch: same losses, choice, maps and ranking.

Restated from the paper's formulas and the description of its authors' code, on torchvision's networks, in float64: at a
learning rate of 0.4, float32 roundings would grow into visible differences within 20 steps.
"""

import numpy as np
import pytest
import torch
import torchvision
from anomalib.engine import Engine
from helpers import folder
from lightning.pytorch import Callback
from sklearn.model_selection import train_test_split
from torch import nn

from anomalib_stfpm_ext import StfpmExt

EPOCHS, STEPS_PER_EPOCH, SIZE = 5, 2, (48, 64)


class ResNetLevels(nn.Module):
    """torchvision's ResNet18 up to the third of its four stages."""

    def __init__(self, weights):
        super().__init__()
        network = torchvision.models.resnet18()
        network.load_state_dict(weights, strict=False)
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        self.stages = nn.ModuleList([network.layer1, network.layer2, network.layer3])

    def forward(self, images):
        features, level = [], self.stem(images)
        for stage in self.stages:
            level = stage(level)
            features.append(level)
        return features


def normalized(features):
    return features / features.norm(dim=1, keepdim=True)


def authors_loss(teacher, student):
    """Mean over batch and positions of the squared distance, sum over levels; without the paper's 1/2."""
    return sum(((normalized(t) - normalized(s)) ** 2).sum(1).mean() for t, s in zip(teacher, student, strict=True))


def upsampled(maps, size):
    return nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def paper_map(teacher, student, combine_at):
    """Equation 1 at each level, upsampled and multiplied; the authors' code multiplies at the finest level's size."""
    product = 1.0
    for t, s in zip(teacher, student, strict=True):
        distance = 0.5 * ((normalized(t) - normalized(s)) ** 2).sum(1, keepdim=True)
        product = product * upsampled(distance, SIZE if combine_at == "image" else teacher[0].shape[2:])
    return upsampled(product, SIZE)


class Record(Callback):
    """Keeps what the training saw: initial student, images of each step, losses."""

    def on_train_start(self, trainer, pl_module):
        self.student = {k: v.clone() for k, v in pl_module.model.student_model.feature_extractor.state_dict().items()}
        self.steps, self.losses, self.paths = [], [], set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(batch.image.as_subclass(torch.Tensor).double())
        self.losses.append(outputs["loss"].item())
        self.paths.update(batch.image_path)


@pytest.mark.parametrize("combine_at", ["image", "finest"])
def test_training_is_the_papers(images, resnet18_weights, tmp_path, combine_at):
    data = folder(images, train_batch_size=3)
    pre_processor = StfpmExt.configure_pre_processor(SIZE)
    options = {"combine_at": combine_at, "pre_processor": pre_processor, "precise_bn": False}
    model = StfpmExt("resnet18", teacher_weights=resnet18_weights, seed=0, **options).double()
    for network in (model.model.teacher_model, model.model.student_model):  # to which anomalib sends float32
        network.register_forward_pre_hook(lambda _network, arguments: (arguments[0].double(), *arguments[1:]))
    record = Record()
    engine = Engine(max_epochs=EPOCHS, accelerator="cpu", default_root_dir=tmp_path, callbacks=[record])
    engine.fit(model, datamodule=data)
    assert len(record.losses) == EPOCHS * STEPS_PER_EPOCH

    # The held-out images are the authors' split of the training images, and no step saw one of them.
    training_paths = data.train_data.samples.image_path.tolist()
    _, held_out = train_test_split(np.arange(len(training_paths)), test_size=0.2, random_state=0)
    assert record.paths == {path for index, path in enumerate(training_paths) if index not in held_out}

    def prepared(dataset, indices):
        return torch.stack([pre_processor.transform(dataset[index].image) for index in indices]).double()

    teacher = ResNetLevels(torch.load(resnet18_weights, weights_only=True)).double().eval()
    student = ResNetLevels(record.student).double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.4, momentum=0.9, weight_decay=1e-4)
    losses, means, students = [], [], []
    for epoch in range(EPOCHS):
        student.train()
        for batch in record.steps[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]:
            with torch.no_grad():
                target = teacher(batch)
            loss = authors_loss(target, student(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        student.eval()
        with torch.no_grad():
            good = prepared(data.train_data, held_out)
            means.append(paper_map(teacher(good), student(good), combine_at).mean().item())
        students.append({name: tensor.clone() for name, tensor in student.state_dict().items()})

    np.testing.assert_allclose(record.losses, losses, rtol=1e-7)
    history = model.student_selection.history
    np.testing.assert_allclose([measurement.value for measurement in history], means, rtol=1e-7)
    assert len(set(means)) == EPOCHS  # there is something to choose
    best = int(np.argmin(means))
    assert history[best] == model.student_selection.best

    student.load_state_dict(students[best])
    test_images = prepared(data.test_data, range(len(data.test_data)))
    with torch.no_grad():
        expected = paper_map(teacher(test_images), student(test_images), combine_at)
        result = model.model.eval()(test_images)
    torch.testing.assert_close(result.anomaly_map, expected, rtol=1e-6, atol=0)
    scores = expected.amax(dim=(1, 2, 3))
    assert result.pred_score.flatten().argsort().tolist() == scores.argsort().tolist()
