"""Engines of a bundle: added, replaced and repaired without harm to the rest, and named by what they are for."""

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import NEW, SPOILT, build_new, content, siblings, spoil
from manifests import ENGINE, example_engine, example_manifest

from moe3d_deploy import bundle as bundle_module
from moe3d_deploy import bundle_files, files
from moe3d_deploy.bundle import Bundle, BundleWriter, add_engine, engine_name
from moe3d_deploy.errors import BundleError, InputError, Moe3dError
from moe3d_deploy.manifest import EngineRecord, Manifest, Profile

pytest_plugins = ["bundle_fixtures"]


def test_an_engine_is_added_beside_the_others_and_one_of_the_same_name_replaced(bundle: Path) -> None:
    other = example_engine("engines/a.plan")
    added = add_engine(bundle, other, build_new)
    assert added == Bundle.open(bundle)
    assert [engine.file for engine in added.manifest.engines] == ["engines/a.plan", ENGINE]
    replaced = add_engine(bundle, replace(example_engine(), precision="bf16"), build_new)
    assert replaced == Bundle.open(bundle)
    assert [engine.precision for engine in replaced.manifest.engines] == ["fp16", "bf16"]
    assert (bundle / ENGINE).read_bytes() == b"new engine"
    assert siblings(bundle) == ["bundle"]


def test_what_is_known_only_after_the_build_goes_into_the_record(bundle: Path) -> None:
    def build(temp: Path, manifest: Manifest) -> EngineRecord:
        build_new(temp, manifest)
        return replace(example_engine(), build={"seconds": 51.5})

    add_engine(bundle, example_engine(), build)
    assert Bundle.open(bundle).manifest.engines[0].build == {"seconds": 51.5}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle: Path, error: type[BaseException]) -> None:
    before = content(bundle)

    def fail(temp: Path, manifest: Manifest) -> None:
        temp.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        add_engine(bundle, example_engine(), fail)
    assert content(bundle) == before
    assert siblings(bundle) == ["bundle"]


def test_an_engine_that_cannot_be_recorded_leaves_the_bundle_as_it_was(bundle: Path) -> None:
    def build_another(temp: Path, manifest: Manifest) -> EngineRecord:
        build_new(temp, manifest)
        return example_engine("engines/other.plan")

    before = content(bundle)
    record = replace(example_engine(), audit={"share": float("nan")})
    with pytest.raises(BundleError, match="not finite"):
        add_engine(bundle, record, build_new)
    with pytest.raises(BundleError, match="is empty; build it again"):
        add_engine(bundle, example_engine(), lambda temp, manifest: temp.touch())
    with pytest.raises(BundleError, match=r"cannot be written: .*No such file.*check its rights or choose"):
        add_engine(bundle, example_engine(), lambda temp, manifest: None)
    with pytest.raises(InputError, match=r"came back as engines/other\.plan; keep its file name"):
        add_engine(bundle, example_engine(), build_another)
    assert content(bundle) == before


def test_no_engine_is_added_to_a_bundle_that_is_missing_damaged_or_being_written(bundle: Path) -> None:
    def never(temp: Path, manifest: Manifest) -> None:
        pytest.fail("the build was started")

    with pytest.raises(BundleError, match="does not exist"):
        add_engine(bundle.parent / "absent" / "bundle", example_engine(), never)
    with BundleWriter(bundle, overwrite=True), pytest.raises(BundleError, match="being written by another process"):
        add_engine(bundle, example_engine(), never)
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        add_engine(bundle, example_engine(), never)


@pytest.mark.parametrize("how", ["no folder", "missing", "cut off"])
def test_an_engine_that_is_gone_does_not_stop_another_and_its_record_goes(bundle: Path, how: str) -> None:
    kept = example_engine("engines/kept.plan")
    if how != "no folder":
        add_engine(bundle, kept, build_new)
    spoil(bundle, how)
    dropped: list[str] = []
    added = add_engine(bundle, example_engine("engines/a.plan"), build_new, on_drop=dropped.append)
    assert dropped == [ENGINE]
    assert added == Bundle.open(bundle)
    expected = ["engines/a.plan"] + (["engines/kept.plan"] if how != "no folder" else [])
    assert [engine.file for engine in added.manifest.engines] == expected
    assert ENGINE not in added.manifest.files


@pytest.mark.parametrize("how", SPOILT)
def test_building_a_spoilt_engine_again_repairs_the_bundle(bundle: Path, how: str) -> None:
    spoil(bundle, how)
    dropped: list[str] = []
    add_engine(bundle, example_engine(), build_new, on_drop=dropped.append)
    assert dropped == []
    assert Bundle.open(bundle).engine_path(example_engine()).read_bytes() == b"new engine"


def test_a_failed_build_drops_no_record(bundle: Path) -> None:
    def fail(temp: Path, manifest: Manifest) -> None:
        raise RuntimeError

    spoil(bundle, "missing")
    before = content(bundle)
    with pytest.raises(RuntimeError):
        add_engine(bundle, example_engine("engines/a.plan"), fail, on_drop=pytest.fail)
    assert content(bundle) == before


def test_the_build_gets_the_manifest_as_it_is_under_the_lock(bundle: Path) -> None:
    seen: list[Manifest] = []

    def build(temp: Path, manifest: Manifest) -> None:
        seen.append(manifest)
        temp.write_bytes(b"engine")

    with BundleWriter(bundle, overwrite=True) as writer:
        (writer.folder / "model.onnx").write_bytes(NEW)
        writer.commit(replace(example_manifest(), precision="fp32"))
    add_engine(bundle, example_engine(), build)
    assert [manifest.precision for manifest in seen] == ["fp32"]


@pytest.mark.parametrize(
    ("low", "best", "high", "capabilities", "builder", "version", "expected"),
    [
        ((1, 1, 392, 518), (1, 4, 392, 518), (1, 8, 392, 518), [89], "tensorrt-rtx", "1.6.1",
         "moe3d-1b_1-4-8x392x518_fp16_sm89_rtx1.6.1.plan"),
        ((1, 2, 140, 518), (1, 2, 392, 518), (1, 2, 518, 518), [89, 80, 86], "tensorrt", "10.16.1.11",
         "moe3d-1b_2x140-392-518x518_fp16_sm80-86-89_trt10.16.1.11.plan"),
        ((1, 1, 140, 140), (1, 2, 392, 518), (2, 8, 518, 518), [120], "tensorrt", "11.1",
         "moe3d-1b_1-1-2x1-2-8x140-392-518x140-518-518_fp16_sm120_trt11.1.plan"),
        ((2, 4, 518, 518), (2, 4, 518, 518), (2, 4, 518, 518), [90], "tensorrt", "11.1",
         "moe3d-1b_2x4x518x518_fp16_sm90_trt11.1.plan"),
    ],
)  # fmt: skip
def test_an_engine_is_named_by_shapes_precision_capabilities_and_builder(
    low: tuple[int, int, int, int],
    best: tuple[int, int, int, int],
    high: tuple[int, int, int, int],
    capabilities: list[int],
    builder: str,
    version: str,
    expected: str,
) -> None:
    assert engine_name("moe3d-1b", Profile(low, best, high), "fp16", capabilities, builder, version) == expected


def test_a_model_name_with_other_characters_still_names_an_engine_of_a_bundle() -> None:
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    name = engine_name("my model/v2", profile, "fp16", [89], "tensorrt", "11.1")
    assert name == "my-model-v2_1x14x14_fp16_sm89_trt11.1.plan"
    example_engine(f"engines/{name}")


def test_an_engine_that_cannot_be_named_is_an_error() -> None:
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    with pytest.raises(InputError, match="builder 'tvm' is unknown; use one of tensorrt, tensorrt-rtx"):
        engine_name("m", profile, "fp16", [89], "tvm", "1")
    with pytest.raises(InputError, match="at least one compute capability"):
        engine_name("m", profile, "fp16", [], "tensorrt", "1")
    with pytest.raises(InputError, match="choose another model name"):
        engine_name("../m", profile, "fp16", [89], "tensorrt", "1")


def test_a_bundle_is_usable_at_the_moment_a_new_engine_has_its_place(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end between the engine's rename and the manifest after it: the record of the old engine is gone by then."""
    replace_file = files.os.replace

    def replace_and_end(source: Path, target: Path) -> None:
        replace_file(source, target)
        if target.suffix == ".plan":
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", replace_and_end)
    with pytest.raises(KeyboardInterrupt):
        add_engine(bundle, example_engine(), build_new)
    assert (bundle / ENGINE).read_bytes() == b"new engine"
    assert Bundle.open(bundle).manifest.engines == ()


def test_adding_an_engine_digests_no_file_but_the_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes of weights, which the next reader digests anyway, and each engine that is there."""
    digested: list[Path] = []
    digest = bundle_files.sha256_file

    def record(path: Path) -> str:
        digested.append(path)
        return digest(path)

    monkeypatch.setattr(bundle_files, "sha256_file", record)
    add_engine(bundle, example_engine("engines/a.plan"), build_new)
    assert [(path.parent, path.suffix) for path in digested] == [(bundle / "engines", ".plan")]
    assert digested[0].name.startswith(".a.partial-")


def test_an_engine_may_lie_in_a_folder_of_its_own(bundle: Path) -> None:
    spoil(bundle, "no folder")
    add_engine(bundle, example_engine("engines/orin/a.plan"), build_new)
    assert Bundle.open(bundle).manifest.engines[0].file == "engines/orin/a.plan"


def test_a_disk_that_fails_while_an_engine_is_added_or_looked_at_is_told_with_the_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(bundle_module, "check_file", fail)
    with pytest.raises(BundleError) as error:
        opened.engine_faults()
    with pytest.raises(BundleError) as checked:
        opened.check()
    assert str(checked.value) == str(error.value)
    expected = f"bundle {bundle} cannot be read: [Errno 5] Input/output error; check its rights or copy it again"
    assert str(error.value) == expected
    monkeypatch.setattr(bundle_module, "read_manifest", fail)
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle)
    assert str(error.value) == expected
    monkeypatch.undo()
    with pytest.raises(Moe3dError) as failed:
        add_engine(bundle, example_engine(), fail)
    expected = f"bundle {bundle} cannot be written: [Errno 5] Input/output error; "
    assert str(failed.value) == expected + "check the disk (see `dmesg`) or choose another place"
    assert failed.value.exit_code == 1


def test_capital_letters_of_a_model_stay_in_the_name_of_its_engine() -> None:
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    assert engine_name("VGGT-1B", profile, "fp16", [89], "tensorrt", "11.1").startswith("VGGT-1B_1x14x14_")


def test_refusals_of_a_name_say_what_to_do() -> None:
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    with pytest.raises(InputError) as error:
        engine_name("m", profile, "fp16", [], "tensorrt", "1")
    assert str(error.value) == "an engine needs at least one compute capability in its name, such as 89"
    with pytest.raises(InputError) as error:
        engine_name("../m", profile, "fp16", [89], "tensorrt", "1")
    assert str(error.value) == (
        "engine name 'engines/..-m_1x14x14_fp16_sm89_trt1.plan' is no file name of a bundle "
        "(ASCII letters, digits and _ . + -); choose another model name, precision or version"
    )
