"""Attention kernels of other packages: used where they are right, left out with a message where they are not."""

import pytest
import torch
import torch.nn.functional as F

from slotmemory.backbones import attention, kernels
from slotmemory.backbones.attention import attend
from slotmemory.errors import InputError

CPU, DTYPE, DIM = torch.device("cpu"), torch.float32, 32


def plain(query, key, value):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


@pytest.fixture
def package(monkeypatch):
    """Pretend that flash_attn is installed and computes `plain(..)` changed by `harm`; returns the list of its calls."""
    calls = []
    monkeypatch.setattr(attention, "_chosen", None)

    def install(harm=lambda x: x):
        def run(*given):
            calls.append(given)
            return harm(plain(*given))

        monkeypatch.setitem(kernels.OTHERS, "flash_attn", lambda: run)
        return calls

    return install


def given(dtype=DTYPE, dim=DIM):
    return [torch.randn(1, length, 2, dim, dtype=dtype) for length in (5, 9, 9)]


def test_a_right_kernel_takes_torchs_place(package):
    calls, tensors = package(), given()
    expected = attend(*tensors)
    assert not calls and kernels.use("flash_attn", CPU, DTYPE, DIM) == "flash_attn"
    assert torch.equal(attend(*tensors), expected) and len(calls) == 2  # its check, and this
    assert kernels.use(None, CPU, DTYPE, DIM) == "torch"
    attend(*tensors)
    assert len(calls) == 2


@pytest.mark.parametrize("harm", [lambda x: x * 1.01, lambda x: x * float("nan")], ids=["off", "no number"])
def test_a_wrong_kernel_is_not_used_and_said(package, caplog, harm):
    calls, tensors = package(harm), given()
    assert (
        kernels.use("flash_attn", CPU, DTYPE, DIM) == "torch"
        and "the flash_attn attention kernel is wrong" in caplog.text
    )
    assert torch.equal(attend(*tensors), plain(*tensors)) and len(calls) == 1


def test_a_kernel_serves_only_what_it_was_checked_on(package):
    calls = package()
    kernels.use("flash_attn", CPU, DTYPE, DIM)
    q, k, v = given()
    attend(q.requires_grad_(), k, v)  # it may know no gradients
    attend(*given(torch.bfloat16))
    attend(*given(dim=16))
    attend(q.detach(), k, v, torch.ones(5, 9, dtype=torch.bool))
    assert len(calls) == 1
    with torch.no_grad():
        attend(q, k, v)
    assert len(calls) == 2


def test_a_package_that_is_not_installed_is_said(monkeypatch, caplog):
    monkeypatch.setattr(attention, "_chosen", None)

    def absent():
        raise ModuleNotFoundError("No module named 'flash_attn'")

    monkeypatch.setitem(kernels.OTHERS, "flash_attn", absent)
    assert kernels.use("flash_attn", CPU, DTYPE, DIM) == "torch"
    assert "does not run here (No module named 'flash_attn')" in caplog.text


def test_torchs_own_kernels_can_be_preferred_where_they_run(caplog):
    assert kernels.use("flash", CPU, DTYPE, DIM) == "flash" and not caplog.text
    assert kernels.use("cudnn", CPU, DTYPE, DIM) == "torch" and "cudnn attention kernel does not run" in caplog.text


def test_the_order_of_torchs_kernels_is_what_is_asked_for(monkeypatch):
    order = []
    found = tuple(kernels.Kernel(name, 1e-3, name != "memory-efficient") for name in kernels.FUSED)
    monkeypatch.setattr(kernels, "check", lambda *_: found)
    monkeypatch.setattr(kernels, "_prefer", lambda names: order.append(names))
    for name in (None, "flash"):
        kernels.use(name, torch.device("cuda"), torch.bfloat16, 128)
    assert order == [["cudnn", "flash"], ["flash", "cudnn"]]


def test_preference_holds_until_the_next_and_leaves_out_what_is_wrong(monkeypatch):
    monkeypatch.setattr(kernels, "_order", None)
    before = torch._C._get_sdp_priority_order(), torch.backends.cuda.mem_efficient_sdp_enabled()
    kernels._prefer(["cudnn", "flash"])
    try:
        assert torch._C._get_sdp_priority_order()[:3] == [3, 1, 0]
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        kernels._prefer(["flash", "cudnn"])
        assert torch._C._get_sdp_priority_order()[:3] == [1, 3, 0]
    finally:
        kernels._order.__exit__(None, None, None)
    assert (torch._C._get_sdp_priority_order(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_flex_attention_computes_what_attention_is(monkeypatch):
    """Uncompiled, which is the same arithmetic."""
    monkeypatch.setattr(attention, "_chosen", None)
    monkeypatch.setattr(kernels.torch, "compile", lambda function, **_: function)
    assert kernels.use("flex", CPU, DTYPE, DIM) == "flex"
    tensors = given()
    torch.testing.assert_close(attend(*tensors), plain(*tensors))
    kernels.choose(None)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(InputError, match="unknown attention kernel 'flsh'; did you mean 'flash'"):
        kernels.use("flsh", CPU, DTYPE, DIM)
