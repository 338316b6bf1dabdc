"""What of a bundle can run on a machine, every reason why the rest cannot, and what to do about each."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import build_new, edit_manifest, spoil, write_bundle
from manifests import ENGINE, example_engine

from moe3d_deploy import doctor_bundles
from moe3d_deploy.bundle import add_engine
from moe3d_deploy.doctor_bundles import examine_bundle
from moe3d_deploy.manifest import EngineRecord

LIBRARIES: dict[str, Any] = {
    "onnxruntime": {"installed": True, "version": "1.31.1", "fault": None, "providers": ["CPUExecutionProvider"]},
    "tensorrt": {"installed": False, "version": None, "fault": "is not installed"},
    "tensorrt_rtx": {"installed": True, "version": "1.6.1", "fault": None},
}
CARD = {"name": "Test Card", "compute_capability": "8.9", "memory_bytes": 24 << 30}
CUDA: dict[str, Any] = {"driver": "working", "fault": None, "api": "13.0", "version": "580", "gpus": [CARD]}
NO_CUDA: dict[str, Any] = {"driver": "absent", "fault": None, "api": None, "version": None, "gpus": []}
GIB = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A bundle with an engine of TensorRT-RTX 1.6.1 for compute capability 8.9 that needs no plugin."""
    write_bundle(tmp_path / "bundle")
    add(tmp_path / "bundle", replace(example_engine(), plugin=None))
    return str(tmp_path / "bundle")


def add(path: Path | str, engine: EngineRecord) -> None:
    add_engine(path, engine, build_new)


def reasons(part: dict[str, Any]) -> list[tuple[str, str]]:
    assert part["runs"] is not bool(part["reasons"])
    return [(reason["why"], reason["remedy"]) for reason in part["reasons"]]


def rebuild(path: Path | str, builder: str = "tensorrt-rtx") -> str:
    """The command for the engine's own profile."""
    return f"moe3d-export {path} --builder {builder} --views 1:4:8 --height 392 --width 518"


def engine_reasons(path: str, libraries: dict[str, Any] = LIBRARIES, cuda: dict[str, Any] = CUDA) -> list[Any]:
    (engine,) = examine_bundle(path, libraries, cuda, GIB)["engines"]
    return reasons(engine)


def test_nothing_speaks_against_a_bundle_on_the_machine_it_is_for(path: str) -> None:
    found = examine_bundle(path, LIBRARIES, CUDA, GIB)
    assert found["fault"] is None
    assert reasons(found["model"]) == reasons(found["engines"][0]) == []
    assert found["problems"] == []
    assert (found["name"], found["precision"], found["input"]) == ("moe3d-tiny", "fp16", "float32")
    assert found["weight_bytes"] == 11 + len(b"weights")  # model.onnx and model.onnx.data, without the engine


def test_a_missing_bundle_is_an_error_and_no_end(tmp_path: Path) -> None:
    found = examine_bundle(str(tmp_path / "absent"), LIBRARIES, CUDA, GIB)
    message = f"bundle {tmp_path / 'absent'} does not exist; give the folder that was exported"
    assert found["fault"] == message
    what = f"bundle {tmp_path / 'absent'} does not exist"
    remedy = "give the folder that was exported"
    assert found["problems"] == [{"level": "error", "problem": what, "remedy": remedy}]


@pytest.mark.parametrize(
    ("change", "why", "remedy"),
    [
        ({"installed": False}, "ONNX Runtime is not installed", "pip install 'moe3d-deploy[cpu]'"),
        (
            {"fault": "does not load within 60 s"},
            "ONNX Runtime does not load within 60 s",
            "pip install --force-reinstall onnxruntime",
        ),
        (
            {"providers": ["CUDAExecutionProvider"]},
            "this ONNX Runtime has no CPU provider",
            "pip install 'moe3d-deploy[cpu]'",
        ),
    ],
)
def test_without_a_working_onnxruntime_the_file_does_not_run(
    path: str, change: dict[str, Any], why: str, remedy: str
) -> None:
    libraries = {**LIBRARIES, "onnxruntime": LIBRARIES["onnxruntime"] | change}
    found = examine_bundle(path, libraries, CUDA, GIB)
    assert reasons(found["model"]) == [(why, remedy)]
    assert found["problems"] == [
        {"level": "warning", "problem": f"{path}/model.onnx does not run here: {why}", "remedy": remedy}
    ]


def test_a_bf16_file_runs_in_no_onnxruntime_on_a_cpu(path: str) -> None:
    edit_manifest(Path(path), precision="bf16")
    found = examine_bundle(path, LIBRARIES, CUDA, GIB)
    assert reasons(found["model"]) == [
        ("ONNX Runtime computes no bf16 on a CPU", "export with --precision fp32 or fp16 to run it here")
    ]


def test_an_int8_file_does_not_run_without_vnni(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_manifest(Path(path), precision="int8")
    for exact in (True, False):
        monkeypatch.setattr(doctor_bundles, "multiplies_bytes_exactly", lambda exact=exact: exact)
        model = examine_bundle(path, LIBRARIES, CUDA, GIB)["model"]
        assert model["runs"] is exact
    assert reasons(model) == [
        (
            "ONNX Runtime's products in 8 bits overflow on this processor, which has no VNNI",
            "export with --precision fp32 or fp16 to run it here",
        )
    ]


def test_weights_larger_than_the_memory_are_a_caution(path: str) -> None:
    found = examine_bundle(path, LIBRARIES, CUDA, 17)
    assert found["model"]["runs"]
    (problem,) = found["problems"]
    assert problem["level"] == "note"
    assert "model.onnx may not run here: its weights alone take 0.00 GB, this machine has 0.00 GB" in problem["problem"]
    assert examine_bundle(path, LIBRARIES, CUDA, 18)["problems"] == []


def test_an_engine_larger_than_the_gpu_is_a_caution(path: str) -> None:
    small = {**CUDA, "gpus": [CARD | {"memory_bytes": 9}]}
    (caution,) = examine_bundle(path, LIBRARIES, small, GIB)["engines"][0]["cautions"]
    assert "the GPU Test Card has 0.00 GB for them" in caution["why"]


def test_an_engine_of_another_version_is_to_be_built_again(path: str) -> None:
    libraries = {**LIBRARIES, "tensorrt_rtx": LIBRARIES["tensorrt_rtx"] | {"version": "1.7.1.116"}}
    assert engine_reasons(path, libraries) == [
        ("built by TensorRT-RTX 1.6.1, here is 1.7.1.116", f"{rebuild(path)} --target sm89")
    ]


def test_what_follows_the_numbers_of_a_version_makes_no_other_engine(path: str) -> None:
    libraries = {**LIBRARIES, "tensorrt_rtx": LIBRARIES["tensorrt_rtx"] | {"version": "1.6.1.post1"}}
    assert engine_reasons(path, libraries) == []


def test_a_version_and_hardware_compatible_engine_is_judged_by_their_rules(tmp_path: Path) -> None:
    """Those of `trt.load_checks`, which the runtime has too; the exact comparison would refuse both."""
    write_bundle(tmp_path / "bundle")
    flags = {"version_compatible": True, "hardware_compatible": True}
    engine = replace(
        example_engine(), builder="tensorrt", builder_version="10.13.3.9", plugin=None, build={"flags": flags}
    )
    add(tmp_path / "bundle", engine)
    newer = {**LIBRARIES, "tensorrt": {"installed": True, "version": "10.16.1.11", "fault": None}}
    hopper = {**CUDA, "gpus": [CARD | {"compute_capability": "9.0"}]}
    assert engine_reasons(str(tmp_path / "bundle"), newer, hopper) == []
    older = {**newer, "tensorrt": newer["tensorrt"] | {"version": "10.3.0.26"}}
    command = f"{rebuild(tmp_path / 'bundle', 'tensorrt')} --version-compatible --hardware-compatible"
    assert engine_reasons(str(tmp_path / "bundle"), older, hopper) == [
        ("built by TensorRT 10.13.3.9 for later ones, here is 10.3.0.26", command)
    ]


@pytest.mark.parametrize(
    ("capability", "builder", "target"),
    # TensorRT-RTX builds for 8.6 from here on, never for 9.0
    [("8.6", "tensorrt-rtx", " --target sm86,sm89"), ("9.0", "tensorrt", "")],
)
def test_an_engine_for_another_gpu_is_to_be_built_by_what_can(
    path: str, capability: str, builder: str, target: str
) -> None:
    cuda = {**CUDA, "gpus": [CARD | {"compute_capability": capability}]}
    text = f"built for compute capability 8.9, the GPUs here have {capability}"
    assert engine_reasons(path, cuda=cuda) == [(text, rebuild(path, builder) + target)]


def test_one_fitting_gpu_among_several_is_enough(path: str) -> None:
    cuda = {**CUDA, "gpus": [CARD | {"compute_capability": "9.0"}, CARD]}
    assert engine_reasons(path, cuda=cuda) == []


@pytest.mark.parametrize(
    ("cuda", "why"),
    [
        (NO_CUDA, "there is no CUDA driver"),
        ({**NO_CUDA, "driver": "faulty", "fault": "does not start"}, "the CUDA driver does not start"),
        ({**NO_CUDA, "driver": "working"}, "the CUDA driver shows this process no GPU"),
    ],
)
def test_without_a_gpu_no_engine_runs_and_nothing_is_wrong(path: str, cuda: dict[str, Any], why: str) -> None:
    remedy = "run engines on a machine with an NVIDIA GPU; the ONNX file needs none"
    assert engine_reasons(path, cuda=cuda) == [(why, remedy)]
    assert [problem["level"] for problem in examine_bundle(path, LIBRARIES, cuda, GIB)["problems"]] == ["note"]


def test_all_that_speaks_against_an_engine_is_told_at_once(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    add(tmp_path / "bundle", replace(example_engine(), builder="tensorrt", builder_version="11.1"))
    path = str(tmp_path / "bundle")
    assert [why for why, _ in engine_reasons(path, cuda=NO_CUDA)] == [
        "TensorRT is not installed",
        "it needs a plugin library, and its record does not say which",
        "there is no CUDA driver",
    ]


def test_a_plugin_library_is_a_caution_since_only_the_one_who_loads_the_engine_has_it(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    plugin = {"layers": ["ExpertMix"], "library": "lib.so", "sha256": "d1" * 32}
    add(tmp_path / "bundle", replace(example_engine(), builder="tensorrt", builder_version="10.16.1", plugin=plugin))
    installed = {**LIBRARIES, "tensorrt": {"installed": True, "version": "10.16.1", "fault": None}}
    found = examine_bundle(str(tmp_path / "bundle"), installed, CUDA, GIB)
    (engine,) = found["engines"]
    assert (engine["runs"], engine["plugin_sha256"]) == (True, "d1" * 32)
    assert engine["cautions"] == [
        {
            "why": f"it needs the plugin library of SHA-256 {'d1' * 32}",
            "remedy": "give that library where the engine is loaded",
        }
    ]


def test_a_builder_that_does_not_load_or_lacks_polygraphy_is_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = LIBRARIES["tensorrt_rtx"] | {"fault": "ends the process that loads it with SIGABRT", "version": None}
    assert engine_reasons(path, {**LIBRARIES, "tensorrt_rtx": broken}) == [
        (
            "TensorRT-RTX ends the process that loads it with SIGABRT",
            "pip install --force-reinstall tensorrt_rtx",
        )
    ]
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine_reasons(path) == [("Polygraphy is not installed", "pip install 'moe3d-deploy[rtx]'")]


@pytest.mark.parametrize(("how", "fault"), [("missing", "is missing"), ("cut off", "has 3 bytes, not 10")])
def test_a_damaged_engine_is_an_error_and_does_not_hide_the_file(path: str, how: str, fault: str) -> None:
    spoil(Path(path), how)
    found = examine_bundle(path, LIBRARIES, CUDA, GIB)
    assert found["model"]["runs"]
    assert found["damaged_engines"] == [ENGINE]
    (problem,) = found["problems"]
    assert (problem["level"], problem["remedy"]) == ("error", f"{rebuild(path)} --target sm89")
    assert fault in problem["problem"]
