"""What compiled programs send, and what their products cost."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from dpdist.profiling import roofline

_MESH = jax.make_mesh(
  (2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)


def _compile(function, in_specs, out_specs, *shapes):
  run = jax.jit(
    jax.shard_map(function, mesh=_MESH, in_specs=in_specs, out_specs=out_specs)
  )
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return run.lower(*args).compile().as_text()


def test_loops_count_as_often_as_they_run():
  def function(stack, x):
    def body(x, w):
      whole = jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)
      return jnp.tanh(x @ whole), None

    return jax.lax.psum(jax.lax.scan(body, x, stack)[0], "data")

  text = _compile(
    function,
    (P(None, None, "fsdp"), P(("data", "fsdp"))),
    P("fsdp"),
    (5, 16, 16),
    (8, 16),
  )
  gather, reduction = sorted(roofline.collectives(text), key=lambda x: x.kind)
  assert gather == roofline.Collective("all-gather", 16 * 16 * 4, 4, 5)
  assert gather.bytes_sent == 5 * 16 * 16 * 4 * 3 / 4
  assert reduction == roofline.Collective("all-reduce", 16 * 4, 2, 1)
  assert reduction.bytes_sent == 2 * 16 * 4 / 2


def test_a_reduce_scatter_is_as_large_as_what_it_reduces():
  text = _compile(
    lambda x: jax.lax.psum_scatter(x[0], "fsdp", tiled=True),
    P("fsdp"),
    P("fsdp"),
    (4, 64),
  )
  (found,) = roofline.collectives(text)
  assert found == roofline.Collective("reduce-scatter", 64 * 4, 4, 1)
  assert found.bytes_sent == 64 * 4 * 3 / 4


def test_a_reduction_over_all_devices():
  text = _compile(
    lambda x: jax.lax.psum(x, ("data", "fsdp")),
    P(("data", "fsdp")),
    P(),
    (8, 4),
  )
  (found,) = roofline.collectives(text)
  assert (found.group_size, found.num_bytes) == (8, 16)


def test_programs_that_send_nothing():
  text = _compile(jnp.tanh, P("data"), P("data"), (8, 4))
  assert roofline.collectives(text) == []


# As XLA writes them for TPUs (libtpu 0.0.42), shortened.
_TPU = """HloModule jit_apply, is_scheduled=true, num_partitions=16

%all-reduce-scatter.1 (param: f32[64,32]) -> f32[8,32] {
  %param = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[64,32]{1,0:T(8,128)} all-reduce(%param), channel_id=3, replica_groups=[2,8]<=[16], use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[8,32]{1,0:T(8,128)} dynamic-slice(%all-reduce.5, %i, %j)
}

%fused_computation.1 (param: bf16[4,32]) -> bf16[32,32] {
  %all-gather.1 = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%param), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, dimensions={0}
}

%async_collective_fusion.2 (param: bf16[4,32]) -> bf16[32,32] {
  %all-gather.2 = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%param), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, dimensions={0}
}

%cond.1 (param: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(26), metadata={}
  ROOT %lt.1 = pred[]{:T(512)} compare(%get, %constant.1), direction=LT
}

%body.1 (param: (s32[])) -> (s32[]) {
  %fusion.1 = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
}

ENTRY %main (param: f32[64,32]) -> f32[8,32] {
  %while.1 = (s32[]) while(%tuple), condition=%cond.1, body=%body.1, metadata={}
  %fusion.3 = f32[8,32]{1,0} fusion(%param), kind=kCustom, calls=%all-reduce-scatter.1
  %send.2 = (f32[936,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast.5, %after-all.2), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2,3,4,5,6,7,8}x{0:255}"}
}
"""  # noqa: E501


def test_what_tpus_make_of_them():
  assert set(roofline.collectives(_TPU)) == {
    roofline.Collective("reduce-scatter", 64 * 32 * 4, 8, 1),
    roofline.Collective("all-gather", 32 * 32 * 2, 8, 26),
    roofline.Collective("all-reduce", 936 * 8 * 128 * 4, 8, 1, True),
  }
  assert len(roofline.collectives(_TPU)) == 3


def _count(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return roofline.count_products(jax.make_jaxpr(function)(*args).jaxpr)


def test_products_of_matrices_and_kernels():
  assert _count(jnp.dot, (4, 8), (8, 3)) == (2 * 4 * 8 * 3, 4 * (32 + 24 + 12))
  conv = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  assert _count(conv, (2, 6, 6, 3), (3, 3, 3, 5)).flops == (
    2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
  )
  grouped = functools.partial(conv, feature_group_count=3)
  assert _count(grouped, (2, 6, 6, 3), (3, 3, 1, 6)).flops == (
    2 * (2 * 4 * 4 * 6) * (3 * 3)
  )


@pytest.mark.parametrize(
  ("wrap", "times"),
  [
    (jax.jit, 1),
    (jax.checkpoint, 1),
    (
      lambda f: lambda a, b: jax.lax.cond(a[0, 0] > 0, f, lambda a, b: a, a, b),
      1,
    ),
    (
      lambda f: (
        lambda a, b: jax.lax.scan(lambda a, _: (f(a, b), None), a, length=7)[0]
      ),
      7,
    ),
  ],
)
def test_products_count_as_often_as_they_are_made(wrap, times):
  product = lambda a, b: a @ b
  assert _count(wrap(product), (8, 8), (8, 8)).flops == times * 2 * 8**3


def test_products_inside_shard_map_are_those_of_one_device():
  run = jax.shard_map(
    lambda a, b: a @ b,
    mesh=_MESH,
    in_specs=(P(("data", "fsdp")), P()),
    out_specs=P(("data", "fsdp")),
  )
  assert _count(run, (16, 8), (8, 8)).flops == 2 * 2 * 8 * 8
