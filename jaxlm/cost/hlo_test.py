"""What is read from compiled programs: small ones by hand, and all that an update sends on each mesh, from theory."""

from collections import defaultdict
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import loop, parallel
from jaxlm.cost import hlo
from jaxlm.parallel_test import ACCUMULATE, BATCH, MESHES, SEQ_LEN, SIZES, VOCAB, batch_of, run_with_8_devices, settings
from jaxlm.tasks import TASKS

D, L, V, T = SIZES["d_model"], SIZES["n_layers"], VOCAB, SEQ_LEN
FLOAT = 4


def rows(task: str, mesh: str) -> list[tuple[str, str, int]]:
    """Return what each device sends in an update: collective, axes of the mesh, bytes by the ring algorithm.

    A ring of n sends (n - 1)/n of a whole array to gather it, and twice that to sum it up everywhere.
    """
    data, fsdp, tensor = MESHES[mesh]
    A, b = ACCUMULATE[task], BATCH // (data * fsdp)  # batches of an update, samples of a device
    N = b * {"gpt": T, "mlm": 2}[task]  # positions of a device that have logits
    norm = {"gpt": 0, "mlm": 2 * D}[task]  # before the output layer
    # Of a device's part: the matrices of a block, its biases that are split over tensor, and its other vectors.
    matrices, split, whole = 12 * D * D // tensor, 7 * D // tensor, 6 * D
    table = head = V * D // tensor
    bias = V // tensor
    vectors = L * (split + whole) + bias + norm
    scalars = 3  # loss, count and how many are right

    def gather(n: int, size: int) -> int:
        return FLOAT * size * (n - 1) // n

    def reduce(n: int, size: int) -> int:
        return 2 * FLOAT * size * (n - 1) // n

    found = []
    if fsdp > 1:
        # Blocks where they are used, forward and backward. The output layer's is kept in between, but XLA gathers it
        # anew for the few positions of mlm on a mesh with tensor.
        heads = 2 if task == "mlm" and tensor > 1 else 1
        found.append(("all-gather", "fsdp", A * gather(fsdp, 2 * L * matrices + table + heads * head)))
    if tensor > 1:
        # Sums after attention and after the feed-forward; backward, one for the feed-forward, and one each for query,
        # key and value, which XLA on a CPU sums up only then. Once for the embedding, once for the output layer.
        found.append(("all-reduce", "tensor", A * reduce(tensor, (6 * L + 1) * b * T * D + N * D)))
        # The loss: the largest logit and its place, the sum of exponentials, the label's logit; never the logits.
        found.append(("all-reduce", "tensor", A * reduce(tensor, 4 * N)))
        # The squares of 8 matrices and 5 biases, for the norm of the gradients.
        found.append(("all-reduce", "tensor", reduce(tensor, 13)))
    # Gradients, after each batch. That of the table of tokens is whole over fsdp, as the table is at the lookup. XLA
    # has no reduce-scatter on a CPU: a matrix is summed up over fsdp as a whole, and then each part over data.
    everywhere = "+".join(name for name, n in (("data", data), ("fsdp", fsdp)) if n > 1)
    found.append(("all-reduce", everywhere, A * reduce(data * fsdp, vectors + scalars + table)))
    if fsdp > 1:
        found.append(("all-reduce", "fsdp", A * reduce(fsdp, L * matrices + head) + reduce(fsdp, 8)))
    if data > 1:
        found.append(("all-reduce", "data", A * reduce(data, (L * matrices + head) // fsdp)))
    return found


def sent(task: str, meshes: list[str]) -> dict[str, list[list[Any]]]:
    """Return the same as `rows`, summed, as the compiled updates have it; in a process with 8 devices."""
    found = {}
    for name in meshes:
        config = settings(task, MESHES[name])
        mesh = parallel.make_mesh(config)
        fresh, compiled = loop.build(config, TASKS[task](config), mesh)
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(fresh),
            compiled.shardings,
        )
        sharding = NamedSharding(mesh, PartitionSpec(None, parallel.BATCH))
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for name, x in batch_of(task, np.random.default_rng(0)).items()
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        program = hlo.parse(compiled.update.lower(state, batch, key).compile().as_text())
        sums: dict[tuple[str, str], int] = defaultdict(int)
        for x in hlo.collectives(program):
            sums[x.kind, "+".join(hlo.axes(x.group, mesh.shape))] += x.n_bytes
        found[name] = [[*key, n] for key, n in sorted(sums.items())]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gpt", "mlm"])
def test_an_update_sends_what_theory_says_and_no_more(task: str) -> None:
    found = run_with_8_devices(f"sent({task!r}, {list(MESHES)})", "jaxlm.cost.hlo_test")
    for mesh in MESHES:
        sums: dict[tuple[str, str], int] = defaultdict(int)
        for kind, axes, n in rows(task, mesh):
            sums[kind, axes] += n
        assert found[mesh] == [[*key, n] for key, n in sorted(sums.items())], mesh


LOOP = """HloModule jit_f, num_partitions=8

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%i, %all-reduce.1)
}

ENTRY %main (x: f32[4,8]) -> (s32[], f32[4,8]) {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %x.1)
  ROOT %while = (s32[], f32[4,8]{1,0}) while(%start), body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[4,2]T(1,0)", (0, 2)),
        ("[2,4]<=[2,2,2]T(2,1,0)", (0, 4, 2, 6)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", (0, 2, 4, 6)),
    ],
)
def test_groups_of_devices_are_read_in_each_form_and_loops_are_counted(groups: str, first: tuple[int, ...]) -> None:
    (found,) = hlo.collectives(hlo.parse(LOOP.replace("GROUPS", groups)))
    assert (found.kind, found.group) == ("all-reduce", first)
    assert found.n_bytes == 5 * 2 * 128 * (len(first) - 1) // len(first)


def test_loops_of_tpus_are_counted_by_their_condition_and_others_are_refused() -> None:
    condition = """
%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n = s32[] constant(9)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}
"""
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    text = (
        LOOP.replace("GROUPS", "[1,8]<=[8]")
        .replace("\n%body", condition + "\n%body")
        .replace("constant(0)", "constant(2)")
    )
    (found,) = hlo.collectives(hlo.parse(text.replace(known, ", condition=%condition")))
    assert found.n_bytes == (9 - 2) * 2 * 128 * 7 // 8
    with pytest.raises(ValueError, match="the loop while runs while .*NE"):
        hlo.parse(text.replace(known, ", condition=%condition").replace("direction=LT", "direction=NE"))


def test_groups_tell_the_axes_that_they_extend_over() -> None:
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    found = [hlo.axes(group, mesh) for group in ((0, 1), (0, 2), (0, 4), (0, 4, 2, 6), tuple(range(8)))]
    assert found == [("tensor",), ("fsdp",), ("data",), ("data", "fsdp"), ("data", "fsdp", "tensor")]


def test_collectives_that_tpus_split_up_or_fuse_are_counted_as_what_they_are() -> None:
    text = """HloModule jit_f

%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2,16}
}

%start (q: bf16[2,16]) -> bf16[8,16] {
  %q = bf16[2,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,16]{1,0} all-gather(%q), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
}

%done (r: bf16[2,16]) -> bf16[8,16] {
  %r = bf16[2,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[8,16]{1,0} all-gather(%r), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (a: f32[8,16], b: bf16[2,16]) -> bf16[8,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = bf16[2,16]{1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = f32[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = bf16[8,16]{1,0} fusion(%b), kind=kCustom, calls=%start
  ROOT %fusion.3 = bf16[8,16]{1,0} fusion(%b), kind=kCustom, calls=%done
}
"""
    found = hlo.collectives(hlo.parse(text))
    assert [(x.kind, x.n_bytes) for x in found] == [("reduce-scatter", 512 * 3 // 4), ("all-gather", 64 * 3)]


def test_traffic_is_what_a_fusion_uses_of_its_operands_in_memory() -> None:
    text = """HloModule jit_f

%fused (p0: f32[5,100], p1: f32[100], p2: f32[5,100]) -> f32[5,100] {
  %p0 = f32[5,100]{1,0} parameter(0)
  %p1 = f32[100]{0:S(1)} parameter(1)
  %p2 = f32[5,100]{1,0} parameter(2)
  %i = s32[] constant(2)
  %slice = f32[1,100]{1,0} dynamic-slice(%p0, %i, %i), dynamic_slice_sizes={1,100}
  %row = f32[1,100]{1,0} bitcast(%p1)
  %sum = f32[1,100]{1,0} add(%slice, %row)
  ROOT %updated = f32[5,100]{1,0} dynamic-update-slice(%p2, %sum, %i, %i)
}

ENTRY %main (a: f32[5,100], b: f32[100]) -> f32[5,100] {
  %a = f32[5,100]{1,0} parameter(0)
  %b = f32[100]{0:S(1)} parameter(1)
  %copy = f32[5,100]{1,0} copy(%a)
  ROOT %fusion = f32[5,100]{1,0} fusion(%a, %b, %copy), kind=kLoop, calls=%fused
}
"""
    # The copy reads and writes all; the fusion reads one row of %a, nothing of %b on the chip, and writes one row.
    assert hlo.traffic(hlo.parse(text)) == 2 * 2000 + 2 * 400


def test_traffic_of_a_compiled_product_is_its_operands_and_its_result() -> None:
    a, b = np.ones((64, 32), np.float32), np.ones((32, 128), np.float32)
    text = jax.jit(lambda a, b: a @ b).lower(a, b).compile().as_text()
    assert hlo.traffic(hlo.parse(text)) == 4 * (64 * 32 + 32 * 128 + 64 * 128)
