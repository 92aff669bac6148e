"""What all tests share: no network, no deadline on a busy machine, no search for garbage among loaded modules, tests of
a GPU or of vLLM only where it is."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder

import pytest
from hypothesis import settings

from tests.helpers import garbage

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

settings.register_profile("grpo", deadline=None)
settings.load_profile("grpo")


class SkipWithoutVLLM(MetaPathFinder):
    """Skips a test, or a file of tests, that comes to import vLLM where it is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "vllm":
            pytest.skip("vLLM is not installed", allow_module_level=True)


if importlib.util.find_spec("vllm") is None:
    sys.meta_path.append(SkipWithoutVLLM())


gc.disable()  # until the test files are imported: modules are no garbage


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def modules_are_no_garbage() -> None:
    """At the start of each file, when what the file before it made is gone."""
    garbage.keep_modules()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # whole files, otherwise in their order
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu or has_cuda():
        return
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
