"""What all tests share."""

import pytest
import torch
from hypothesis import settings

from model_store.backbone import Backbone
from model_store.store import Store
from tests.overlays import small_backbone

# The networks of these tests are tiny: one thread is faster than waiting for a second.
torch.set_num_threads(1)

# No test depends on how long something takes.
settings.register_profile("taskbone", deadline=None)
settings.load_profile("taskbone")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Backbone]:
    """A small random BERT with an MLM head, and the store that it lies in. Not to be written to."""
    return small_backbone(tmp_path_factory.mktemp("tiny"))
