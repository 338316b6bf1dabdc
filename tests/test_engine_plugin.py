"""Building with the plugin: what is refused before, what the builder's process does, and what is recorded.

No TensorRT is here: a stand-in takes its place, and TensorRT-RTX's parser where a model is parsed.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plugin_files import FakeTensorRT, load_polygraphy, plugin_file

from moe3d_deploy import trt
from moe3d_deploy.child import ChildResult
from moe3d_deploy.config import PRESETS, MoeConfig
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.engines.build import check_request
from moe3d_deploy.engines.plugin_rules import check_model_for_plugin
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import BundleError, EngineError, InputError
from moe3d_deploy.trt import PluginLibrary, builder, installed, plugin_library
from moe3d_deploy.trt.onnx_functions import without_function

SHAPES = ShapeProfile.from_ranges(views="2", height="28", width="42")
DIGEST = "d1" * 32


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginLibrary:
    monkeypatch.setattr(plugin_library, "_registered", [])
    return PluginLibrary.of(plugin_file(tmp_path / "libmoe3d_plugin_trt10.so"))


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """TensorRT 10.16 and TensorRT-RTX on a machine with a GPU."""
    found = {"tensorrt": "10.16.1.11", "tensorrt-rtx": "1.7.1.116"}
    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "available", lambda: found)
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(8, 9)])
    return found


# What is refused before a build


def test_a_builder_that_takes_no_plugin_is_refused(library: PluginLibrary, versions: dict[str, str]) -> None:
    flags = trt.BuildFlags()
    assert check_request("auto", flags, None, plugin=library) == "tensorrt"
    with pytest.raises(InputError, match="^--plugin: TensorRT-RTX takes no plugins, and one that is registered ends"):
        check_request("tensorrt-rtx", flags, None, plugin=library)
    del versions["tensorrt"]
    with pytest.raises(
        InputError, match=r"or build with TensorRT 10\.3 or newer, on the machine that runs the engine$"
    ):
        check_request("auto", flags, None, plugin=library)


def test_a_library_of_another_major_is_refused(library: PluginLibrary, versions: dict[str, str]) -> None:
    versions["tensorrt"] = "11.1.0.2"
    with pytest.raises(InputError) as caught:
        check_request("tensorrt", trt.BuildFlags(), None, plugin=library)
    assert str(caught.value) == (
        f"plugin library {library.path} is for TensorRT 10, here is 11.1.0.2; give libmoe3d_plugin_trt11.so"
    )


def test_a_version_compatible_engine_gets_no_plugin(library: PluginLibrary, versions: dict[str, str]) -> None:
    with pytest.raises(InputError, match="^--plugin: a --version-compatible engine brings a runtime of its own"):
        check_request("tensorrt", trt.BuildFlags(version_compatible=True), None, plugin=library)


@pytest.mark.parametrize(
    ("moe", "merged", "why"),
    [
        (None, False, "it mixes merged experts, and this model has no experts: leave it out"),
        (
            MoeConfig(),
            False,
            "it mixes merged experts, and this model has experts that are not merged (--no-merge): lea",
        ),
        (MoeConfig(num_experts=17), True, "it mixes at most 16 experts, this model has 17"),
        (MoeConfig(hidden_channels=12), True, "it takes widths that are multiples of 8, this model has 12"),
        (MoeConfig(gate_hidden_channels=4), True, "it takes widths that are multiples of 8, this model has 4"),
    ],
)
def test_a_model_that_the_plugin_does_not_mix_is_refused(
    library: PluginLibrary, moe: MoeConfig | None, merged: bool, why: str
) -> None:
    config = replace(PRESETS["moe3d-tiny"], moe=moe)
    with pytest.raises(InputError) as caught:
        check_model_for_plugin(config, merged, library)
    assert str(caught.value).startswith(f"--plugin: {why}")
    check_model_for_plugin(config, merged, None)


def test_the_presets_with_experts_are_mixed(library: PluginLibrary) -> None:
    for name in ("moe3d-tiny", "moe3d-1b"):
        check_model_for_plugin(PRESETS[name], True, library)


# The builder's process


@pytest.mark.parametrize(
    ("version", "removed"),
    [
        ("10.3.0.26", ("ExpertMix", "moe3d")),
        ("10.6.0.26", ("ExpertMix", "moe3d")),
        ("10.7.0.23", None),
        ("10.16.1", None),
    ],
)
def test_the_function_leaves_the_model_where_the_parser_would_take_it(
    version: str,
    removed: tuple[str, str] | None,
    library: PluginLibrary,
    versions: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both sides of the process, but for TensorRT itself; and the record of what comes back."""
    asked: dict[str, Any] = {}
    versions["tensorrt"] = version
    facts = trt.NetworkFacts(True, {}, {}, {}, {}, ("ExpertMix",), {})

    def build_engine(*_: Any, **options: Any) -> trt.BuiltEngine:
        asked.update(options)
        return trt.BuiltEngine(3, "tensorrt", version, ((8, 9),), facts, (1,), "", (), 1.0, 2.0)

    def run_in_child(function: str, request: dict[str, Any], **_: Any) -> ChildResult:
        return ChildResult(engine_build.build_in_child(request, lambda event: None), 4.0, 5)

    monkeypatch.setattr(trt, "build_engine", build_engine)
    monkeypatch.setattr(engine_build, "run_in_child", run_in_child)
    monkeypatch.setattr(engine_build.signal, "signal", lambda *_: None)
    model = tmp_path / "model.onnx"
    model.write_bytes(b"")

    def build(plugin: PluginLibrary | None) -> dict[str, Any]:
        return engine_build.build(model, tmp_path / "plan", SHAPES, precision="fp16", builder="tensorrt", plugin=plugin)

    record = build(library)
    assert (asked["plugin"], asked["without_function"]) == (library, removed)
    assert record["plugin"] == {"layers": ["ExpertMix"], "library": library.path.name, "sha256": library.sha256}
    build(None)
    assert (asked["plugin"], asked["without_function"]) == (None, None)


def test_the_library_is_registered_before_the_model_is_parsed(
    library: PluginLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_polygraphy()
    fake = FakeTensorRT()
    monkeypatch.setattr(installed, "require", lambda builder: None)
    monkeypatch.setattr(installed, "visible_gpus", lambda: [(8, 9)])
    monkeypatch.setattr(installed, "load", lambda builder: fake)
    (tmp_path / "m.onnx").write_bytes(b"")

    def parse(trt: Any, path: Path, *, without_function: Any) -> None:
        fake.calls.append(("parse", path.name, without_function))
        raise EngineError("far enough")

    monkeypatch.setattr(builder, "parse", parse)
    with pytest.raises(EngineError, match="far enough"):
        trt.build_engine(
            tmp_path / "m.onnx", tmp_path / "plan", SHAPES, builder="tensorrt", plugin=library,
            without_function=("ExpertMix", "moe3d"),
        )  # fmt: skip
    assert [call[0] for call in fake.calls] == ["load_library", "get_creator", "parse"]
    assert fake.calls[-1] == ("parse", "m.onnx", ("ExpertMix", "moe3d"))


# A model without its function


def model_with_functions(path: Path) -> Any:
    """A product with a weight outside the file, and two functions, of which the graph calls one."""
    onnx = pytest.importorskip("onnx", reason="writes ONNX models: pip install 'moe3d-deploy[export]'")
    import numpy as np

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT

    def function(domain: str, name: str) -> Any:
        body = [helper.make_node("Relu", ["f_x"], ["f_y"])]
        return helper.make_function(domain, name, ["f_x"], ["f_y"], body, [helper.make_opsetid("", 20)])

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Keep", ["t"], ["y"], domain="moe3d")],
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", 64])],
        [helper.make_tensor_value_info("y", kind, ["N", 64])],
        [onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("moe3d", 1)],
        functions=[function("moe3d", "ExpertMix"), function("moe3d", "Keep"), function("other", "ExpertMix")],
        ir_version=9,
    )
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return onnx.load(path, load_external_data=False)


def test_a_function_is_taken_out_by_name_and_domain_and_nothing_else_changes(tmp_path: Path) -> None:
    model = model_with_functions(tmp_path / "m.onnx")
    onnx = pytest.importorskip("onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    found = onnx.ModelProto.FromString(without_function(content, "ExpertMix", "moe3d", "m.onnx"))
    assert [(function.domain, function.name) for function in found.functions] == [
        ("moe3d", "Keep"),
        ("other", "ExpertMix"),
    ]
    del model.functions[0]
    assert found == model
    assert without_function(content, "Gone", "moe3d", "m.onnx") == content


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(BundleError, match=r"^m\.onnx is not an ONNX file: it ends too early; copy the bundle again"):
        without_function(b"\xca\x01\xff\x01ab", "ExpertMix", "moe3d", "m.onnx")


def test_a_parser_gets_the_model_without_it_and_its_weights_from_beside_the_file(tmp_path: Path) -> None:
    """TensorRT-RTX's parser: it expands the function that is left, and names the operator that has none any more."""
    pytest.importorskip("tensorrt_rtx", reason="parses: pip install 'moe3d-deploy[rtx]'")
    from moe3d_deploy.trt.network import network_facts, parse
    from moe3d_deploy.trt.watch import Messages

    path = tmp_path / "m.onnx"
    model_with_functions(path)
    before, rtx = path.read_bytes(), installed.load("tensorrt-rtx")
    messages = Messages()
    with messages.captured():
        facts = network_facts(rtx, parse(rtx, path, without_function=("ExpertMix", "moe3d"))[1])
        assert (facts.matmul, facts.functions) == ({"fp32": 1}, {"Keep": 1})
        with pytest.raises(Exception, match="parse"):
            parse(rtx, path, without_function=("Keep", "moe3d"))
    assert any("Keep" in error for error in messages.errors)
    assert path.read_bytes() == before


def test_the_library_is_a_part_of_what_an_engine_is_cached_by(tmp_path: Path, library: PluginLibrary) -> None:
    from moe3d_deploy.engines.cache import engine_key

    model = tmp_path / "m.onnx"
    model.write_bytes(b"")
    options: dict[str, Any] = {
        "builder": "tensorrt", "builder_version": "10.16", "compute_capabilities": [(8, 9)], "flags": trt.BuildFlags(),
    }  # fmt: skip
    other = plugin_file(tmp_path / "other.so", more=["x"])
    keys = {engine_key(model, [SHAPES], plugin=plugin, **options) for plugin in (None, library.path, other)}
    assert len(keys) == 3
