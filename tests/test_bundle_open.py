"""A bundle is checked before anything reads it: one error per way to be broken."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
from bundles import OLD, SPOILT, edit_manifest, refusal, spoil, write_bundle
from manifests import ENGINE, example_engine

from moe3d_deploy import bundle_files
from moe3d_deploy import manifest as manifest_module
from moe3d_deploy.bundle import Bundle, is_bundle
from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.manifest import MANIFEST_NAME
from moe3d_deploy.strict_json import MAX_BYTES

pytest_plugins = ["bundle_fixtures"]


def test_a_good_bundle_opens_with_its_paths(bundle: Path) -> None:
    for opened in (Bundle.open(bundle), Bundle.open(str(bundle), verify="sizes")):
        assert opened.path == bundle
        assert opened.model_path.read_bytes() == OLD
        assert opened.engine_path(opened.manifest.engines[0]).read_bytes() == b"old engine"
        assert sorted(opened.manifest.files) == [ENGINE, "model.onnx", "model.onnx.data"]


def test_a_bundle_opens_where_it_was_copied_and_through_a_link_to_it(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "current").symlink_to("copy")
    assert Bundle.open(tmp_path / "current").manifest == Bundle.open(bundle).manifest


def test_files_that_the_manifest_does_not_name_are_ignored(bundle: Path) -> None:
    (bundle / "README.md").write_text("notes")
    (bundle / ".DS_Store").write_bytes(b"")
    Bundle.open(bundle)


def test_a_record_of_another_bundle_has_no_path_here(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"engines/other\.plan is no engine of bundle"):
        Bundle.open(bundle).engine_path(example_engine("engines/other.plan"))


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "bundle")


def test_a_file_in_place_of_a_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_bytes(b"")
    assert "is not a folder" in refusal(tmp_path / "bundle")


def test_a_folder_without_a_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    assert "has no manifest.json" in refusal(bundle)


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_a_truncated_manifest_is_refused(bundle: Path, keep: int) -> None:
    file = bundle / MANIFEST_NAME
    file.write_bytes(file.read_bytes().rstrip()[:keep])
    assert "manifest.json is not JSON" in refusal(bundle)


def test_a_manifest_that_is_not_utf8_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).write_bytes(b'{"name": "\xff"}')
    assert "is not UTF-8" in refusal(bundle)


def test_a_huge_manifest_is_refused_unread(bundle: Path) -> None:
    os.truncate(bundle / MANIFEST_NAME, MAX_BYTES + 1)
    assert f"has {MAX_BYTES + 1} bytes" in refusal(bundle)


def test_another_format_version_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, format_version=7)
    with pytest.raises(BundleError, match=r"manifest\.json has format_version 7; .* update moe3d-deploy"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", ENGINE])
@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_a_missing_file_is_refused(bundle: Path, name: str, verify: str) -> None:
    (bundle / name).unlink()
    assert f"{name} is missing" in refusal(bundle, verify)


@pytest.mark.parametrize("verify", ["full", "sizes"])
@pytest.mark.parametrize("size", [0, len(OLD) - 1, len(OLD) + 1])
def test_a_file_of_another_size_is_refused(bundle: Path, size: int, verify: str) -> None:
    os.truncate(bundle / "model.onnx", size)
    assert f"model.onnx has {size} bytes, not {len(OLD)}" in refusal(bundle, verify)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", ENGINE])
def test_one_flipped_bit_is_refused_unless_digests_are_left_out(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    assert f"{name} is damaged" in refusal(bundle)
    Bundle.open(bundle, verify="sizes")


@pytest.mark.parametrize("place", [0, 4, -1])
def test_one_flipped_bit_of_a_large_file_is_found_by_the_digest_of_its_piece(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (manifest_module, bundle_files):
        monkeypatch.setattr(module, "PIECE_BYTES", 3)
    bundle = write_bundle(tmp_path / "large").path
    entry = Bundle.open(bundle).manifest.files["model.onnx"]
    assert [*entry.pieces] == [hashlib.sha256(OLD[i : i + 3]).hexdigest() for i in range(0, len(OLD), 3)]
    assert entry.sha256 == hashlib.sha256(OLD).hexdigest()
    data = bytearray(OLD)
    data[place] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    assert "model.onnx is damaged" in refusal(bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "engines\\model.plan", "engines//a"])
def test_a_name_that_leads_elsewhere_is_refused_before_that_file_is_touched(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_bytes(b"abc")
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    edit_manifest(bundle, files={**files, name: {"size": 3, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match=r"manifest\.json: files: "):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["model.onnx", ENGINE, MANIFEST_NAME])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_link_in_place_of_a_file_is_refused_wherever_it_points(bundle: Path, name: str, where: str) -> None:
    target = (bundle if where == "inside" else bundle.parent) / "target"
    (bundle / name).rename(target)
    (bundle / name).symlink_to(target)
    assert f"{name} is a link" in refusal(bundle)


def test_a_linked_folder_is_refused(bundle: Path) -> None:
    (bundle / "engines").rename(bundle.parent / "engines")
    (bundle / "engines").symlink_to("../engines")
    assert "engines is a link" in refusal(bundle)


def test_a_link_that_the_manifest_does_not_name_is_refused(bundle: Path) -> None:
    (bundle / "engines" / "notes").symlink_to("nowhere")
    assert "notes is a link" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST_NAME, "unnamed"])
def test_a_pipe_is_refused_without_waiting_for_it(bundle: Path, name: str) -> None:
    (bundle / name).unlink(missing_ok=True)
    os.mkfifo(bundle / name)
    assert f"{name} is neither a file nor a folder" in refusal(bundle)


def test_a_folder_that_is_no_bundle_is_called_so_whatever_else_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert "has no manifest.json, so it is not a bundle" in refusal(tmp_path)


def test_a_folder_in_place_of_the_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    (bundle / MANIFEST_NAME).mkdir()
    assert "manifest.json is not a regular file" in refusal(bundle)


def test_a_folder_in_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").mkdir()
    assert "model.onnx is not a regular file" in refusal(bundle)


def test_a_name_too_long_for_the_file_system_is_refused(bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    edit_manifest(bundle, files={**files, "x" * 5000: {"size": 3, "sha256": "0" * 64}})
    assert "cannot be read" in refusal(bundle)


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_engine_does_not_matter_to_a_reader_of_the_onnx_file(bundle: Path, how: str) -> None:
    spoil(bundle, how)
    refusal(bundle)
    opened = Bundle.open(bundle, engines=False)
    assert opened.model_path.read_bytes() == OLD
    remedy = "; copy the bundle again or build the engine again"
    assert opened.engine_faults() == {ENGINE: f"{bundle / ENGINE} {SPOILT[how]}{remedy}"}
    assert (opened.engine_faults("sizes") == {}) == (how == "damaged")


def test_whole_engines_have_no_faults(bundle: Path) -> None:
    assert Bundle.open(bundle).engine_faults() == {}


def test_without_the_engines_their_names_and_the_model_are_still_checked(bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    (bundle / "model.onnx.data").write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError, match=r"model\.onnx\.data is damaged"):
        Bundle.open(bundle, engines=False)
    edit_manifest(bundle, files={**files, "engines/../../a": files[ENGINE]})
    with pytest.raises(BundleError, match="leads out of its folder"):
        Bundle.open(bundle, engines=False)


def test_what_is_to_be_opened_as_a_bundle(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint" / "model.onnx").write_bytes(b"")
    for other in ("checkpoint", "nothing", "x" * 5000):
        assert not is_bundle(tmp_path / other)
    assert not is_bundle("moe3d-tiny")
    assert is_bundle(bundle)
    (bundle / MANIFEST_NAME).rename(bundle / "kept")
    assert is_bundle(str(bundle)), "it has lost its manifest, which Bundle.open says"
    (bundle / MANIFEST_NAME).symlink_to("kept")
    assert is_bundle(bundle), "its manifest is a link, which Bundle.open says"
    bundle.rename(bundle.with_name(".bundle.old-0123456789abcdef"))
    assert is_bundle(bundle), "it was moved aside, which Bundle.open says"


def external(location: str) -> bytes:
    """An ONNX file with one tensor whose values lie at `location`."""
    tensor = onnx.TensorProto(name="w", dims=[1], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value=location)
    return onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString()


@pytest.mark.parametrize("verify", ["full", "sizes"])
@pytest.mark.parametrize(
    "location", ["stowaway", "./model.onnx.data", "../outside", "/etc/passwd", "", "manifest.json"]
)
def test_weights_in_a_file_that_the_manifest_does_not_name_are_refused(
    bundle: Path, location: str, verify: str
) -> None:
    (bundle / "stowaway").write_bytes(b"1234")
    write = external(location)
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    (bundle / "model.onnx").write_bytes(write)
    entry = {"size": len(write), "sha256": hashlib.sha256(write).hexdigest()}
    edit_manifest(bundle, files={**files, "model.onnx": entry})
    assert f"model.onnx has weights in {location!r}, which is not among the manifest's files" in refusal(bundle, verify)


def test_weights_are_looked_for_before_a_bundle_is_committed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "good", external("model.onnx.data"))
    assert Bundle.open(tmp_path / "good")
    with pytest.raises(BundleError, match=r"model\.onnx has weights in 'other\.data'"):
        write_bundle(tmp_path / "bad", external("other.data"))
    with pytest.raises(BundleError, match=r"model\.onnx is not an ONNX file: it ends too early"):
        write_bundle(tmp_path / "bad", b"\x12\x7fcut off")
    assert not (tmp_path / "bad").exists()


def test_an_unknown_way_to_verify_is_an_error(bundle: Path) -> None:
    with pytest.raises(InputError, match="verify is 'none'; use 'full' or 'sizes'"):
        Bundle.open(bundle, verify="none")  # type: ignore[arg-type]


def test_a_check_is_of_everything_unless_less_is_asked_for(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    spoil(bundle, "damaged")
    with pytest.raises(BundleError, match=r"\.plan is damaged"):
        opened.check()
    with pytest.raises(BundleError, match=r"\.plan is damaged"):
        opened.check(engines=True)
    opened.check(verify="sizes")
    opened.check(engines=False)


def test_a_manifest_of_the_largest_size_is_read_and_of_one_byte_more_is_not(bundle: Path) -> None:
    file = bundle / MANIFEST_NAME
    file.write_bytes(file.read_bytes().ljust(MAX_BYTES))
    Bundle.open(bundle)
    file.write_bytes(file.read_bytes() + b" ")
    assert f"has {MAX_BYTES + 1} bytes, more than {MAX_BYTES}; copy the bundle again" in refusal(bundle)


def test_a_bundle_that_was_moved_aside_is_found_under_its_hidden_name(bundle: Path) -> None:
    aside = bundle.with_name(".bundle.old-0123456789abcdef")
    bundle.rename(aside)
    assert refusal(bundle) == (f"bundle {bundle} was moved aside for a new one that did not come; rename {aside} to it")


def test_only_an_engine_can_be_built_again(bundle: Path) -> None:
    (bundle / "model.onnx.data").unlink()
    assert refusal(bundle) == f"{bundle / 'model.onnx.data'} is missing; copy the bundle again"
    (bundle / ENGINE).unlink()  # comes before it in the manifest
    assert refusal(bundle) == f"{bundle / ENGINE} is missing; copy the bundle again or build the engine again"


def test_a_long_place_of_weights_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as error:
        write_bundle(tmp_path / "bundle", external("a" * 200))
    assert f"has weights in '{'a' * 79}, which is not among the manifest's files" in str(error.value)
