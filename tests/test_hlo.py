"""Programs are compiled for 8 CPU devices; what only TPUs have is in a text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mixer_jax.hlo import Traffic, count_traffic
from mixer_jax.training import sharding


def compile_on(fsdp, function, *args):
    """Compiles function(mesh) of arrays with (shape, spec)."""
    mesh = sharding.create_mesh(fsdp)
    arrays = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
        )
        for shape, spec in args
    ]
    return count_traffic(jax.jit(function(mesh)).lower(*arrays).compile().as_text())


def test_a_product_reads_its_operands_and_writes_its_result():
    found = compile_on(1, lambda mesh: jnp.dot, ((64, 32), P()), ((32, 128), P()))
    assert found == Traffic(4 * (64 * 32 + 32 * 128 + 64 * 128), 0)


def test_the_body_of_a_loop_counts_once():
    def function(mesh):
        return lambda x: jax.lax.scan(lambda c, _: (jnp.dot(c, c), None), x, length=9)

    found = compile_on(1, function, ((256, 256), P())).memory_bytes
    product = 3 * 4 * 256**2
    assert product <= found < 4 * product


@pytest.mark.parametrize(
    ("fsdp", "spec", "group"), [(1, P("data"), 8), (4, P("fsdp"), 4)]
)
def test_an_all_gather_sends_what_the_others_lack(fsdp, spec, group):
    def function(mesh):
        whole = sharding.replicated(mesh)
        return lambda x: jax.lax.with_sharding_constraint(x, whole)

    found = compile_on(fsdp, function, ((64, 128), spec))
    assert found.network_bytes == 4 * 64 * 128 * (group - 1) // group


def test_an_all_reduce_sends_twice_as_much():
    found = compile_on(1, lambda mesh: lambda x: x.sum(0), ((8, 4096), P("data")))
    assert found.network_bytes == 2 * 4 * 4096 * 7 // 8


TPU = """\
HloModule step, is_scheduled=true, num_partitions=8

%all-reduce-scatter (input: bf16[8,128]) -> bf16[1,128] {
  %input = bf16[8,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,128]{1,0} all-reduce(%input), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = bf16[1,128]{1,0} dynamic-slice(%all-reduce.1)
}

%async_collective_fusion (p: bf16[4,128], q: bf16[64,128]) -> bf16[64,128] {
  %p = bf16[4,128]{1,0} parameter(0)
  %q = bf16[64,128]{1,0} parameter(1)
  %all-gather.1 = bf16[16,128]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=2, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %r = bf16[64,128]{1,0} add(%q, %q)
}

%async_collective_fusion.1 (p: bf16[4,128], q: bf16[64,128]) -> bf16[64,128] {
  %p.1 = bf16[4,128]{1,0} parameter(0)
  %q.1 = bf16[64,128]{1,0} parameter(1)
  %all-gather.2 = bf16[16,128]{1,0:T(8,128)} all-gather(%p.1), channel_id=2, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %r.1 = bf16[64,128]{1,0} add(%q.1, %q.1)
}

ENTRY %main (x: bf16[64,128], y: bf16[4,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, \
bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[64,128]{1,0:T(8,128)(2,1)}), \
bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), calls=%slice
  %slice-done = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %near = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%copy-done, %slice-done), \
kind=kOutput, calls=%async_collective_fusion
  ROOT %far = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%near, %y), kind=kOutput, \
calls=%async_collective_fusion.1
}
"""


def test_what_stays_on_the_chip_is_not_moved():
    copied, sliced, read, written = 64 * 128, 16 * 128, 4 * 128, 64 * 128
    expected = 2 * (copied + sliced + read + written)
    assert count_traffic(TPU).memory_bytes == expected


def test_a_collective_in_several_fusions_counts_once():
    scattered, gathered = 2 * 8 * 128 * 7 // 8, 2 * 16 * 128 * 3 // 4
    assert count_traffic(TPU).network_bytes == scattered + gathered


def test_another_text_has_no_traffic():
    with pytest.raises(ValueError, match="no text of a program in HLO: 'module @jit"):
        count_traffic("module @jit_step {\n}")
