"""Calls ordered on a stream of a real GPU."""

from __future__ import annotations

import pytest
import torch
from kt_cases import batch, close, loaded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")


@pytest.mark.parametrize("as_handle", [False, True])
@pytest.mark.parametrize("deferred", [0, 2])
def test_inputs_that_the_stream_has_yet_to_write(as_handle, deferred):
    """They are waited for, and the result is there for what the stream does next."""
    moe = loaded(method="BF16", max_deferred_experts_per_token=deferred)
    plain = loaded(method="BF16", max_deferred_experts_per_token=deferred)
    hidden, ids, weights = batch(5)
    expected = plain.forward(hidden, ids, weights)
    stream = torch.cuda.Stream()
    given = stream.cuda_stream if as_handle else stream
    ready = [tensor.cuda() for tensor in (hidden, ids, weights)]
    late = [torch.zeros_like(tensor) for tensor in ready]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for tensor, value in zip(late, ready, strict=True):
            tensor.copy_(value)
    moe.submit_forward(*late, given)
    with torch.cuda.stream(stream):
        for tensor in late:
            tensor.zero_()
    found = moe.sync_forward(late[0], given)
    with torch.cuda.stream(stream):
        doubled = found * 2
    stream.synchronize()
    assert found.is_cuda and found.dtype == hidden.dtype
    close(doubled.cpu(), expected * 2)
    moe.clear_buffer_cache()
