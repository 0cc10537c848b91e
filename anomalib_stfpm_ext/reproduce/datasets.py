# SPDX-License-Identifier: Apache-2.0

"""MVTec AD, VisA and folders like theirs: the categories, looked at before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from anomalib.data import Visa
from anomalib.data.datamodules.image.visa import VISA_CATEGORIES
from anomalib.data.datasets.image import mvtecad, visa
from anomalib.data.utils.image import is_image_file

from ..data.images import is_junk
from ..errors import fail


@dataclass(frozen=True)
class Category:
    """The folder of a category, in MVTec AD's layout.

    Args:
        folder (Path): The folder.
        defects (list[str]): Its kinds of defects.
        masks (bool): Whether it has masks.
    """

    folder: Path
    defects: list[str]
    masks: bool

    @classmethod
    def check(cls, data: str, folder: Path) -> "Category":
        """Look at the folder before anything is trained.

        Args:
            data (str): The data set.
            folder (Path): The folder.

        Returns:
            Category: What the folder has.

        Raises:
            ValueError: If it lacks images, or has masks for some defective images only. Hidden files do not count.
        """
        extensions: Sequence[str] = {"MVTecAD": mvtecad.IMG_EXTENSIONS, "Visa": visa.EXTENSIONS}.get(data, ())

        def count(*parts: str) -> int:
            found = folder.joinpath(*parts).rglob("*")
            images = (path for path in found if (path.suffix in extensions if extensions else is_image_file(path)))
            return sum(not is_junk(path, folder) for path in images)

        names = (path.name for path in folder.glob("test/*") if path.is_dir())
        defects = sorted(name for name in names if name != "good" and not name.startswith("."))
        num_defective = sum(count("test", defect) for defect in defects)
        for role, num_images in (
            ("train/good", count("train", "good")),
            ("test/good", count("test", "good")),
            ("a folder of test/ other than good", num_defective),
        ):
            if not num_images:
                kinds = f" ({', '.join(extensions)})" if extensions else ""
                fail(ValueError, "root", f"images{kinds} in {role} of {folder}", "none")
        num_masks = sum(count("ground_truth", defect) for defect in defects)  # some have empty ones for good images
        if num_masks not in {0, num_defective}:
            wanted = f"a mask for each of the {num_defective} defective test images of {folder}, or none at all"
            fail(ValueError, "root", wanted, f"{num_masks} masks")
        return cls(folder, defects, num_masks > 0)


def leave_out_junk(folder: Path, view: Path) -> bool:
    """Make a view of a category without hidden files and without folders named like images: anomalib reads all.

    Args:
        folder (Path): The folder.
        view (Path): Where links to its files go; nothing is made unless there is something to leave out.

    Returns:
        bool: Whether the view was made.
    """
    junk = [path for path in folder.rglob("*") if is_junk(path, folder) and (is_image_file(path) or not path.is_dir())]
    if not junk:
        return False
    for path in folder.rglob("*"):
        if not is_junk(path, folder) and not any(parent in junk for parent in path.parents):
            link = view / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return True


def find_categories(data: str, root: Path, wanted: Sequence[str]) -> dict[str, Category]:
    """Find the categories; anomalib first converts VisA as it is published, and copies it.

    Args:
        data (str): The data set.
        root (Path): Its folder.
        wanted (Sequence[str]): Names of categories; none for all that are there.

    Returns:
        dict[str, Category]: The categories by name.

    Raises:
        FileNotFoundError: If there is no such folder, or no category in it.
        ValueError: If a category is missing or incomplete.
    """
    if not root.is_dir():
        fail(FileNotFoundError, "root", f"the folder of {data}", root)
    base = root
    if data == "Visa":
        base, split = root / "visa_pytorch", root / "split_csv" / "1cls.csv"
        raw = [category for category in VISA_CATEGORIES if (root / category).is_dir()]
        if not base.exists() and raw and split.is_file():
            Visa(root, raw[0]).prepare_data()
    if data == "Folder" and (root / "train" / "good").is_dir():  # a single category
        base = root.resolve().parent
        wanted = wanted or [root.resolve().name]
    # anomalib makes folders for VisA's absent categories too, but leaves them empty.
    folders = [path.parent.parent for path in base.glob("*/train/good") if any(path.iterdir())]
    found = sorted(folder.name for folder in folders if not folder.name.startswith("."))
    if not found:
        layout = "visa_pytorch/CATEGORY/train/good or split_csv/1cls.csv" if data == "Visa" else "CATEGORY/train/good"
        fail(FileNotFoundError, "root", f"the folder of {data}, with {layout}", root)
    missing = [category for category in wanted if category not in found]
    if missing:
        fail(ValueError, "categories", f"some of {', '.join(found)}, which are in {root}", ", ".join(missing))
    categories = {category: Category.check(data, base / category) for category in wanted or found}
    if data == "Visa" and split.is_file():  # anomalib does not notice that a conversion was interrupted
        expected = pd.read_csv(split)["object"].value_counts()
        for category, num_expected in expected.reindex(list(categories)).dropna().items():
            files = (base / str(category)).glob("t*/*/*")  # train and test
            num_found = sum(not is_junk(path, base) for path in files)
            if num_found != num_expected:
                wanted_images = f"the {num_expected:.0f} images of {split} in {base / str(category)}"
                fail(ValueError, "root", wanted_images, f"{num_found}; remove {base} to have it made anew")
    return categories
