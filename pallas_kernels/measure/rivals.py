"""What the kernels are measured against: dense products over layouts, and cuSPARSELt through torch."""

import functools
import importlib
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.measure import timing

_LAYOUTS = {"NN": (False, False), "NT": (False, True), "TN": (True, False)}


@functools.cache
def dense(m: int, n: int, k: int) -> dict[str, tuple[timing.Run, int]]:
    """bf16 products [m, k] x [k, n] by XLA and, through torch, cuBLAS: "dense xla NN" -> (run, calls per run)."""

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)

    found, calls = {}, _calls(m, n, k)
    for name, (a_transposed, b_transposed) in _LAYOUTS.items():
        shapes = (k, m) if a_transposed else (m, k), (n, k) if b_transposed else (k, n)
        sets = [tuple(normal(2 * seed + i, *shape) for i, shape in enumerate(shapes)) for seed in range(calls)]

        def product(a, b, at=a_transposed, bt=b_transposed):
            return (a.T if at else a) @ (b.T if bt else b)

        found[f"dense xla {name}"] = (timing.repeated(product, sets), len(sets))
    if torch := _torch():
        a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(k, n, device="cuda", dtype=torch.bfloat16)
        columns = b.t().contiguous().t()
        found["dense cublas NN"] = _torch_run(torch, lambda: torch.mm(a, b), 2 * calls)
        found["dense cublas NT"] = _torch_run(torch, lambda: torch.mm(a, columns), 2 * calls)
    return found


@functools.cache
def cusparselt(m: int, n: int, k: int) -> dict[str, tuple[timing.Run, int]]:
    """The 2:4 product by cuSPARSELt, with the best algorithm of its search, for both layouts of B and result orders."""
    torch = _torch()
    if torch is None or not torch.backends.cusparselt.is_available():
        return {}
    a = torch.randn(m, k // 4, 4, device="cuda", dtype=torch.bfloat16)
    a = a.scatter(-1, a.abs().argsort(dim=-1)[..., :2], 0).view(m, k)
    packed = torch._cslt_compress(a)
    b = torch.randn(k, n, device="cuda", dtype=torch.bfloat16)
    found = {}
    for layout, operand in (("NN", b), ("NT", b.t().contiguous().t())):
        for transposed in (False, True):
            best = torch._cslt_sparse_mm_search(packed, operand, transpose_result=transposed)
            call = functools.partial(torch._cslt_sparse_mm, packed, operand, alg_id=best, transpose_result=transposed)
            found[f"cusparselt {layout} {'T' if transposed else 'N'}"] = _torch_run(torch, call, 2 * _calls(m, n, k))
    return found


@functools.cache
def dense8(m: int, n: int, k: int) -> dict[str, tuple[timing.Run, int]]:
    """e4m3 products [m, k] x [n, k]^T with fast accumulation: XLA's without scales, torch's of tensors and rows.

    Of XLA's presets only `..._F32_FAST_ACCUM` asks for fast accumulation (jax 0.11.2).
    """
    calls, e4m3 = _calls(m, n, k), jnp.float8_e4m3fn
    sets = [
        tuple(jax.random.normal(jax.random.key(2 * seed + i), s).astype(e4m3) for i, s in enumerate(((m, k), (n, k))))
        for seed in range(calls)
    ]

    def product(a, b):
        fast = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
        contract_last = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(a, b, contract_last, precision=fast, preferred_element_type=jnp.bfloat16)

    found = {"dense8 xla": (timing.repeated(product, sets), calls)}
    if torch := _torch():
        a, b = (torch.randn(*s, device="cuda").to(torch.float8_e4m3fn) for s in ((m, k), (n, k)))
        scales = {
            "tensor": (torch.ones((), device="cuda"), torch.ones((), device="cuda")),
            "row": (torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")),
        }
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        for name, pair in scales.items():
            call = functools.partial(torch._scaled_mm, a, b.t(), *pair, **options)
            found[f"dense8 torch {name}"] = _torch_run(torch, call, 2 * calls)
    return found


@functools.cache
def cusparselt8(m: int, n: int, k: int) -> dict[str, tuple[timing.Run, int]]:
    """The 2:4 product of e4m3 by cuSPARSELt, searched, for both orders of the result; it has no scales of rows."""
    torch = _torch()
    if torch is None or not torch.backends.cusparselt.is_available():
        return {}
    a = torch.randn(m, k // 4, 4, device="cuda")
    a = a.scatter(-1, a.abs().argsort(dim=-1)[..., :2], 0).view(m, k)
    packed = torch._cslt_compress(a.to(torch.float8_e4m3fn))
    b = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn).t()
    found = {}
    for transposed in (False, True):
        options = {"transpose_result": transposed, "out_dtype": torch.bfloat16}
        best = torch._cslt_sparse_mm_search(packed, b, **options)
        call = functools.partial(torch._cslt_sparse_mm, packed, b, alg_id=best, **options)
        found[f"cusparselt8 {'T' if transposed else 'N'}"] = _torch_run(torch, call, 2 * _calls(m, n, k))
    return found


def _torch() -> Any:
    """The torch module, if it is installed and sees a GPU: a rival here, no dependency."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    return torch if torch.cuda.is_available() else None


class _Pending:
    """Torch's work under way, that `jax.block_until_ready` can wait for."""

    def __init__(self, torch, out):
        self._torch, self.out = torch, out

    def block_until_ready(self):
        self._torch.cuda.synchronize()
        return self


def _calls(m: int, n: int, k: int) -> int:
    """Calls in one program: at least two, and as many as hide the launches of small products."""
    return min(32, max(2, math.ceil(5e10 / (2 * m * n * k))))


def _torch_run(torch, call, calls: int) -> tuple[timing.Run, int]:
    """The call several times as one CUDA graph, so that no launch waits for the host (cuSPARSELt's plans take long)."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()

    def replay(_operands=call):  # the graph reads memory that only `call` keeps alive
        return [_Pending(torch, graph.replay())]

    return replay, calls
