"""Plans: memory, floors, limits that a shape crosses, and the search for what fits. Memory is a stand-in, by hand."""

import dataclasses

import pytest

from moe3d_deploy import costs, memory, planning
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.costs import Shape4
from moe3d_deploy.devices import DEVICES, Device
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.precision import PRECISIONS, PrecisionPolicy
from moe3d_deploy.manifest import Range, ShapeRanges
from moe3d_deploy.planning import Setup

VGGT = dataclasses.replace(PRESETS["vggt-1b"], point_head=False)
MOE3D = dataclasses.replace(PRESETS["moe3d-1b"], point_head=False)
PIXEL = 100  # bytes of activations that the stand-in counts; twice as many in fp32
CHUNKED = 300  # the same of the dense heads, on as many views as they take at a time


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def activation_bytes(
        config: ModelConfig, shape: Shape4, *, form: str, precision: str, view_chunk: int | None = None
    ) -> int:
        batch, views, height, width = shape
        images = batch * views
        in_heads = min(images, view_chunk or images)
        wide = 2 if precision == "fp32" else 1
        return wide * height * width * (images * PIXEL + in_heads * CHUNKED)

    monkeypatch.setattr(memory, "activation_bytes", activation_bytes)


def setup(
    config: ModelConfig = MOE3D, precision: str = "fp16", form: str = "fused", free: float | None = None, **more: object
) -> Setup:
    """With `free`, on a device with that much memory beside the weights."""
    rule = PrecisionPolicy(precision).type_of
    device = None
    if free is not None:
        rates = dict.fromkeys(costs.BYTES, 1e12)
        device = Device("d", "a device", rates, 1e11, costs.weight_bytes(config, rule) + free, "by hand")
    return Setup(config, precision, rule, form, device, **more)  # type: ignore[arg-type]


def test_a_plan_without_a_device_has_work_and_memory_alone() -> None:
    found = planning.plan(setup(), (1, 2, 518, 518))
    assert found.flops == costs.total_flops(MOE3D, 2, 518, 518)
    assert found.expert_share == pytest.approx(0.0224, abs=5e-5)
    assert found.weight_bytes == 2_752_288_952
    assert found.activation_bytes == 2 * 518 * 518 * (PIXEL + CHUNKED)
    assert found.peak_bytes == found.weight_bytes + found.activation_bytes
    assert (found.floor, found.fits, found.warnings) == (None, None, ())


def test_the_compute_floor_is_each_types_work_at_its_own_peak() -> None:
    found = planning.plan(dataclasses.replace(setup(), device=DEVICES["h100"]), (1, 2, 518, 518))
    assert found.floor is not None
    in_float32 = costs.flops(MOE3D, 1, 2, 518, 518)["camera head"] + 2 * 2 * 518 * 518 * (4 * 32 * 2 + 32 * 4)
    in_float16 = costs.total_flops(MOE3D, 2, 518, 518) - in_float32
    assert found.floor.compute == pytest.approx(in_float32 / 67e12 + in_float16 / 989.5e12)
    assert found.floor.memory == pytest.approx(found.traffic_bytes / 3350e9)
    assert found.floor.bound == "compute"


def test_the_floor_is_bound_by_what_takes_longer() -> None:
    slow_memory = Device("d", "a device", dict.fromkeys(costs.BYTES, 1e15), 1e9, 1e12, "by hand")
    found = planning.plan(dataclasses.replace(setup(), device=slow_memory), (1, 1, 14, 14))
    assert found.floor is not None
    assert found.floor.bound == "memory"


def test_a_run_fits_up_to_the_last_byte() -> None:
    shape = (1, 1, 14, 14)
    exact = 14 * 14 * (PIXEL + CHUNKED)
    assert planning.plan(setup(free=exact), shape).fits is True
    assert planning.plan(setup(free=exact - 1), shape).fits is False


def test_the_most_views_that_fit_are_found() -> None:
    of_a_view = 28 * 42 * (PIXEL + CHUNKED)
    assert planning.largest_views(setup(free=7 * of_a_view), (1, 1, 28, 42)) == 7
    assert planning.largest_views(setup(free=7 * of_a_view - 1), (1, 1, 28, 42)) == 6
    assert planning.largest_views(setup(free=7 * of_a_view), (2, 1, 28, 42)) == 3
    assert planning.largest_views(setup(free=of_a_view - 1), (1, 1, 28, 42)) == 0
    assert planning.largest_views(setup(free=1e15), (1, 1, 28, 42)) == planning.MOST_VIEWS


def test_each_change_fits_and_the_next_larger_one_does_not() -> None:
    """2 scenes of 6 views of 5x10 patches, where 25 images' worth of 1x1 patch fits beside the weights."""
    shape = (2, 6, 70, 140)
    of_a_patch = 14 * 14 * (PIXEL + CHUNKED)
    of_a_view = 50 * of_a_patch
    tight = setup(free=5 * of_a_view)
    found = {change.kind: change for change in planning.changes_that_fit(tight, shape)}
    assert {kind: change.shape for kind, change in found.items()} == {
        "views": (2, 2, 70, 140),  # 4 images; 2 x 3 are more than 5
        # 12 views of 2x4 patches are 96 of 250; of 3x6, 216; of 4x8, 384
        "size": (2, 6, 42, 84),
    }
    assert found["views"].peak_bytes == tight.weight_bytes + 4 * of_a_view
    roomy = setup(free=6 * of_a_view)
    assert {c.kind: c.shape for c in planning.changes_that_fit(roomy, shape)}["batch"] == (1, 6, 70, 140)


def test_a_precision_that_fits_is_among_the_changes() -> None:
    shape = (1, 4, 70, 140)
    wide = setup(precision="fp32", free=4 * 70 * 140 * (PIXEL + CHUNKED))  # half of what fp32 needs
    others = [dataclasses.replace(setup(precision=p), device=wide.device) for p in PRECISIONS]
    found = [c for c in planning.changes_that_fit(wide, shape, others) if c.kind == "precision"]
    assert [change.precision for change in found] == [p for p in PRECISIONS if p != "fp32"]
    assert all(change.shape == shape for change in found)
    assert found[0].peak_bytes == 2_752_288_952 + 4 * 70 * 140 * (PIXEL + CHUNKED)


def test_heads_in_chunks_are_a_change_in_pytorch_alone() -> None:
    """8 views take 8 x 100 and, with chunks of n, n x 300 a pixel; 1700 a pixel hold n = 3."""
    shape, pixels = (1, 8, 28, 28), 28 * 28
    rule = PrecisionPolicy("fp16").type_of
    room = costs.weight_bytes(MOE3D, rule) + 1700 * pixels
    device = Device("d", "a device", dict.fromkeys(costs.BYTES, 1e12), 1e11, room, "by hand")
    eager = Setup(MOE3D, "fp16", rule, "eager", device)
    found = {change.kind: change for change in planning.changes_that_fit(eager, shape)}
    assert found["view_chunk"].view_chunk == 3
    assert found["view_chunk"].shape == shape
    fused = dataclasses.replace(eager, form="fused")
    assert "view_chunk" not in {change.kind for change in planning.changes_that_fit(fused, shape)}
    with pytest.raises(InputError, match="in PyTorch and in a split model only"):
        dataclasses.replace(fused, view_chunk=3)


def test_nothing_changes_where_the_weights_alone_are_too_big() -> None:
    assert planning.changes_that_fit(setup(free=-1), (2, 2, 28, 28)) == []


@pytest.mark.parametrize(
    ("config", "views", "crosses"),
    [
        (MOE3D, 50, False),
        (MOE3D, 51, True),
        (dataclasses.replace(MOE3D, moe=MoeConfig(num_experts=8)), 27, False),
        (dataclasses.replace(MOE3D, moe=MoeConfig(num_experts=8)), 28, True),
        (VGGT, 62, False),  # 128 channels x 518 x 518 x 62 = 2.129e9
        (VGGT, 63, True),
    ],
)
def test_a_convolution_beyond_2_to_the_31_is_told(config: ModelConfig, views: int, crosses: bool) -> None:
    warnings = planning.plan(setup(config, "bf16"), (1, views, 518, 518)).warnings
    assert any("2^31 - 1" in warning for warning in warnings) == crosses
    if crosses:
        most = {MOE3D: 50, VGGT: 62}.get(config, 27)
        assert f"{most} views in all stay below" in warnings[0]


def test_plain_experts_have_no_such_wide_map() -> None:
    plain = dataclasses.replace(setup(precision="bf16"), merged=False)
    assert planning.plan(plain, (1, 62, 518, 518)).warnings == ()
    assert planning.plan(plain, (1, 63, 518, 518)).warnings != ()


@pytest.mark.parametrize(("views", "crosses"), [(47, False), (48, True)])
def test_more_than_65504_keys_in_half_are_told(views: int, crosses: bool) -> None:
    """1,374 tokens a view of 518x518."""
    found = planning.plan(setup(), (1, views, 518, 518)).warnings
    assert found == (
        (
            "global attention has 65,952 keys; a fused kernel that sums its softmax in float16 overflows past 65,504, "
            "which 47 views stay below: verify such a run on the device",
        )
        if crosses
        else ()
    )
    assert planning.plan(setup(precision="fp32"), (1, views, 518, 518)).warnings == ()


def test_keys_are_those_of_one_scene() -> None:
    assert planning.plan(setup(), (2, 24, 518, 518)).warnings == ()


def test_pytorch_has_neither_limit() -> None:
    assert planning.plan(setup(form="eager"), (1, 80, 518, 518)).warnings == ()


def test_a_type_that_the_device_does_not_compute_is_refused() -> None:
    with pytest.raises(InputError, match="device t4 computes no bfloat16, which bf16 needs; change one of them"):
        dataclasses.replace(setup(precision="bf16"), device=DEVICES["t4"])


def test_products_in_8_bits_are_planned_on_a_cpu_and_attention_in_float32() -> None:
    with pytest.raises(InputError, match="device l4 computes no int8, which int8 needs; change one of them"):
        dataclasses.replace(setup(precision="int8"), device=DEVICES["l4"])
    shape, rule = (1, 2, 392, 518), PrecisionPolicy("int8").type_of
    work = costs.flops(MOE3D, *shape)
    products = sum(work[f"{part} linear"] for part in ("encoder", "frame", "global"))
    assert costs.flops_by_type(MOE3D, shape, rule) == {"int8": products, "float32": sum(work.values()) - products}
    nowhere_said = dataclasses.replace(setup(precision="int8"), form=planning.usual_form(rule, None))
    assert (nowhere_said.form, nowhere_said.on_cpu) == ("fused", True)


def test_the_usual_form_follows_the_attentions_type_and_the_device() -> None:
    cpu = Device("cpu", "a CPU", {"float32": 1e11}, 1e10, 1e10, "by hand")
    half, full = (PrecisionPolicy(precision).type_of for precision in ("fp16", "fp32"))
    assert planning.usual_form(half, DEVICES["l4"]) == planning.usual_form(half, None) == "fused"
    assert planning.usual_form(full, cpu) == planning.usual_form(half, cpu) == "fused"
    assert planning.usual_form(full, DEVICES["l4"]) == planning.usual_form(full, None) == "explicit"


def test_usual_shapes_are_518x392_pictures_in_the_models_own_size() -> None:
    assert planning.usual_shapes(MOE3D) == [(1, views, 392, 518) for views in (1, 2, 4, 8, 16)]
    # 224 x 392 / 518 = 169.5 pixels, 24.2 patches of 7
    assert planning.usual_shapes(PRESETS["moe3d-tiny"])[0] == (1, 1, 168, 224)


def test_a_shape_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(InputError, match="nearest: 378 and 392"):
        planning.plan(setup(), (1, 8, 390, 518))


def test_what_fits_is_a_question_about_a_device() -> None:
    with pytest.raises(InputError, match="name one"):
        planning.largest_views(setup(), (1, 1, 14, 14))


def test_changes_keep_to_the_shapes_that_the_file_takes() -> None:
    """Views 1, 4 or 7; heights of 28, 70, 112 or 154 pixels, any width; one scene or three."""
    of_a_patch = 14 * 14 * (PIXEL + CHUNKED)
    pixels = Range(28, 154, 42)
    ranges = ShapeRanges(Range(1, 3, 2), Range(1, 7, 3), pixels, Range(14, None, 14))
    tight = setup(free=6 * 50 * of_a_patch, ranges=ranges)  # 6 views of 5 x 10 patches
    assert tight.takes((3, 7, 70, 140))
    assert not any(tight.takes(shape) for shape in ((2, 7, 70, 140), (3, 6, 70, 140), (3, 7, 84, 140), (3, 10, 70, 14)))
    assert planning.largest_views(tight, (1, 1, 70, 140)) == 4
    found = {change.kind: change.shape for change in planning.changes_that_fit(tight, (3, 7, 70, 140))}
    assert found == {"views": (3, 1, 70, 140), "size": (3, 7, 28, 56)}  # 3 x 4 and 1 x 7 views are more than 6
    # Nothing of a shape with 6 views in it is offered but other views.
    assert [c.kind for c in planning.changes_that_fit(tight, (3, 6, 70, 140))] == ["views"]


def test_on_a_cpu_activations_are_float32_and_the_engines_limits_do_not_hold() -> None:
    cpu = Device("cpu", "a CPU", {"float32": 1e11, "float16": 1e11}, 1e10, 1e13, "by hand")
    half = dataclasses.replace(setup(form="explicit"), device=cpu)
    found = planning.plan(half, (1, 64, 518, 518))
    assert found.weight_bytes == 2_752_288_952
    assert found.activation_bytes == 2 * 64 * 518 * 518 * (PIXEL + CHUNKED)
    assert found.warnings == ()
