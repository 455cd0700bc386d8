"""Where the time of a step goes: parts by named scopes, and a trace taken on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from train.records import trace
from train.records.trace import Work

NAMES = trace.operation_names(
    """
  %dot.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(step)/jvp(attention)/projections/dot_general" id=1}
  ROOT %loop_add_fusion.2 = (f32[8]{0}, f32[]) fusion(%a), metadata={op_name="jit(step)/transpose(jvp(ffn))/add"}
  %copy.3 = f32[8]{0} copy(%a)
  %custom-call.4 = f32[8]{0} custom-call(%a), metadata={op_name="jit(step)/attention/dot_product_attention_fwd"}
  %add.5 = f32[8]{0} add(%a, %b), metadata={op_name="jit(step)/jvp()/add"}

%fused_pack.6 (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %kernel.7 = f32[8]{0} custom-call(%param_0), metadata={op_name="jit(step)/ffn/while/body/pack"}
  ROOT %bitcast.8 = f32[8]{0} bitcast(%kernel.7)
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  ROOT %dynamic_slice_fusion.10 = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused_pack.6
}
"""
)


@pytest.mark.parametrize(
    ("name", "operation", "part"),
    [
        ("nvjet_tst_256x128", "dot.1", "projections"),
        ("loop_add_fusion_2", "", "ffn"),  # where the trace has no operation, the kernel is called after it
        ("cudnn_generated_fort_native_sdpa", "custom-call.4", "attention"),
        ("MemcpyD2D", "copy.3", "other"),
        ("add_5", "add.5", "other"),
        ("ncclDevKernel_AllGather_RING_LL", "all-gather-start.7", "communication"),
        ("body_mosaic_gpu_kernel", "dynamic_slice_fusion.10", "ffn"),  # by what is inside
        ("MemcpyH2D", "", "other"),
        ("nvjet_tst_256x128", "", "unknown"),
        ("nvjet_tst_256x128", "dot.999", "unknown"),
    ],
)
def test_a_kernel_belongs_to_the_innermost_scope(name, operation, part):
    assert trace.part_of(Work(name, operation, 0, 1), NAMES) == part


def test_parts_add_up_to_the_step_and_hidden_work_counts_once():
    ms = 1e6
    found = [
        Work("gemm", "dot.1", 0, 4 * ms),
        Work("nccl", "all-reduce.1", 1 * ms, 6 * ms),  # 2 of it behind nothing
        Work("MemcpyD2D", "copy.3", 2 * ms, 7 * ms),  # 3 of it behind no kernel
        Work("gemm", "loop_add_fusion.2", 3 * ms, 5 * ms),  # 1 of it behind the first
        Work("gemm", "add.5", 8 * ms, 10 * ms),
        Work("gemm", "", 10 * ms, 11 * ms),
    ]
    parts = trace.part_ms(found, NAMES, 2, 6.0)
    expected = {"projections": 2.0, "ffn": 0.5, "other": 2.0, "unknown": 0.5, "idle": 1.0}
    assert parts == pytest.approx(dict.fromkeys((*trace.PARTS, "communication"), 0.0) | expected)
    exchanged = trace.part_ms([*found[:2], found[3]], NAMES, 1, 6.0)["communication"]
    assert exchanged == pytest.approx(1.0)


def test_a_trace_of_a_program_finds_its_parts():
    @jax.jit
    def step(x, w):
        def loss(w):
            with jax.named_scope("ffn"):
                y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=3)
            with jax.named_scope("head"):
                return jnp.sum(jnp.sin(y) ** 2)

        return jax.grad(loss)(w)

    operands = jnp.ones((256, 256)), jnp.full((256, 256), 1e-3)
    compiled = step.lower(*operands).compile()
    compiled(*operands)
    found = trace.record(lambda: [compiled(*operands) for _ in range(2)])
    names = trace.operation_names(compiled.as_text() or "")
    parts = trace.part_ms(found, names, 2, 1e3)
    assert parts["ffn"] > parts["head"] > 0
    assert parts["optimizer"] == parts["unknown"] == 0
    assert sum(parts.values()) == pytest.approx(1e3)
    assert "ffn" in trace.table(found, names, 2, 3).split("\n")[0]
