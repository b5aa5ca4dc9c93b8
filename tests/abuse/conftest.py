"""The real server on a tiny backbone, for the tests that change it or kill parts of it."""

from collections.abc import Iterator

import pytest

from model_store.backbone import Backbone
from model_store.store import Store
from tests.abuse.place import Place, serve_tiny
from tests.soak import soak


@pytest.fixture(scope="session")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]
) -> Iterator[Place]:
    """A server with two replicas, in the long form three. Each test has tasks of its own."""
    folder = tmp_path_factory.mktemp("place")
    with serve_tiny(folder, tiny, replicas=3 if soak() else 2) as made:
        yield made
