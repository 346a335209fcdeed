"""What is read off compiled programs: exchanges of known groups and sizes, and copies that compute nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from glm_jax.planning.program import Moved, Program, Sent

ROWS, WIDTH, TRIPS = 16, 256, 5
LOCAL = ROWS * WIDTH * 4  # bytes of one device's part in float32


def sent(mesh, body, *, trips=1) -> tuple[Sent, ...]:
    """What a program sends that runs `body` on each device's [ROWS, WIDTH] so many times."""

    def region(x):
        return lax.scan(lambda x, _: (body(x), None), x, length=trips)[0] if trips > 1 else body(x)

    shape = jax.ShapeDtypeStruct((ROWS * 4, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P("expert")))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(region, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
        return Program(jax.jit(mapped).lower(shape).compile().as_text()).sent()


@pytest.fixture
def mesh(mesh_of_sizes):
    return mesh_of_sizes((1, 4, 2))


@pytest.mark.parametrize("trips", [1, TRIPS])
@pytest.mark.parametrize(
    ("body", "kind", "nbytes"),
    [
        (lambda x: jnp.sin(lax.all_gather(x, "expert", axis=0, tiled=True))[:ROWS], "all-gather", 4 * LOCAL),
        (lambda x: jnp.sin(lax.psum(x, "expert")), "all-reduce", LOCAL),
        (
            lambda x: jnp.tile(lax.psum_scatter(jnp.sin(x), "expert", scatter_dimension=0, tiled=True), (4, 1)),
            "reduce-scatter",
            LOCAL,
        ),
        (lambda x: jnp.sin(lax.all_to_all(x, "expert", 0, 0, tiled=True)), "all-to-all", 4 * LOCAL),
    ],
)
def test_exchanges_are_counted_with_their_group_their_bytes_and_the_trips_of_their_loop(
    mesh, body, kind, nbytes, trips
):
    assert sent(mesh, body, trips=trips) == (Sent(kind=kind, group=4, nbytes=nbytes, times=trips),)


def test_groups_of_two_axes_and_of_none(mesh):
    assert [each.group for each in sent(mesh, lambda x: jnp.sin(lax.psum(x, ("expert", "tensor"))))] == [8]
    assert sent(mesh, jnp.sin) == ()


def swap(x):
    return jnp.sin(lax.all_to_all(x, "expert", 0, 0, tiled=True))


def needed(x):
    """A condition that depends on the data, and is the same on all devices."""
    return lax.pmax(jnp.max(x), ("data", "expert", "tensor")) > 0


def some_rounds(x, rounds, run=swap):
    """A loop that runs its body in the rounds that are needed, as the experts' exchange does."""

    def body(x, number):
        return lax.cond(needed(x) & (number < jnp.sum(x)), run, lambda x: x, x), None

    return lax.scan(body, x, jnp.arange(rounds))[0]


def times_and_rounds(exchanges: tuple[Sent, ...]) -> list[tuple[int, int]]:
    """Of the all-to-alls alone: the conditions have exchanges of their own."""
    assert {each.nbytes for each in exchanges if each.kind == "all-to-all"} <= {4 * LOCAL}
    return [(each.times, each.rounds) for each in exchanges if each.kind == "all-to-all"]


@pytest.mark.parametrize(
    ("body", "trips", "expected"),
    [
        (lambda x: lax.cond(needed(x), swap, lambda x: x, x), 1, [(1, 1)]),  # taken once, if at all
        (lambda x: some_rounds(x, 7), 1, [(1, 7)]),
        (lambda x: some_rounds(x, 7), TRIPS, [(TRIPS, 7)]),
        (lambda x: some_rounds(swap(x), 7), TRIPS, [(TRIPS, 1), (TRIPS, 7)]),
        (lambda x: some_rounds(x, 7, lambda x: lax.scan(lambda x, _: (swap(x), None), x, length=3)[0]), 1, [(3, 7)]),
        (lambda x: some_rounds(x, 7, lambda x: lax.cond(jnp.sum(x) > 3, swap, jnp.cos, x)), 1, [(1, 7)]),
        (lambda x: some_rounds(x, 7, lambda x: some_rounds(x, 3)), TRIPS, [(TRIPS, 21)]),
    ],
)
def test_rounds_that_may_be_skipped_count_as_one_exchange(mesh, body, trips, expected):
    assert times_and_rounds(sent(mesh, body, trips=trips)) == expected


def moved(function, *arguments, **options) -> list[tuple[str, int]]:
    program = Program(jax.jit(function, **options).lower(*arguments).compile().as_text())
    return [(each.kind, each.nbytes) for each in program.moved(arguments[0].size * 4 // 2)]


def test_a_large_array_that_is_only_moved_is_found():
    large = jnp.zeros((512, 1024))
    assert moved(lambda x: x.T, large)[0][1] == large.nbytes
    assert moved(lambda x: x[:, : 512 + 128], large) == [("slice", 512 * 640 * 4)]
    assert moved(lambda x: jnp.sum(jnp.sin(x) @ x.T, axis=0), large) == []


def test_an_update_in_place_moves_nothing_and_one_that_is_not_copies():
    cache, row = jnp.zeros((64, 8, 1024)), jnp.ones((8, 1024))

    def write(cache, row):
        return cache.at[3].set(row)

    assert moved(write, cache, row, donate_argnums=0) == []
    assert moved(write, cache, row) == [("copy", cache.nbytes)]


# Written after what the TPU compiler prints: memory spaces in layouts, trips as a constant of the condition, groups by
# axes of the mesh, a copy in two halves.
TPU = """\
HloModule jit_step, is_scheduled=true

%fused_slice (param_0: bf16[45,64,128], param_1: s32[]) -> bf16[1,64,128] {
  %param_0 = bf16[45,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

%fused_dot (param_0.1: bf16[64,128]) -> bf16[64,64] {
  %param_0.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %convolution.1 = bf16[64,64]{1,0:T(8,128)(2,1)} convolution(%param_0.1, %param_0.1), dim_labels=bf_oi->bf
}

%condition (arg: (s32[], bf16[45,64,128])) -> pred[] {
  %arg = (s32[]{:T(128)}, bf16[45,64,128]{2,1,0}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %constant.45 = s32[]{:T(128)} constant(45)
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.45), direction=LT
}

%body (arg.1: (s32[], bf16[45,64,128])) -> (s32[], bf16[45,64,128]) {
  %arg.1 = (s32[]{:T(128)}, bf16[45,64,128]{2,1,0}) parameter(0)
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %get-tuple-element.3 = bf16[45,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
  %slice_fusion = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.3, %get-tuple-element.2), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/slice"}
  %slice_fusion.2 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.3, %get-tuple-element.2), kind=kLoop, calls=%fused_slice
  %bitcast.1 = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%slice_fusion)
  %dot_fusion = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%bitcast.1), kind=kOutput, calls=%fused_dot
  %all-reduce.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-reduce(%dot_fusion), channel_id=1, replica_groups=mesh['data'=1,'expert'=4,'tensor'=2] {'expert','tensor'}, to_apply=%add
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[45,64,128]{2,1,0}) tuple(%get-tuple-element.2, %get-tuple-element.3)
}

ENTRY %main (param: bf16[45,64,128]) -> bf16[45,64,128] {
  %param = bf16[45,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %constant.0 = s32[]{:T(128)} constant(0)
  %copy-start.1 = (bf16[45,64,128]{2,1,0:T(8,128)(2,1)S(1)}, bf16[45,64,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%param)
  %copy-done.1 = bf16[45,64,128]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %copy-start.2 = (bf16[45,64,128]{2,1,0:T(8,128)(2,1)}, bf16[45,64,128]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%copy-done.1)
  %copy-done.2 = bf16[45,64,128]{2,1,0:T(8,128)(2,1)} copy-done(%copy-start.2)
  %tuple.2 = (s32[]{:T(128)}, bf16[45,64,128]{2,1,0}) tuple(%constant.0, %copy-done.2)
  %while.1 = (s32[]{:T(128)}, bf16[45,64,128]{2,1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %get-tuple-element.9 = bf16[45,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_the_text_of_a_program_for_a_tpu():
    program, layer = Program(TPU), 64 * 128 * 2
    assert program.sent() == (Sent(kind="all-reduce", group=8, nbytes=64 * 64 * 2, times=45),)
    assert set(program.moved(layer)) == {
        # into the processor's memory nothing counts, back to the device's it does
        Moved(kind="copy", array="bf16[45,64,128]", nbytes=45 * layer, times=1, where=""),
        Moved(kind="dynamic-slice", array="bf16[1,64,128]", nbytes=layer, times=45, where="jit(step)/slice"),
    }
    assert [each.times for each in program.moved(layer + 1)] == [1]
