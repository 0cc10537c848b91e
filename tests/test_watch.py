# SPDX-License-Identifier: Apache-2.0

"""The command that scores images as they arrive: whole, half-written and broken files, restarts, signals."""

import csv
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine
from PIL import Image

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.console import run_command
from anomalib_stfpm_ext.convert import save_checkpoint
from anomalib_stfpm_ext.data.images import read_image
from anomalib_stfpm_ext.watch import make_parser, run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Save a model whose threshold some of the images are above."""
    torch.manual_seed(0)
    model = StfpmExt("test_resnet", ["layer1", "layer2"], teacher_weights=False)
    for name, value in {"_image_threshold": 0.63, "image_min": 0.1, "image_max": 1.0}.items():
        getattr(model.post_processor, name).fill_(value)
    model.post_processor.pixel_min.fill_(0.0)
    model.post_processor.pixel_max.fill_(1.0)
    path = tmp_path_factory.mktemp("watch") / "model.ckpt"
    save_checkpoint(model, path)
    return path


@pytest.fixture
def folder(images, tmp_path):
    """Copy images of several modes into a folder, one of them into a subfolder."""
    folder = tmp_path / "line"
    shutil.copytree(images / "bad", folder / "bad")
    picture = Image.open(images / "bad" / "0.png").resize((400, 300))
    for mode, name in (("L", "grey.jpg"), ("RGBA", "alpha.png"), ("CMYK", "cmyk.tif"), ("1", "bits.bmp")):
        picture.convert(mode).save(folder / name)
    Image.fromarray(np.arange(90_000, dtype=np.uint16).reshape(300, 300)).save(folder / "deep.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("somebody's unfinished file")
    return folder


def watch(checkpoint: Path, folder: Path, *options: object) -> None:
    given = [checkpoint, folder, "--csv", folder.parent / "scores.csv", "--interval", 0.05, "--patience", 0, *options]
    run_command(make_parser(positional=True), run, [str(option) for option in given])


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder.parent / "scores.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    by_name = {row["file"]: row for row in found}
    assert len(by_name) == len(found)  # none twice
    assert not any(None in row for row in found)  # where two rows run together
    return by_name


def test_scores_and_overlays_are_those_of_anomalib_predict(checkpoint, folder, tmp_path):
    watch(checkpoint, folder, "--overlays", tmp_path / "overlays", "--once")
    engine = Engine(accelerator="cpu", logger=False, default_root_dir=tmp_path / "results")
    (folder / ".hidden.png").unlink()
    model = StfpmExt.load_from_checkpoint(checkpoint)
    batches = engine.predict(model, dataset=PredictDataset(folder), return_predictions=True)
    found = rows(folder)
    assert len(found) == len(batches) == 9
    for batch in batches:
        path = Path(batch.image_path[0])
        row = found[str(path.relative_to(folder))]
        assert np.float32(row["score"]) == batch.pred_score.item()
        assert row["verdict"] == ("defective" if batch.pred_label.item() else "good")
        assert (row["threshold"], row["error"]) == ("0.5", "")
        assert float(row["seconds"]) > 0
        assert time.strptime(row["time"][:19] + row["time"][23:], "%Y-%m-%dT%H:%M:%S%z")
        if path.name == "deep.PNG":  # of whose 16 bits anomalib draws a clipped picture
            continue
        (theirs,) = (tmp_path / "results").rglob(f"images/*/{path.name}")
        ours = tmp_path / "overlays" / path.relative_to(folder)
        assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(theirs)))
    assert {row["verdict"] for row in found.values()} == {"good", "defective"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_that_is_not_utf_8(checkpoint, folder, monkeypatch, encoding):
    """As of a service on a machine without a locale, or of Windows."""
    folder = folder.rename(folder.with_name("größe ✓"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    watch(checkpoint, folder, "--once")
    assert len(rows(folder)) == 9
    text = written.getvalue().decode(encoding)
    assert "gr\\xf6\\xdfe \\u2713" in text if encoding == "ascii" else "größe \\u2713" in text


def test_export_scores_as_anomalibs_inferencer_does(checkpoint, folder, tmp_path, monkeypatch):
    export = StfpmExt.load_from_checkpoint(checkpoint).to_torch(tmp_path)
    with pytest.raises(SystemExit, match=r"ValueError: checkpoint: .*TRUST_REMOTE_CODE"):
        watch(export, folder, "--once")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    watch(export, folder, "--once", "--device", "cpu")
    inferencer = TorchInferencer(export, device="cpu")
    for name, row in rows(folder).items():
        expected = inferencer.predict(read_image(folder / name)).pred_score.item()
        assert float(row["score"]) == pytest.approx(expected, rel=1e-6)


def test_restart_scores_only_what_is_new(checkpoint, folder):
    watch(checkpoint, folder, "--once")
    before = (folder.parent / "scores.csv").read_bytes()
    watch(checkpoint, folder, "--once")
    assert (folder.parent / "scores.csv").read_bytes() == before
    (folder / "bad" / "0.png").rename(folder / "renamed in.png")
    shutil.copyfile(folder / "bad" / "1.png", folder / "grey.jpg")  # another image of the same name
    watch(checkpoint, folder, "--once")
    added = (folder.parent / "scores.csv").read_bytes().removeprefix(before).decode().splitlines()
    assert sorted(line.split(",")[1] for line in added) == ["grey.jpg", "renamed in.png"]


def test_unfinished_row_is_removed_and_written_again(checkpoint, folder, capsys):
    watch(checkpoint, folder, "--once")
    table = folder.parent / "scores.csv"
    whole = rows(folder)
    table.write_bytes(table.read_bytes()[:-9])
    watch(checkpoint, folder, "--once")
    assert "never finished" in capsys.readouterr().err
    assert {name: row["score"] for name, row in rows(folder).items()} == {
        name: row["score"] for name, row in whole.items()
    }


def test_broken_files_are_told_once_and_leave_a_row(checkpoint, folder, capsys):
    whole = (folder / "bad" / "0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.bmp").write_text("not a bitmap")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("nowhere.png")
    for _ in range(2):
        watch(checkpoint, folder, "--once")
    told = capsys.readouterr().err
    for name in ("half.png", "empty.jpg", "text.bmp"):
        row = rows(folder)[name]
        assert row["error"]
        assert (row["score"], row["verdict"], row["seconds"]) == ("", "", "")
        assert told.count(f"{name}: {row['error']}") == 1
    assert len(rows(folder)) == 12
    (folder / "half.png").write_bytes(whole)
    with (folder.parent / "scores.csv").open(newline="") as file:
        before = len(list(file))
    watch(checkpoint, folder, "--once")
    with (folder.parent / "scores.csv").open(newline="") as file:
        added = list(csv.reader(file))[before:]
    assert [(row[1], row[6]) for row in added] == [("half.png", "")]
    assert added[0][2]


def test_deep_images_are_scored_as_those_of_8_bits_or_have_an_error(checkpoint, folder):
    gray = np.asarray(Image.open(folder / "bad" / "0.png").convert("L"))
    Image.fromarray(gray).save(folder / "8.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "16.png")
    Image.fromarray(gray.astype(np.float32) / 255).save(folder / "floats.tif")
    Image.fromarray(gray.astype(np.float32)).save(folder / "255.tif")
    Image.fromarray(gray.astype(np.int32)).save(folder / "32.tif")
    watch(checkpoint, folder, "--once")
    found = rows(folder)
    score = float(found["8.png"]["score"])
    assert float(found["16.png"]["score"]) == pytest.approx(score, abs=1e-3)
    assert float(found["floats.tif"]["score"]) == pytest.approx(score, abs=1e-3)
    assert "wanted floats from 0 to 1" in found["255.tif"]["error"]
    assert "or 32 bits" in found["32.tif"]["error"]
    assert {(found[name]["score"], found[name]["verdict"]) for name in ("255.tif", "32.tif")} == {("", "")}


def test_file_that_is_being_written_is_waited_for(checkpoint, folder, capsys, monkeypatch):
    """It grows from look to look, and rests in between, unreadable, for several of them."""
    whole = (folder / "bad" / "1.png").read_bytes()
    third = len(whole) // 3
    parts = iter([whole[:99], whole[99:third], b"", b"", b"", whole[third : 2 * third], b"", b"", whole[2 * third :]])

    def write(_: float) -> None:
        with (folder / "slow.png").open("ab") as file:
            file.write(next(parts, b""))

    write(0)
    monkeypatch.setattr("anomalib_stfpm_ext.watch.service.time.sleep", write)
    watch(checkpoint, folder, "--once", "--patience", 60)
    assert next(parts, None) is None
    row = rows(folder)["slow.png"]
    assert (row["error"], int(row["bytes"])) == ("", len(whole))
    assert row["score"] == rows(folder)["bad/1.png"]["score"]
    assert capsys.readouterr().err == ""


def test_file_of_full_size_is_waited_for_until_it_is_whole(checkpoint, folder, capsys, monkeypatch):
    """Its size is there at once, and its content comes in parts, with pauses of several looks."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)).save(folder / "a.jpg", quality=95)
    whole = (folder / "a.jpg").read_bytes()
    pauses = iter([0.2, 0, 0, 0.6, 0, 0, 1])

    def write(_: float) -> None:
        if share := next(pauses, 0):
            part = whole[: int(len(whole) * share)]
            (folder / "a.jpg").write_bytes(part + bytes(len(whole) - len(part)))

    write(0)
    monkeypatch.setattr("anomalib_stfpm_ext.watch.service.time.sleep", write)
    watch(checkpoint, folder, "--once", "--patience", 60)
    assert next(pauses, None) is None
    row = rows(folder)["a.jpg"]
    shutil.copyfile(folder / "a.jpg", folder / "copy.jpg")
    watch(checkpoint, folder, "--once")
    assert (row["error"], row["score"]) == ("", rows(folder)["copy.jpg"]["score"])
    assert capsys.readouterr().err == ""


def test_files_that_never_hold_one_whole_picture_have_an_error_in_their_row(checkpoint, folder, capsys):
    picture = Image.open(folder / "bad" / "0.png")
    picture.save(folder / "half.jpg", quality=95)
    content = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(content[: len(content) * 3 // 5] + bytes(len(content) * 2 // 5))
    picture.save(folder / "pages.tif", save_all=True, append_images=[picture, picture])
    watch(checkpoint, folder, "--once", "--patience", 0.2)
    found, told = rows(folder), capsys.readouterr().err
    assert "wanted the whole picture, got a file without its end" in found["half.jpg"]["error"]
    assert "wanted one picture, got 3 (pages or frames)" in found["pages.tif"]["error"]
    for name in ("half.jpg", "pages.tif"):
        assert (found[name]["score"], found[name]["verdict"]) == ("", "")
        assert told.count(f"{name}: image: wanted") == 1


def test_file_that_never_holds_still_is_told_once(checkpoint, folder, capsys, monkeypatch):
    looks = iter(range(6))

    def write(_: float) -> None:
        if (look := next(looks, None)) is not None:
            Image.new("L", (64, 64 + look)).save(folder / "live.bmp")

    write(0)
    monkeypatch.setattr("anomalib_stfpm_ext.watch.service.time.sleep", write)
    watch(checkpoint, folder, "--once")
    assert capsys.readouterr().err == "live.bmp: it keeps changing; it is scored once it holds still\n"
    assert rows(folder)["live.bmp"]["score"]


def test_pictures_that_are_passed_over_are_told_once(checkpoint, folder, capsys, monkeypatch):
    for name in ("a.jfif", "b.JFIF", "bad/c.tga", "d.dng", "scores.h5", "report.pdf"):
        (folder / name).touch()
    looks = iter(["", "e.jp2", "f.jfif", "", ""])

    def arrive(_: float) -> None:
        name = next(looks, None)
        if name is None:
            raise KeyboardInterrupt
        (folder / (name or "notes.txt")).touch()

    monkeypatch.setattr("anomalib_stfpm_ext.watch.service.time.sleep", arrive)
    watch(checkpoint, folder)
    told = capsys.readouterr().err.splitlines()
    formats = "anomalib reads .bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    assert told == [
        f"not scored: 1 file of .dng, 2 files of .jfif, 1 file of .tga ({formats})",
        f"not scored: 1 file of .jp2 ({formats})",
        "stopped",
    ]


def test_folder_without_images(checkpoint, folder, tmp_path, capsys):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "notes.txt").touch()
    watch(checkpoint, tmp_path / "inbox", "--once")  # nothing has arrived, which is no error
    watch(checkpoint, folder, "--once", "--pattern", "cam2_*")
    said = capsys.readouterr()
    assert f"There are no images in {tmp_path / 'inbox'}\n" in said.out
    assert f"There are no images in {folder} whose names match cam2_*\n" in said.out
    assert said.err == ""
    (tmp_path / "inbox" / "0.jfif").touch()
    with pytest.raises(SystemExit, match=r"ValueError: folder: wanted images, got only files of \.jfif"):
        watch(checkpoint, tmp_path / "inbox", "--once")


def test_only_names_that_match_the_pattern_are_scored(checkpoint, folder, capsys):
    (folder / "a.jfif").touch()
    watch(checkpoint, folder, "--once", "--pattern", "[0-2].*")
    assert set(rows(folder)) == {"bad/0.png", "bad/1.png", "bad/2.png"}
    assert capsys.readouterr().err == ""


def test_file_that_changes_while_it_is_read_is_read_again(checkpoint, folder, monkeypatch):
    victim, other = folder / "bad" / "0.png", folder / "bad" / "1.png"

    def read_and_replace(path: Path) -> torch.Tensor:
        image = read_image(path)
        if path == victim and victim.read_bytes() != other.read_bytes():
            shutil.copyfile(other, victim)
        return image

    monkeypatch.setattr("anomalib_stfpm_ext.watch.scoring.read_image", read_and_replace)
    watch(checkpoint, folder, "--once")
    assert rows(folder)["bad/0.png"]["score"] == rows(folder)["bad/1.png"]["score"]


def test_strange_names(checkpoint, folder):
    names = [
        "a,b.png",
        'quo"te.png',
        "new\nline.png",
        r"new\nline.png",
        "größe.png",
        os.fsdecode(b"latin-\xe9.png"),
        "=1+1.png",
    ]
    for name in names:
        shutil.copyfile(folder / "bad" / "0.png", folder / name)
    watch(checkpoint, folder, "--once", "--overlays", folder / "overlays")
    found = rows(folder)
    assert {
        "a,b.png",
        'quo"te.png',
        r"new\nline.png",
        r"new\\nline.png",
        "größe.png",
        r"latin-\udce9.png",
        "=1+1.png",
    } < set(found)
    assert all((folder / "overlays" / name).is_file() for name in names)
    assert len((folder.parent / "scores.csv").read_bytes().splitlines()) == len(found) + 1
    watch(checkpoint, folder, "--once", "--overlays", folder / "overlays")  # which are no images to be scored
    assert rows(folder) == found


def test_model_without_threshold_gives_no_verdict(folder, tmp_path):
    torch.manual_seed(0)
    model = StfpmExt("test_resnet", ["layer1", "layer2"], teacher_weights=False)
    save_checkpoint(model, tmp_path / "raw.ckpt")
    watch(tmp_path / "raw.ckpt", folder, "--once")
    assert {(row["verdict"], row["threshold"]) for row in rows(folder).values()} == {("", "")}


def test_model_that_gives_nan_is_an_error(checkpoint, folder, tmp_path, capsys):
    model = StfpmExt.load_from_checkpoint(checkpoint)
    with torch.no_grad():
        next(model.model.student_model.parameters()).fill_(float("nan"))
    save_checkpoint(model, tmp_path / "nan.ckpt")
    with pytest.raises(SystemExit, match=r"FloatingPointError: checkpoint: wanted one .* finite scores, got nan"):
        watch(tmp_path / "nan.ckpt", folder, "--once")
    assert "cannot be scored" in capsys.readouterr().err
    assert rows(folder) == {}


def test_bad_arguments(checkpoint, folder, tmp_path):
    (tmp_path / "diary.csv").write_text("dear diary")
    (tmp_path / "model.ckpt").write_text("no checkpoint")
    for wrong, message in (
        ([checkpoint, tmp_path / "nowhere"], "FileNotFoundError: folder: wanted a folder of images"),
        ([tmp_path / "nothing.ckpt", folder], "FileNotFoundError: checkpoint: wanted a checkpoint"),
        ([tmp_path / "model.ckpt", folder], "ValueError: checkpoint: .* cannot be read as a checkpoint"),
        ([tmp_path / "diary.csv", folder], "ValueError: checkpoint: wanted a checkpoint"),
        ([checkpoint, folder, "--csv", tmp_path / "diary.csv"], "ValueError: csv: wanted a new file"),
        ([checkpoint, folder, "--overlays", folder], "ValueError: overlays: wanted a folder that does not hold"),
        ([checkpoint, folder, "--overlays", folder.parent], "ValueError: overlays: wanted a folder that does not hold"),
        ([checkpoint, folder, "--interval", "0"], "ValueError: interval: wanted more than 0"),
        ([checkpoint, folder, "--patience", "-1"], "ValueError: patience: wanted at least 0"),
    ):
        table = [] if "--csv" in wrong else ["--csv", str(tmp_path / "new.csv")]
        with pytest.raises(SystemExit, match=message):
            run_command(make_parser(positional=True), run, [*map(str, wrong), "--once", *table])
    assert (tmp_path / "diary.csv").read_text() == "dear diary"


def test_line(checkpoint, folder, tmp_path):
    """A process of its own: images arrive, the folder goes and comes back, a second process is refused, it ends.

    Its machine has no locale, and the folder a name that needs one.
    """
    folder = folder.rename(folder.with_name("größe ✓"))
    without = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "anomalib_stfpm_ext.watch", checkpoint, folder, "--csv", tmp_path / "scores.csv"]
    command += ["--interval", "0.1"]
    process = subprocess.Popen(command, env=os.environ | without, stderr=subprocess.PIPE, text=True)

    def wait_for(*names: str) -> None:
        for _ in range(1800):
            if (tmp_path / "scores.csv").is_file() and set(names) <= set(rows(folder)):
                return
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        pytest.fail(f"no row of {names}")

    try:
        bad = [f"bad/{index}.png" for index in range(4)]
        wait_for(*bad, "grey.jpg", "alpha.png", "cmyk.tif", "bits.bmp", "deep.PNG")
        with pytest.raises(SystemExit, match=r"BlockingIOError.*another process writes to it"):
            watch(checkpoint, folder, "--once")
        shutil.copyfile(folder / "bad" / "0.png", folder / ".arriving")
        (folder / ".arriving").rename(folder / "arrived.png")
        wait_for("arrived.png")
        folder.rename(tmp_path / "away")
        time.sleep(1)
        (tmp_path / "away").rename(folder)
        shutil.copyfile(folder / "bad" / "0.png", folder / "later.png")
        wait_for("later.png")
        (tmp_path / "scores.csv").rename(tmp_path / "monday.csv")
        shutil.copyfile(folder / "bad" / "0.png", folder / "tuesday.png")
        wait_for("tuesday.png")
        assert set(rows(folder)) == {"tuesday.png"}
        os.truncate(tmp_path / "scores.csv", 0)
        shutil.copyfile(folder / "bad" / "0.png", folder / "wednesday.png")
        wait_for("wednesday.png")
        assert set(rows(folder)) == {"wednesday.png"}
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0
    assert told.count("waiting for it to come back") == told.count("is back") == 1
    assert told.count("moved, removed or emptied; a new one is begun") == 2
    assert told.endswith("stopped\n")


def test_interrupted_before_all_is_scored(checkpoint, folder, monkeypatch, capsys):
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)  # before the second look
    with pytest.raises(SystemExit) as stopped:
        watch(checkpoint, folder, "--once")
    assert stopped.value.code == 130
    watch(checkpoint, folder)  # which ends in no other way
    assert capsys.readouterr().err.count("stopped\n") == 2


def test_images_without_an_overlay_and_with_long_names_are_scored(checkpoint, folder, tmp_path, capsys):
    long = f"{'x' * 251}.png"
    shutil.copyfile(folder / "bad" / "0.png", folder / "bad" / long)
    Image.new("RGB", (1, 1)).save(folder / "bad" / "tiny.png")
    watch(checkpoint, folder / "bad", "--once", "--overlays", tmp_path / "overlays")
    assert "tiny.png: no overlay, " in capsys.readouterr().err
    assert rows(folder / "bad")["tiny.png"]["score"]
    assert rows(folder / "bad")[long]["score"]
    assert (tmp_path / "overlays" / long).exists()


def test_full_disk_is_an_error_that_names_the_file(checkpoint, folder, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    watch(checkpoint, folder / "bad", "--once")
    shutil.copyfile(folder / "bad" / "0.png", folder / "bad" / "new.png")
    size = (folder / "scores.csv").stat().st_size
    for stream in ("stdout", "stderr"):  # may be files, and larger than that
        monkeypatch.setattr(sys, stream, io.StringIO())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(SystemExit, match=r"OSError: .*scores\.csv'"):
            watch(checkpoint, folder / "bad", "--once")
        with pytest.raises(SystemExit, match=r"OSError: .*overlays/new\.png'"):
            watch(checkpoint, folder / "bad", "--once", "--overlays", tmp_path / "overlays")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    watch(checkpoint, folder / "bad", "--once")
    assert rows(folder / "bad")["new.png"]["score"] == rows(folder / "bad")["0.png"]["score"]
