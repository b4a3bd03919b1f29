"""Products of 16-bit factors into fp32 on devices whose library refuses them: asked once, and done another way."""

import pytest
import torch

from perpo_kernels import chunks

REAL_MM, REAL_ADDMM = torch.mm, torch.addmm
DTYPE = torch.bfloat16


@pytest.fixture
def asked(monkeypatch):
    """A ROCm build; how often its library was asked, and whether it agrees."""
    calls = {"mm": 0, "refuses": True}

    def mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return REAL_MM(a, b) if out is None else REAL_MM(a, b, out=out)
        calls["mm"] += 1
        if calls["refuses"]:
            raise RuntimeError("Tunable GEMM is not supported for float output with reduced float input")
        return out.copy_(REAL_MM(a.to(out_dtype), b.to(out_dtype)))

    def addmm(c, a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return REAL_ADDMM(c, a, b, out=out)
        return out.copy_(REAL_ADDMM(c.to(out_dtype), a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    chunks._wide_products.cache_clear()
    yield calls
    chunks._wide_products.cache_clear()


@pytest.mark.parametrize("refuses", [True, False])
def test_a_library_is_asked_once_for_each_device_dtype_and_setting(asked, refuses):
    asked["refuses"] = refuses
    for _ in range(3):
        assert chunks._wide_products(torch.device("cpu"), DTYPE, False) is not refuses
    assert asked["mm"] == 1
    chunks._wide_products(torch.device("cpu"), torch.float16, False)
    chunks._wide_products(torch.device("cpu"), DTYPE, True)
    assert asked["mm"] == 3


class OfCuda:
    """All that `wide_products` looks at."""

    device, dtype = torch.device("cuda", 0), DTYPE


@pytest.mark.parametrize("hip", [None, "7.0"])
@pytest.mark.parametrize("tunable", [None, lambda: False, lambda: True])
def test_cuda_is_trusted_rocm_and_tunable_op_are_asked(monkeypatch, hip, tunable):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch._C, "_cuda_tunableop_is_enabled", tunable, raising=False)
    questions = []
    monkeypatch.setattr(chunks, "_wide_products", lambda *what: questions.append(what) or False)
    is_tunable = tunable is not None and tunable()
    assert chunks.wide_products(OfCuda()) is (hip is None and not is_tunable)
    assert questions == ([(OfCuda.device, DTYPE, is_tunable)] if hip or is_tunable else [])


@pytest.mark.parametrize("way", ["wide", "refused", "fp32 copies"])
@pytest.mark.parametrize("unit", [None, 0.25])
def test_each_way_gives_the_product(asked, monkeypatch, way, unit):
    asked["refuses"] = way != "wide"
    monkeypatch.setattr(chunks, "wide_products", lambda x: way == "wide")
    monkeypatch.setattr(chunks, "fp32_copies", lambda x: way == "fp32 copies")
    monkeypatch.setattr(chunks, "CPU_BLOCK", 16)
    a, b = torch.randn(50, 40).to(DTYPE), torch.randn(40, 6).to(DTYPE)
    exact = a.double() @ b.double()
    tolerance = (2.0**-8 if way == "refused" else 1e-6) * exact.abs().max()
    out = torch.empty(50, 6)
    chunks.multiply(a, b, out)
    assert (out - exact).abs().max() <= tolerance
    start = out.fill_(1000.0).clone()
    chunks.add_product(out, a, b, None if unit is None else torch.tensor(unit))
    assert (out - (start + (unit or 1.0) * exact)).abs().max() <= tolerance + 1000 * 2.0**-23
    for bias in (None, torch.randn(50).to(DTYPE)):
        logits = chunks.project(b.t(), a, bias, torch.empty(6, 64)[:, :50])  # always exact: fp32 was asked for
        right = exact.t() if bias is None else exact.t() + bias.double()
        assert (logits - right).abs().max() <= 1e-6 * exact.abs().max()
