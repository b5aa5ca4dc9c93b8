"""Put the fake service onto a cluster.

`python -m tests.serving.fake_cluster STORE HEAD:PORT`
"""

import sys
from pathlib import Path

from serving.cluster import run
from serving.config import ServeConfig
from serving.errors import ServingError
from tests.serving.fake_service import open_fake_service


def main(store: str, address: str) -> None:
    """Serve until a signal comes."""
    try:
        config = ServeConfig.of(store=Path(store), ray_address=address, replicas_per_node=1)
        run(config, open_fake_service)
    except ServingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
