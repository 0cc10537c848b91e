# SPDX-License-Identifier: Apache-2.0

"""The command ``stfpm-ext``: its subcommands, their options and errors."""

import csv
import io
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_stfpm_ext import StfpmExt, load_model
from anomalib_stfpm_ext.cli import main
from anomalib_stfpm_ext.convert import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cli") / "model.ckpt"
    save_checkpoint(StfpmExt(teacher_weights=False), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(folder / "one.png")
    return folder


def test_it_is_installed():
    (script,) = entry_points(group="console_scripts", name="stfpm-ext")
    assert script.load() is main


def test_pictures_in_a_folder_that_the_terminal_cannot_name(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    output = tmp_path / "Fehlergröße ≥ 1"
    main(["draw", "levels", "--checkpoint", str(checkpoint), "--images", str(folder), "--output", str(output)])
    assert list(output.iterdir())


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("info", "watch", "draw", "convert", "reproduce"))


def test_info(capsys):
    main(["info"])
    assert "scores correctly     yes" in capsys.readouterr().out


def test_watch(checkpoint, folder, tmp_path):
    table = tmp_path / "scores.csv"
    main(["watch", "--checkpoint", str(checkpoint), "--folder", str(folder), "--csv", str(table), "--once"])
    (row,) = csv.DictReader(table.open())
    assert row["file"] == "one.png"
    assert float(row["score"]) >= 0


def test_draw(checkpoint, folder, tmp_path):
    main(["draw", "levels", "--checkpoint", str(checkpoint), "--images", str(folder), "--output", str(tmp_path)])
    assert Image.open(tmp_path / "one.png").width > 64
    picture = tmp_path / "histogram.png"
    options = ["--checkpoint", checkpoint, "--good", folder, "--defective", folder, "--output", picture]
    main(["draw", "histogram", *map(str, options)])
    assert picture.is_file()


def test_convert_there_and_back(checkpoint, tmp_path):
    student, back = tmp_path / "best.pth.tar", tmp_path / "back.ckpt"
    main(["convert", "to-authors", "--checkpoint", str(checkpoint), "--output", str(student)])
    teacher = tmp_path / "teacher.pth"
    torch.save(load_model(checkpoint).model.teacher_model.feature_extractor.state_dict(), teacher)
    options = ["--student", student, "--output", back, "--teacher_weights", teacher]
    main(["convert", "from-authors", *map(str, options)])
    before, after = load_model(checkpoint).state_dict(), load_model(back).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "layer" in name)
    again = tmp_path / "again.ckpt"
    options = ["--checkpoint", checkpoint, "--output", again, "--backbone", "resnet18.tv_in1k"]
    main(["convert", "from-anomalib", *map(str, options), "--layers", "[layer1,layer2,layer3]"])
    assert again.is_file()


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["watch", "--checkpoint", "no.ckpt", "--folder", "."], "FileNotFoundError: checkpoint: wanted a checkpoint"),
        (
            ["convert", "to-authors", "--checkpoint", "no.ckpt", "--output", "o"],
            "FileNotFoundError: checkpoint: wanted",
        ),
        (["draw", "levels", "--checkpoint", "no.ckpt", "--images", ".", "--output", "o"], "FileNotFoundError"),
        (["reproduce", "--data", "MVTecAD", "--root", "nowhere"], "FileNotFoundError: root: wanted the folder"),
    ],
)
def test_errors_are_one_line(command, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=error):
        main(command)


def test_completion_knows_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print_shtab", "bash"])
    script = capsys.readouterr().out
    assert all(name in script for name in ("info", "watch", "from-anomalib", "histogram", "--teacher_weights"))


def test_lists_are_lists(tmp_path):
    """The categories are looked for before the seeds are used, so both have been read."""
    (tmp_path / "bottle" / "train" / "good").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bottle" / "train" / "good" / "0.png")
    options = ["--data", "MVTecAD", "--root", str(tmp_path), "--seeds", "[0,1]", "--categories", "[bottle,pill]"]
    with pytest.raises(SystemExit, match=r"ValueError: categories: wanted some of bottle, .* got pill"):
        main(["reproduce", *options])
