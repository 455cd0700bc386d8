"""The examples of several devices run, and what their headers say about the loss is so."""

import numpy as np
import pytest

from tests.test_examples import load


@pytest.mark.parametrize("name", ["linen_fsdp", "nnx_scan"])
def test_examples_of_several_devices(name):
    losses = np.array(load(name).main())
    assert losses[-5:].mean() < losses[0] / 3
    assert losses[-5:].mean() < losses[25:30].mean()
