# SPDX-License-Identifier: Apache-2.0

"""Teacher and student at the same time, each on one of torch's two threads."""

import threading
from functools import partial

import pytest
import torch

from anomalib_stfpm_ext import StfpmExtModel, torch_model
from anomalib_stfpm_ext.inference.concurrent import can_run_concurrently, run_concurrently


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    if not can_run_concurrently(torch.device("cpu"), 2):
        pytest.skip("on x86-64 only")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    return StfpmExtModel("test_resnet", ["layer1", "layer3"], teacher_weights=False).eval()


@pytest.fixture
def calls(monkeypatch):
    """What was run side by side."""
    calls = []

    def run(computations):
        calls.append(computations)
        return run_concurrently(computations)

    monkeypatch.setattr(torch_model, "run_concurrently", run)
    return calls


@pytest.mark.parametrize(
    ("threads", "images", "expected"),
    [
        (1, 5, []),
        (2, 5, [2, 2]),  # parts of four images and of one
        (3, 5, [4]),  # two parts of up to three images
        (4, 8, [4]),
        (4, 1, []),  # both networks share four threads
        (8, 3, []),
    ],
)
def test_large_batches_keep_all_threads_busy(model, calls, monkeypatch, threads, images, expected):
    monkeypatch.setattr(torch_model, "CPU_PIXELS", 4 * 64 * 64)
    batch = torch.randn(images, 3, 64, 64)
    with torch.no_grad():
        torch.set_num_threads(1)
        one_by_one = torch.cat([model(image[None]).anomaly_map for image in batch])
        torch.set_num_threads(threads)
        torch.testing.assert_close(model(batch).anomaly_map, one_by_one)
    assert list(map(len, calls)) == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_same_maps_as_one_after_the_other(model, calls, mode):
    images = torch.randn(3, 3, 64, 96)
    with mode():
        result = model(images)
        assert len(calls) == 1
        torch.set_num_threads(1)
        expected = model(images)
    assert len(calls) == 1
    torch.testing.assert_close(result.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(result.pred_score, expected.pred_score)
    assert result.anomaly_map.is_inference() == (mode is torch.inference_mode)


def test_at_the_same_time():
    together = threading.Barrier(2, timeout=60)
    first, second = run_concurrently([together.wait, together.wait])
    assert {first, second} == {0, 1}


def test_more_than_threads():
    assert run_concurrently([partial(pow, 2, number) for number in range(9)]) == [2**number for number in range(9)]


def test_only_plain_inference_with_two_threads(model, calls):
    images = torch.randn(1, 3, 64, 64)
    model(images)
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        with torch.no_grad():
            model(images)
    torch.set_num_threads(2)
    with torch.no_grad():
        model.train()(images)
    assert not calls


def test_many_callers_at_once(model):
    images = [torch.randn(count, 3, 64, 64) for count in range(1, 9)]
    with torch.no_grad():
        expected = [model(batch).anomaly_map for batch in images]
    results = {}

    def work(index):
        with torch.no_grad():
            for _ in range(5):
                results.setdefault(index, []).append(model(images[index]).anomaly_map)

    callers = [threading.Thread(target=work, args=[index]) for index in range(len(images))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for index, maps in enumerate(expected):
        assert len(results[index]) == 5
        for result in results[index]:
            torch.testing.assert_close(result, maps)


def test_an_error_of_either_reaches_the_caller(model):
    with torch.no_grad(), pytest.raises(ValueError, match="images: wanted") as error:
        model(torch.randn(1, 4, 64, 64))
    assert "3 channels" in str(error.value.__context__)
    with pytest.raises(ZeroDivisionError):
        run_concurrently([lambda: 1, lambda: 1 // 0])
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
