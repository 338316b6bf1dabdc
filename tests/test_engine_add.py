"""Adding an engine to a bundle: what is built and recorded, and that nothing enters which fails its audit."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from plugin_files import plugin_file

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.engines import add
from moe3d_deploy.engines.add import add_built_engine
from moe3d_deploy.engines.cache import EngineCache
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.manifest import MANIFEST_NAME, Profile

pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'moe3d-deploy[rtx]'")
exports = pytest.importorskip("exports", reason="exports a model: pip install 'moe3d-deploy[export]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")

SHAPES = ShapeProfile.from_ranges(views="1:2:3", height="28:42", width="42")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A copy of the small fp16 bundle: 3 blocks, merged experts."""
    return Bundle.open(shutil.copytree(exports.bundle().path, tmp_path / "small"))


def pretend(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle on the disk says something else of itself."""
    manifest = dataclasses.replace(Bundle.open(bundle.path).manifest, **changes)
    (bundle.path / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle.open(bundle.path)


def test_an_audited_engine_enters_the_bundle(bundle: Bundle) -> None:
    after, record = add_built_engine(bundle, "tensorrt-rtx", SHAPES, compute_capabilities=[(8, 9)])
    assert record.file.startswith("engines/small_1-2-3x28-42-42x42_fp16_sm89_rtx")
    assert record.compute_capabilities == (89,)
    assert record.profiles == (Profile((1, 1, 28, 42), (1, 2, 42, 42), (1, 3, 42, 42)),)
    assert record.plugin is None
    assert record.build["plan_bytes"] == after.engine_path(record).stat().st_size
    # Compiled for real: one block in the encoder and two in the aggregator.
    assert record.audit["summary"].startswith("fp16 matmuls 18 of ")
    assert record.audit["summary"].endswith(
        ", convolutions 32 of 32, ExpertMix as function, attention fused 3 of 3, not executed"
    )
    assert record.audit["expert_mix"] == "function"
    (profile,) = record.audit["plan"]["profiles"]
    assert profile["shape"] == [1, 3, 42, 42]
    assert profile["activation_bytes"]["found"] == record.audit["activation_memory_bytes"][0] > 0
    assert record.audit["plan"]["plan_bytes"]["found"] == record.build["plan_bytes"]
    assert Bundle.open(bundle.path).manifest.engines == (record,)


def test_an_engine_that_is_not_what_the_bundle_promises_stays_out(bundle: Bundle) -> None:
    promised = pretend(bundle, precision="fp32")
    with pytest.raises(EngineError, match=r"^the engine of small is not the fp32 engine .* the network has 18 fp16, "):
        add_built_engine(promised, "tensorrt-rtx", SHAPES, compute_capabilities=[(8, 9)])
    assert Bundle.open(bundle.path).manifest == promised.manifest
    assert [path for path in (bundle.path / "engines").iterdir() if not path.name.startswith(".")] == []


# Around the build, which is not run


class Builds:
    """Stands in for the build: writes a few bytes and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.fail: BaseException | None = None
        self.matmuls = 18
        self.version = "1.7.1.116"
        self.plugin: dict[str, Any] | None = None

    def __call__(self, onnx: Path, out: Path, shapes: tuple[ShapeProfile, ...], **options: Any) -> dict[str, Any]:
        self.asked.append(options | {"shapes": shapes})
        options["log_path"].write_text("a line of the builder's\n")
        if self.fail:
            raise self.fail
        out.write_bytes(b"plan")
        capabilities = [10 * major + minor for major, minor in options["compute_capabilities"]]
        products = {"fp16": self.matmuls, "fp32": 24}
        plugins, functions = (tuple(self.plugin["layers"]), {}) if self.plugin else ((), {"ExpertMix": 1})
        network = trt.NetworkFacts(True, {}, products, {"fp16": 32}, {}, plugins, functions)
        audit = {
            "tf32": False,
            "network": dataclasses.asdict(network),
            "compiled": {"layers": {}, "fused_attention": 3},
            "activation_memory_bytes": [1],
            "executed": False,
        }
        return {
            "builder_version": self.version,
            "compute_capabilities": capabilities,
            "plugin": self.plugin,
            "audit": audit,
            "build": {"seconds": 1.0, "plan_bytes": 4},
        }


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    stand_in = Builds()
    monkeypatch.setattr(add, "build", stand_in)
    return stand_in


def test_targets_and_workspace_reach_the_builder(bundle: Bundle, builds: Builds) -> None:
    _, record = add_built_engine(
        bundle,
        "tensorrt-rtx",
        SHAPES,
        compute_capabilities=[(12, 0), (8, 6), (8, 6)],
        flags=trt.BuildFlags(workspace_bytes=1 << 30),
    )
    assert builds.asked[0]["compute_capabilities"] == ((12, 0), (8, 6))
    assert builds.asked[0]["flags"] == trt.BuildFlags(workspace_bytes=1 << 30)
    assert "_sm86-120_rtx" in record.file


def test_without_targets_the_builders_default_is_built(bundle: Bundle, builds: Builds) -> None:
    _, record = add_built_engine(bundle, "tensorrt-rtx", SHAPES)
    assert builds.asked[0]["compute_capabilities"] == trt.RTX_CAPABILITIES
    assert builds.asked[0]["flags"] == trt.BuildFlags()
    assert "_sm80-86-89-120_rtx" in record.file


def test_no_target_at_all_is_refused(bundle: Bundle, builds: Builds) -> None:
    with pytest.raises(InputError, match="at least one compute capability"):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, compute_capabilities=[])
    assert builds.asked == []


def test_a_precision_that_no_audit_knows_is_refused_before_the_build(bundle: Bundle, builds: Builds) -> None:
    with pytest.raises(EngineError, match="no audit knows precision 'int8'"):
        add_built_engine(pretend(bundle, precision="int8"), "tensorrt-rtx", SHAPES)
    assert builds.asked == []


def test_name_and_precision_are_of_the_bundle_as_it_is_now(bundle: Bundle, builds: Builds) -> None:
    """`bundle` was opened before its manifest changed."""
    now = pretend(bundle, name="renamed")
    after, record = add_built_engine(bundle, "tensorrt-rtx", SHAPES)
    assert record.file.startswith("engines/renamed_")
    assert after.manifest.name == now.manifest.name


def test_a_bundle_replaced_before_the_lock_is_taken_is_refused(
    bundle: Bundle, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = add._plan

    def plan(*arguments: Any, **options: Any) -> Any:
        planned = before(*arguments, **options)
        pretend(bundle, name="another")
        return planned

    monkeypatch.setattr(add, "_plan", plan)
    with pytest.raises(EngineError, match="small was replaced by another meanwhile; build its engine again"):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES)
    assert builds.asked == []
    assert Bundle.open(bundle.path).manifest.engines == ()


def test_engines_for_other_targets_stand_side_by_side(bundle: Bundle, builds: Builds) -> None:
    _, first = add_built_engine(bundle, "tensorrt-rtx", SHAPES, compute_capabilities=[(8, 9)])
    after, second = add_built_engine(bundle, "tensorrt-rtx", SHAPES, compute_capabilities=[(8, 6)])
    assert after.manifest.engines == (second, first)


def test_several_profiles_are_one_engine_with_all_in_its_name(bundle: Bundle, builds: Builds) -> None:
    many = ShapeProfile.from_ranges(batch="1:2", views="4", height="42", width="42")
    _, record = add_built_engine(bundle, "tensorrt-rtx", [SHAPES, many], compute_capabilities=[(8, 9)])
    assert builds.asked[0]["shapes"] == (SHAPES, many)
    assert record.file.startswith("engines/small_1-2-3x28-42-42x42+1-2-2x4x42x42_fp16_sm89_rtx")
    assert record.profiles == (
        Profile((1, 1, 28, 42), (1, 2, 42, 42), (1, 3, 42, 42)),
        Profile((1, 4, 42, 42), (2, 4, 42, 42), (2, 4, 42, 42)),
    )


def test_profiles_that_make_no_file_name_are_refused(bundle: Bundle, builds: Builds) -> None:
    sizes = [f"{14 * low}:{14 * (low + 1)}:{14 * 100}" for low in range(80, 88)]
    many = [ShapeProfile.from_ranges(batch="1:2:3", views="1:2:3", height=size, width=size) for size in sizes]
    with pytest.raises(InputError, match=r"^8 profiles make a file name of \d+ characters: build several$"):
        add_built_engine(bundle, "tensorrt-rtx", many)
    assert builds.asked == []


def test_what_the_builder_does_not_have_is_refused_before_the_build(bundle: Bundle, builds: Builds) -> None:
    with pytest.raises(InputError, match="^--version-compatible: no TensorRT-RTX has it, TensorRT 8.6 or newer does"):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, flags=trt.BuildFlags(version_compatible=True))
    with pytest.raises(InputError, match="^--target sm90: "):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, compute_capabilities=[(9, 0)])
    assert builds.asked == []


# What may stand, and the plugin


def test_a_finding_that_is_accepted_enters_the_bundle_with_the_engine(
    bundle: Bundle, builds: Builds, tmp_path: Path
) -> None:
    cache, builds.matmuls = EngineCache(tmp_path / "cache"), 17
    with pytest.raises(InputError, match="^--accept types: the audit has no such finding"):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, accept=["types"])
    assert builds.asked == []
    with pytest.raises(EngineError, match="or let it stand: --accept matmul-types$"):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, accept=["attention"])
    add_built_engine(bundle, "tensorrt-rtx", SHAPES, accept=["matmul-types"], cache=cache)
    (record,) = Bundle.open(bundle.path).manifest.engines
    (finding,) = record.audit["findings"]
    assert (finding["name"], finding["accepted"]) == ("matmul-types", True)
    assert finding["text"].startswith("fp16 asks for 18 fp16 matmuls and the others in fp32, the network has 17 fp16")
    assert trt.rebuild_command("b", record).endswith(" --accept matmul-types")
    with pytest.raises(EngineError, match="or let it stand: --accept matmul-types$"):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache)  # its kept copy is audited for this request


def test_an_engine_with_the_plugin_lies_beside_the_one_without(
    bundle: Bundle, builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "available", lambda: {"tensorrt": "10.16.1.11"})
    monkeypatch.setattr(trt, "target_capabilities", lambda *_: ((8, 9),))
    config = bundle.manifest.model_config
    moe = config["moe"] | {"hidden_channels": 8, "gate_hidden_channels": 8}  # the least that the plugin takes
    bundle = pretend(bundle, model_config=config | {"moe": moe})
    library = trt.PluginLibrary.of(plugin_file(tmp_path / "libmoe3d_plugin_trt10.so"))
    builds.version = "10.16.1.11"
    _, plain = add_built_engine(bundle, "tensorrt", SHAPES)
    with pytest.raises(EngineError, match="takes the plugin of ExpertMix with a plugin library, the network has the f"):
        add_built_engine(bundle, "tensorrt", SHAPES, plugin=library)
    needs = {"layers": ["ExpertMix"], "library": library.path.name, "sha256": library.sha256}
    builds.plugin = needs
    after, record = add_built_engine(bundle, "tensorrt", SHAPES, plugin=library)
    assert builds.asked[-1]["plugin"] == library
    assert record.file == plain.file.removesuffix(".plan") + "+plugin.plan"
    assert (record.plugin, record.audit["expert_mix"]) == (needs, "plugin")
    assert {engine.file for engine in after.manifest.engines} == {plain.file, record.file}
    with pytest.raises(InputError, match="^--plugin: it mixes merged experts, and this model has experts that are not"):
        add_built_engine(pretend(bundle, merged_experts=False), "tensorrt", SHAPES, plugin=library)


# The log


def engines(bundle: Bundle) -> list[str]:
    return sorted(path.name for path in (bundle.path / "engines").iterdir())


def test_the_builders_messages_lie_beside_the_engine(bundle: Bundle, builds: Builds) -> None:
    _, record = add_built_engine(bundle, "tensorrt-rtx", SHAPES)
    stem = Path(record.file).stem
    assert engines(bundle) == [f"{stem}.log", f"{stem}.plan"]
    assert (bundle.path / "engines" / f"{stem}.log").read_text() == "a line of the builder's\n"
    Bundle.open(bundle.path)


@pytest.mark.parametrize("error", [EngineError("the builder was killed"), KeyboardInterrupt()])
def test_a_failed_build_leaves_its_messages_in_the_cache(
    error: BaseException, bundle: Bundle, builds: Builds, tmp_path: Path
) -> None:
    cache, builds.fail = EngineCache(tmp_path / "cache"), error
    with pytest.raises(type(error)) as caught:
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache)
    assert engines(bundle) == []
    logs = list(cache.folder.iterdir())
    if isinstance(error, KeyboardInterrupt):
        assert logs == []
    else:
        assert str(caught.value) == f"the builder was killed; the builder's messages are in {logs[0]}"
        assert [log.read_text() for log in logs] == ["a line of the builder's\n"]


# The cache


def test_an_engine_is_built_once_for_two_bundles_of_one_model(bundle: Bundle, builds: Builds, tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))
    _, built = add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache)
    after, taken = add_built_engine(pretend(copy, name="copy"), "tensorrt-rtx", SHAPES, cache=cache)
    assert len(builds.asked) == 1
    assert (built.build["from_cache"], taken.build["from_cache"]) == (False, True)
    assert taken.audit == built.audit
    assert taken.file.startswith("engines/copy_")
    assert after.engine_path(taken).read_bytes() == b"plan"
    assert engines(copy) == [f"{Path(taken.file).stem}.log", Path(taken.file).name]
    Bundle.open(copy.path)

    add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache, flags=trt.BuildFlags(optimization_level=1))
    add_built_engine(bundle, "tensorrt-rtx", SHAPES)
    assert len(builds.asked) == 3, "other flags are another engine, and without a cache it is built"


def test_a_damaged_engine_of_the_cache_is_built_again(bundle: Bundle, builds: Builds, tmp_path: Path) -> None:
    notes: list[str] = []
    cache = EngineCache(tmp_path / "cache", on_note=notes.append)
    add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache)
    (plan,) = cache.folder.glob("*/engine.plan")
    plan.write_bytes(b"plam")
    after, record = add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache)
    assert len(builds.asked) == 2
    assert notes == ["the cached engine is damaged: building it again"]
    assert not record.build["from_cache"]
    assert after.engine_path(record).read_bytes() == b"plan" == plan.read_bytes()


def test_an_engine_that_fails_its_audit_is_not_kept(bundle: Bundle, builds: Builds, tmp_path: Path) -> None:
    cache, builds.matmuls = EngineCache(tmp_path / "cache"), 17
    with pytest.raises(EngineError, match="is not the fp16 engine that its bundle promises"):
        add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache)
    assert [path.suffix for path in cache.folder.iterdir()] == [".log"]
    assert engines(bundle) == []


def test_an_engine_of_the_cache_is_audited_too(bundle: Bundle, builds: Builds, tmp_path: Path) -> None:
    """The same ONNX file in a bundle that promises something else."""
    cache = EngineCache(tmp_path / "cache")
    add_built_engine(bundle, "tensorrt-rtx", SHAPES, cache=cache)
    promised = pretend(Bundle.open(shutil.copytree(exports.bundle().path, tmp_path / "other")), precision="fp32")
    with pytest.raises(EngineError, match="is not the fp32 engine that its bundle promises"):
        add_built_engine(promised, "tensorrt-rtx", SHAPES, cache=cache)
    assert len(builds.asked) == 1
    assert engines(promised) == []
