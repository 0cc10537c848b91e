# SPDX-License-Identifier: Apache-2.0

"""Runs anomalib Studio's server with StfpmExt, as its web page would, and prints the result of each step.

Studio is no package: its server is application/backend of anomalib's repository. docs/install.md has the command, the
environment that it needs, and what Studio is known to refuse: gray images and ``:export``.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from anomalib_stfpm_ext.data.images import find_images
from anomalib_stfpm_ext.feature_pyramid import WEIGHTS_VARIABLE

MODEL = "stfpm_ext"
ENDS = {"completed", "failed", "canceled"}


class Studio:
    """Client of Studio's REST interface.

    Args:
        address (str): Where the server listens, such as ``http://localhost:8000``.
    """

    def __init__(self, address: str) -> None:
        self.address = f"{address}/api"
        self.project = ""

    def ask(self, method: str, path: str, expect_error: bool = False, **arguments: Any) -> Any:
        """Send a request; return the answer, read as JSON where it is.

        Args:
            method (str): HTTP's.
            path (str): Behind ``/api``; ``{project}`` stands for the project's ID.
            expect_error (bool): Return the response, whatever its status.
            **arguments (Any): For :func:`requests.request`.

        Raises:
            SystemExit: If the server refuses.
        """
        response = requests.request(
            method, self.address + path.replace("{project}", self.project), timeout=600, **arguments
        )
        if expect_error:
            return response
        if not response.ok:
            sys.exit(f"{method} {path}: {response.status_code} {response.text[:500]}")
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json and response.content else response.content

    def train(self, epochs: int, cancel: bool = False) -> dict[str, Any]:
        """Train StfpmExt; return the job once it has ended.

        Args:
            epochs (int): At most; Studio ends early where the validation no longer improves.
            cancel (bool): Cancel it once it runs. Defaults to ``False``.
        """
        payload = {"project_id": self.project, "model_name": MODEL, "device": {"type": "cpu"}, "max_epochs": epochs}
        job_id = self.ask("POST", "/jobs:train", json=payload)["job_id"]
        while True:
            time.sleep(1)
            (job,) = (job for job in self.ask("GET", "/jobs")["jobs"] if job["id"] == job_id)
            if job["status"] in ENDS:
                return dict(job)
            if cancel and job["status"] == "running":
                self.ask("POST", f"/jobs/{job_id}:cancel")
                cancel = False


@contextmanager
def serve(backend: Path, folder: Path, port: int, teacher_weights: Path | None) -> Iterator[Studio]:
    """Start the server with a database of its own, and stop it at the end.

    Args:
        backend (Path): Studio's ``application/backend``.
        folder (Path): For the server's data and its log.
        port (int): Where it listens.
        teacher_weights (Path | None): File of the teacher's weights.

    Yields:
        Studio: A client.

    Raises:
        SystemExit: If it has ended, or does not answer within two minutes.
    """
    environment = {**os.environ, "PYTHONPATH": ".", "DATA_DIR": str(folder / "data"), "LOG_DIR": str(folder / "logs")}
    environment["HTTP_SERVER_PORT"] = str(port)
    if teacher_weights:
        environment[WEIGHTS_VARIABLE] = str(teacher_weights.resolve())
    log = folder / "server.log"
    with log.open("w") as output:
        command = [sys.executable, "main.py"]
        server = subprocess.Popen(command, cwd=backend / "src", env=environment, stdout=output, stderr=output)
        try:
            studio = Studio(f"http://localhost:{port}")
            deadline = time.monotonic() + 120
            while True:
                time.sleep(1)
                try:
                    studio.ask("GET", "/projects")
                    break
                except requests.ConnectionError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        sys.exit(f"The server did not start:\n{log.read_text()[-2000:]}")
            yield studio
        finally:
            server.terminate()
            server.wait(60)


def as_upload(file: Path, mode: str = "RGB") -> dict[str, Any]:
    """Read an image as a form's file, in colour: Studio's ``:predict`` answers gray ones with an error."""
    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.convert(mode).save(buffer, "png")
    return {"file": (f"{file.stem}.png", buffer.getvalue(), "image/png")}


def main() -> None:
    """Go through the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=Path, required=True, help="application/backend of anomalib's repository")
    parser.add_argument("--good", type=Path, required=True, help="folder of good images to train with")
    parser.add_argument("--good-test", type=Path, required=True, help="folder of good images to test with")
    parser.add_argument("--defective", type=Path, required=True, help="folder of defective images to test with")
    parser.add_argument("--teacher-weights", type=Path, help="file of ResNet18's weights")
    parser.add_argument("--images", type=int, default=60, help="good ones to upload; Studio trains with two fifths")
    parser.add_argument("--test-images", type=int, default=30, help="of either kind")
    parser.add_argument("--epochs", type=int, default=17)
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with serve(arguments.backend, folder, arguments.port, arguments.teacher_weights) as studio:
            go_through(studio, arguments, folder)


def go_through(studio: Studio, arguments: argparse.Namespace, folder: Path) -> None:
    """Go through project, upload, trainings, predictions, export and pipeline."""
    studio.project = studio.ask("POST", "/projects", json={"name": "parts"})["id"]
    files = find_images(arguments.good)[: arguments.images]
    for file in files:
        studio.ask("POST", "/projects/{project}/images", files=as_upload(file))
    print(f"upload: {len(files)} images")

    job = studio.train(1000, cancel=True)
    print(f"cancelled training: {job['status']}: {job['message']}")
    for _ in range(2):  # the second one shows whether the first one is in its way
        start = time.perf_counter()
        job = studio.train(arguments.epochs)
        print(f"training: {job['status']}: {job['message']} ({time.perf_counter() - start:.0f} s)")
    models = studio.ask("GET", "/projects/{project}/models")["models"]
    for model in models:
        print("model:", json.dumps({name: model.get(name) for name in ("name", "backbone", "threshold", "size")}))
    (model,) = (model for model in models if model["train_job_id"] == job["id"])
    path = f"/projects/{{project}}/models/{model['id']}"

    scores, labels, found = [], [], 0
    for is_defective, role in enumerate((arguments.good_test, arguments.defective)):
        for file in find_images(role)[: arguments.test_images]:
            answer = studio.ask("POST", f"{path}:predict", files=as_upload(file))
            scores.append(answer["score"])
            labels.append(is_defective)
            found += (answer["label"] == "Anomalous") == bool(is_defective)
    auroc = binary_auroc(torch.tensor(scores), torch.tensor(labels)).item()
    verdicts = f"{found} of {len(labels)} verdicts right, {len(set(scores))} different scores"
    print(f"prediction: {verdicts}, image AUROC {auroc:.3f}")
    gray = studio.ask("POST", f"{path}:predict", files=as_upload(file, "L"), expect_error=True)
    print(f"prediction of a gray image: status {gray.status_code}")

    for export_type in ("openvino", "onnx", "torch"):
        response = studio.ask("POST", f"{path}:export", json={"format": export_type}, expect_error=True)
        print(f"export to {export_type}: status {response.status_code}, {len(response.content)} bytes")

    watched, results = folder / "watched", folder / "results"
    watched.mkdir()
    results.mkdir()
    camera = {"source_type": "images_folder", "images_folder_path": str(watched), "ignore_existing_images": False}
    sink = {"sink_type": "folder", "folder_path": str(results), "output_formats": ["predictions"]}
    ids = {
        "source_id": studio.ask("POST", "/projects/{project}/sources", json={**camera, "name": "camera"}),
        "sink_id": studio.ask("POST", "/projects/{project}/sinks", json={**sink, "name": "results"}),
    }
    body = {name: answer["id"] for name, answer in ids.items()} | {"model_id": model["id"]}
    studio.ask("PATCH", "/projects/{project}/pipeline", json=body)
    studio.ask("POST", "/projects/{project}/pipeline:run")
    for file in find_images(arguments.defective)[:5]:
        (watched / f"{file.stem}.png").write_bytes(as_upload(file)["file"][1])
    deadline = time.monotonic() + 120
    while (count := len(list(results.glob("*-pred.txt")))) < 5 and time.monotonic() < deadline:
        time.sleep(1)
    studio.ask("POST", "/projects/{project}/pipeline:stop")
    print(f"pipeline: {count} results of 5 images")


if __name__ == "__main__":
    main()
