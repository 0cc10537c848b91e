# SPDX-License-Identifier: Apache-2.0

"""Data sets within data sets, of both of torch's kinds: whatever looks into one finds what a loader would get of it."""

import copy
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataset, PredictDataset
from helpers import QUIET, folder
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.transforms.v2 import RandomHorizontalFlip, Resize

from anomalib_stfpm_ext._compat.lightning import get_loader, replace_loader
from anomalib_stfpm_ext.callbacks.checks import check_collation, check_files
from anomalib_stfpm_ext.callbacks.teacher_cache import _count_images
from anomalib_stfpm_ext.data.images import image_paths, read_right, refuse_deep
from anomalib_stfpm_ext.data.loaders import right_loaders
from anomalib_stfpm_ext.data.nested import leaves, replace_leaves
from anomalib_stfpm_ext.selection.hold_out import good_images, hold_out
from anomalib_stfpm_ext.selection.thresholds import validation_labels

# Of eight good images, and of four defective and four good ones.
NESTS = {
    "subset": lambda _, test: Subset(test, [7, 0, 5, -7, 2]),
    "concatenation": lambda train, test: ConcatDataset([test, train]),
    "subset of a concatenation": lambda train, test: Subset(ConcatDataset([train, test]), [-1, 8, 0, 12, 3, 9, -8]),
    "concatenation of subsets": lambda train, test: ConcatDataset([Subset(test, [6, 1]), train, Subset(test, [2])]),
    "four deep": lambda train, test: Subset(
        ConcatDataset([Subset(ConcatDataset([test, train]), range(1, 14)), Subset(Subset(train, [5, 6, 7]), [2, 0])]),
        [14, 0, 3, 8, 13, 2, 1],
    ),
}


@pytest.fixture
def data(images):
    data = folder(images, val_split_mode="same_as_test")
    data.setup()
    return data


@pytest.fixture(params=NESTS)
def nest(request, data) -> Dataset:
    return NESTS[request.param](data.train_data, data.test_data)


def items(dataset) -> list:
    return [dataset[index] for index in range(len(dataset))]


def make_loader(dataset, **settings) -> DataLoader:
    return DataLoader(dataset, **({"batch_size": 2, "collate_fn": list} | settings))


def replaced(dataset, part: AnomalibDataset, **attributes):
    """Make the same nest with a copy of one of its parts that has other attributes."""
    other = copy.copy(part)
    vars(other).update(attributes)
    return replace_leaves(dataset, lambda leaf: other if leaf is part else leaf)


def test_leaves_have_the_items_of_the_whole(nest):
    positions = []
    for leaf in leaves(nest):
        assert isinstance(leaf.dataset, AnomalibDataset)
        positions += leaf.positions.tolist()
        for index, position in zip(leaf.indices.tolist(), leaf.positions.tolist(), strict=True):
            assert leaf.dataset[index].image_path == nest[position].image_path
    assert sorted(positions) == list(range(len(nest)))


def test_what_is_no_nest_is_a_leaf():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

        def __len__(self):
            raise TypeError

    for dataset, length in ((TensorDataset(torch.zeros(3)), 3), ([], 0), (Stream(), 0), (None, 0)):
        (leaf,) = leaves(dataset)
        assert leaf.dataset is dataset
        assert leaf.indices.tolist() == leaf.positions.tolist() == list(range(length))
    (leaf,) = leaves(Subset(torch.zeros(3), []))
    assert leaf.indices.tolist() == []


def test_other_leaves_make_the_same_nest(nest):
    before = [item.image_path for item in items(nest)]
    assert replace_leaves(nest, lambda leaf: leaf) is nest
    other = replace_leaves(nest, lambda leaf: Subset(leaf, range(len(leaf) - 1, -1, -1)))  # turned around
    assert type(other) is type(nest)
    assert len(other) == len(nest)
    for leaf in leaves(nest):
        for index, position in zip(leaf.indices, leaf.positions, strict=True):
            mirrored = leaf.dataset[int(-1 - index) % len(leaf.dataset)]
            assert other[position].image_path == mirrored.image_path
    assert [item.image_path for item in items(nest)] == before


def test_files_of_a_nest(nest):
    assert sorted(map(str, image_paths(nest))) == sorted(item.image_path for item in items(nest))


def test_files_of_pictures_without_labels(images):
    bad, good = PredictDataset(images / "bad"), PredictDataset(images / "good")
    nest = Subset(ConcatDataset([bad, TensorDataset(torch.zeros(2)), good]), [3, 6, 5])
    assert [str(path) for path in image_paths(nest)] == [str(images / name) for name in ("bad/3.png", "good/0.png")]


def test_broken_files_are_found_where_they_are_used(images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "bad" / "2.png").write_bytes(b"")
    dataset = PredictDataset(tmp_path / "data" / "bad")
    unused, used = (ConcatDataset([Subset(dataset, [0, number])]) for number in (1, 2))
    check_files(unused)
    with pytest.raises(ValueError, match=r"data: wanted images that can be read, got .*2\.png"):
        check_files(used)


def test_good_images_of_a_nest(nest):
    good = [position for position, item in enumerate(items(nest)) if not item.gt_label]
    assert good_images(nest).tolist() == good
    assert len(good) < len(nest)


def test_images_without_labels_are_good(data):
    nest = ConcatDataset([Subset(data.test_data, [0, 7]), TensorDataset(torch.zeros(2))])
    assert good_images(nest).tolist() == [1, 2, 3]
    assert good_images(TensorDataset(torch.zeros(2))).tolist() == [0, 1]


def test_images_of_a_nest_are_read_right(nest):
    before = [leaf.dataset for leaf in leaves(nest)]
    for other in (read_right(nest), right_loaders(make_loader(nest)).dataset):
        assert type(other) is type(nest)
        assert {type(leaf.dataset).__name__ for leaf in leaves(other)} == {"_LabelledImages"}
        assert [item.image_path for item in items(other)] == [item.image_path for item in items(nest)]
    assert all(leaf.dataset is dataset for leaf, dataset in zip(leaves(nest), before, strict=True))


@pytest.mark.parametrize("name", NESTS)
def test_loaders_of_other_data_sets_stay(name):
    nest = NESTS[name](*(TensorDataset(torch.zeros(8)) for _ in range(2)))
    loader = make_loader(nest)
    assert read_right(nest) is nest
    assert right_loaders(loader) is loader


def test_deep_images_of_a_nest_are_refused(nest, tmp_path):
    refuse_deep(nest, "here")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"data: wanted images of 8 bits here, got .*deep\.png"):
        refuse_deep(ConcatDataset([nest, Subset(PredictDataset(tmp_path), [0])]), "here")


def test_collation_of_a_nest_is_told(nest, data):
    def stretches(dataset, **settings) -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_collation([make_loader(dataset, **settings)])
        return any("images of a batch that differ in size are stretched" in str(warning.message) for warning in caught)

    resized = nest
    for part in (data.train_data, data.test_data):
        assert stretches(resized)
        resized = replaced(resized, part, augmentations=Resize((8, 8)))
    assert not stretches(resized)
    assert not stretches(nest, batch_size=1)


def test_random_augmentations_in_a_nest_are_not_cached(nest, data):
    assert _count_images(make_loader(nest)) == len(nest)
    random = replaced(nest, data.test_data, augmentations=RandomHorizontalFlip())
    with pytest.raises(ValueError, match=r"teacher_cache: .*no random train_augmentations, got .*HorizontalFlip"):
        _count_images(make_loader(random))


def test_labels_of_a_nested_validation(nest):
    data = SimpleNamespace(val_data=nest, eval_batch_size=2)
    trainer = SimpleNamespace(datamodule=data, enable_validation=True, limit_val_batches=1.0)
    labels = validation_labels(trainer)
    assert sorted(labels) == sorted(int(item.gt_label) for item in items(nest))
    trainer.limit_val_batches = 1
    assert validation_labels(trainer) == labels[:2]
    trainer.datamodule.val_data = ConcatDataset([nest, TensorDataset(torch.zeros(2))])
    assert validation_labels(trainer) is None
    trainer = SimpleNamespace(datamodule=SimpleNamespace(val_data=nest), enable_validation=False)
    assert validation_labels(trainer) is None


def test_images_of_a_nest_are_held_out(nest, data, tmp_path):
    """They are good ones, transformed as test images are, and no longer among those of the training."""
    flip, resize = RandomHorizontalFlip(), Resize((8, 8))
    datasets = [replaced(nest, part, augmentations=flip) for part in (data.train_data,)]
    for given in (make_loader(datasets[0]), data):
        trainer = Trainer(default_root_dir=tmp_path, **QUIET)
        if given is data:
            data.train_data, data.trainer, trainer.datamodule = datasets[0], trainer, data
            data.external_collate_fn = list
            data.test_data = copy.copy(data.test_data)
            data.test_data.augmentations = resize
        replace_loader(trainer.fit_loop, given)
        number, loader = hold_out(trainer, 0.5, 0)
        training = get_loader(trainer.fit_loop).dataset
        held_out = items(loader.dataset)
        good = int(sum(not item.gt_label for item in items(nest)))
        assert number == len(held_out) == -(-good // 2)
        assert not any(item.gt_label for item in held_out)
        together = [item.image_path for item in (*held_out, *items(training))]
        assert sorted(together) == sorted(item.image_path for item in items(nest))
        if given is data:
            assert all(leaf.dataset.augmentations is resize for leaf in leaves(loader.dataset))
            assert all(item.image.shape[1:] == (8, 8) for item in held_out)
        kept = {leaf.dataset.augmentations for leaf in leaves(training)}
        assert kept <= {flip, None}
        assert Path(held_out[0].image_path).exists()
