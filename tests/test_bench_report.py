"""The report of `moe3d bench`: read strictly, and everything else of it derived from report.json alone."""

import functools
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bench_reports import a_case, a_report, a_round

from moe3d_deploy.benchmarks.bench.figures import latency, memory_use, stages
from moe3d_deploy.benchmarks.bench.folder import files, write_data, write_report
from moe3d_deploy.benchmarks.bench.report import Case, Finding, Report
from moe3d_deploy.errors import InputError

PIPELINE = {"decode": (1.0,), "preprocess": (2.0,), "inference": (10.0,), "post": (30.0,), "whole": (43.0,)}


def failed(reason: str) -> Case:
    return replace(a_case(), shape=(1, 64, 196, 252), status="failed", reason=reason, rounds=())


def varied() -> Report:
    """Several views, a failed case, an impossible one, one with every stage."""
    whole = a_round(pipeline=PIPELINE, photographs="JPEG files of 504x392, in memory")
    impossible = Finding("model", "compute", 2e12, 1e11)
    return a_report(
        a_case([whole, a_round((20.0, 9.0))]),
        a_case([a_round((40.0, 44.0, 41.0))], shape=(1, 4, 196, 252)),
        failed("its process ran out of <memory> & died"),
        a_case([a_round((1.0,))], (1, 2, 196, 252), status="impossible", reason="too fast", findings=(impossible,)),
    )


def edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(varied().to_json()), **changes}).encode()


def in_case(**changes: Any) -> bytes:
    """The report with `changes` in its first case."""
    data = json.loads(varied().to_json())
    data["sections"]["cases"]["cases"][0].update(changes)
    return json.dumps(data).encode()


@functools.cache
def made() -> dict[str, bytes]:
    return files(varied())


def test_a_report_survives_its_json() -> None:
    report = varied()
    again = Report.from_json(report.to_json(), "report.json")
    assert again == report
    assert again.to_json() == report.to_json()


def test_the_same_json_gives_the_same_files_to_the_byte(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_report(varied(), first)
    write_report(Report.load(first / "report.json"), second)
    names = ["latency.svg", "memory.svg", "report.html", "report.json", "report.md", "roofline.svg"]
    assert sorted(path.name for path in first.iterdir()) == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_folder_stands_for_the_report_in_it(tmp_path: Path) -> None:
    write_data(varied(), tmp_path)
    assert Report.load(tmp_path) == varied()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (edited(format_version=2), "has format_version 2; this version reads 1: update moe3d-deploy"),
        (edited(format_version=0), "has format_version 0; this version reads 1: measure again"),
        (edited(format="other"), "is no report of moe3d bench"),
        (b"[1]", "is no report of moe3d bench"),
        (b'{"format": "moe3d-bench"', "is not JSON"),
        (varied().to_json()[:-100], "is not JSON"),
        (edited(complete="yes"), "complete must be bool, not 'yes'"),
        (edited(more=1), "'more' is unknown"),
        (edited(environment={}), "environment.cpu must be a dict"),
        (edited(sections={"prices": {}}), "sections.'prices' is unknown"),
        (edited(sections={"cases": {"models": {}, "options": {}}}), "sections.cases.cases is missing"),
        (varied().to_json().replace(b'"seed": 0', b'"seed": 0.5', 1), "rounds[0].seed must be int, not 0.5"),
        (varied().to_json().replace(b"10.0,", b"NaN,", 1), "has NaN, which JSON does not allow"),
        (varied().to_json().replace(b"10.0,", b"-10.0,", 1), "series.model must not be negative"),
        (in_case(shape=[1, 0, 196, 252]), "sections.cases.cases[0].shape must be positive"),
        (in_case(shape=[1, 196, 252]), "sections.cases.cases[0].shape must have 4 entries, not 3"),
        (in_case(status="good"), "sections.cases.cases[0].status must not be 'good'"),
        (in_case(model="other"), "cases[0].model is not among the models"),
        (varied().to_json().replace(b'"img_size": ', b'"image_size": ', 1), "models.moe3d-tiny: "),
    ],
)  # fmt: skip
def test_what_is_no_whole_report_is_refused_in_one_line(data: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Report.from_json(data, "some/report.json")
    message = str(caught.value)
    assert said in message
    assert message.startswith("some/report.json")
    assert "\n" not in message
    assert any(remedy in message for remedy in ("measure again", "update"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere.json: no such report; give a report.json or the folder"):
        Report.load(Path("nowhere.json"))


def test_a_stage_without_an_entry_of_every_run_is_refused() -> None:
    data = json.loads(varied().to_json())
    data["sections"]["cases"]["cases"][0]["rounds"][0]["series"]["model"].pop()
    with pytest.raises(InputError, match=r"cases\[0\].rounds\[0\].series.model must have an entry of every run"):
        Report.from_json(json.dumps(data).encode(), "x")


def test_percentiles_and_throughput_are_of_all_runs_of_all_processes() -> None:
    """1..101 ms: p50 51, p90 91, p99 100. 2 scenes of 3 views take 51 ms in the mean: 39.2 scenes and 117.6 views/s."""
    times = [float(value) for value in range(1, 102)]
    found = latency(a_case([a_round(times[::2]), a_round(times[1::2])], shape=(2, 3, 196, 252)))
    assert (found.p50, found.p90, found.p99, found.runs) == pytest.approx((51, 91, 100, 101))
    assert found.medians_ms == (51, 51)
    assert found.scenes_per_second == pytest.approx(2 / 0.051)
    assert found.views_per_second == pytest.approx(6 / 0.051)


def test_stages_that_were_not_measured_have_no_figure() -> None:
    assert stages(a_case()) == {
        "decode": None, "preprocess": None, "upload": None, "model": 11.0, "download": None, "inference": 11.0,
        "post": None, "whole": None,
    }  # fmt: skip
    assert stages(varied().cases[0])["post"] == 30.0


def test_memory_is_split_and_held_against_the_prediction() -> None:
    """Peak of the runs 120 MB: 22 of weights, 80 of activations, 18 of other; 22 + 78 were predicted."""
    use = memory_use(a_case())
    assert use.other_bytes == 18_000_000
    assert (use.peak_ratio, use.weights_ratio) == pytest.approx((1.2, 1.0))
    assert use.activations_ratio == pytest.approx(80 / 78)


def test_every_case_is_in_the_tables_with_its_reason() -> None:
    text = made()["report.md"].decode()
    assert "| moe3d-tiny | pytorch | fp32 | 1x64x196x252 | failed | its process ran out of <memory> & died |" in text
    assert "| moe3d-tiny | pytorch | fp32 | 1x2x196x252 | impossible | too fast |" in text
    assert "| moe3d-tiny | pytorch | fp32 | 1x4x196x252 | 41 ms | 43.4 ms | 43.9 ms |" in text


def test_an_interrupted_report_says_so() -> None:
    found = files(a_report(a_case(), complete=False))
    said = "Interrupted: only the cases that were finished are here."
    assert said in found["report.md"].decode()
    assert said in found["report.html"].decode()


def test_the_page_needs_nothing_else() -> None:
    page = made()["report.html"].decode()
    assert re.findall(r"""(?:src|href)=["'](?!#)""", page) == []
    assert "@import" not in page
    assert "<script" not in page
    links = set(re.findall(r"""\bhttps?://[^"'\s<&]+""", page))
    assert all(link.startswith("http://www.w3.org/") for link in links), links  # the names of SVG's vocabularies
    assert page.count("<svg") == 3
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_holds_the_report_and_no_markup_of_it() -> None:
    page = made()["report.html"].decode()
    assert '<td class="word">its process ran out of &lt;memory&gt; &amp; died</td>' in page
    assert "<memory>" not in page
    held = re.findall(r'<pre id="report">(.*?)</pre>', page, re.DOTALL)
    assert html.unescape(held[0]).encode() == varied().to_json()


def test_ids_of_the_plots_of_a_page_do_not_meet() -> None:
    page = made()["report.html"].decode()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in re.findall(r'(?:url\(#|href="#)([^")]+)', page):
        assert name in ids


def test_plots_are_svg_in_the_ink_of_the_reader() -> None:
    for name in ("latency.svg", "memory.svg", "roofline.svg"):
        svg = made()[name].decode()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "moe3d-tiny pytorch fp32 196x252" in svg


def test_a_report_without_a_figure_has_no_plots() -> None:
    assert sorted(files(a_report(failed("its process died")))) == ["report.html", "report.json", "report.md"]
