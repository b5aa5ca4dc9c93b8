"""Every GPU path on a GPU against the reference, in fp32, fp16 and bf16."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from tests.gpu_laws import *  # noqa: F403
