"""README and docs hold what they say: links lead somewhere, commands parse, Python runs, tables come from results."""

import math
import re
import shlex
import shutil
from pathlib import Path

import click
import exports
import pytest
from PIL import Image

from moe3d_deploy.benchmarks import tables
from moe3d_deploy.checkpoint import model_shapes
from moe3d_deploy.cli.main import load_command
from moe3d_deploy.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = tables.documents(ROOT)


def blocks(language: str) -> list[tuple[Path, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(path, block) for path in DOCUMENTS for block in pattern.findall(path.read_text(encoding="utf-8"))]


def commands() -> list[str]:
    """Every command of the documents, its continued lines joined."""
    joined = [re.sub(r"\\\n\s*", "", block) for _, block in blocks("console")]
    return [line[2:] for block in joined for line in block.splitlines() if line.startswith("$ ")]


def test_the_readme_is_among_the_documents() -> None:
    assert ROOT / "README.md" in DOCUMENTS
    assert ROOT / "docs" / "export.md" in DOCUMENTS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


def test_every_moe3d_command_in_the_documents_parses() -> None:
    """Flags and their values, not files: a renamed option would otherwise live on in the README."""
    checked = 0
    for line in commands():
        words = shlex.split(line, comments=True)
        if words[0] == "moe3d-export":
            words = ["moe3d", "export", *words[1:]]
        if words[0] != "moe3d":
            continue
        command = load_command(words[1])
        command.make_context(words[1], words[2:])
        checked += 1
    assert checked >= 5


def test_a_wrong_flag_would_be_found() -> None:
    with pytest.raises(click.NoSuchOption):
        load_command("export").make_context("export", ["moe3d-tiny", "-o", "bundle", "--half"])


def test_every_make_target_in_the_documents_exists() -> None:
    targets = {words[1] for line in commands() if (words := line.split())[0] == "make"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_python_of_the_model_page_runs() -> None:
    (block,) = [block for path, block in blocks("python") if path.name == "model.md"]
    scope: dict[str, object] = {}
    exec(compile(block, "docs/model.md", "exec"), scope)
    assert scope["out"]["depth"].shape == (1, 2, 168, 252)  # type: ignore[index]


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for path, block in blocks("python") if path.name == "README.md"]
    shutil.copytree(exports.bundle().path, tmp_path / "bundle")
    for name in ("left.png", "right.png"):
        Image.new("RGB", (80, 60), (200, 100, 50)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["depth"].shape[0] == scope["extrinsics"].shape[0] == 2  # type: ignore[attr-defined]


def test_the_parameter_counts_of_the_model_page_are_the_models() -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    for name, text in (("vggt-1b", "1,190.6 M"), ("moe3d-tiny", "5.5 M")):
        count = sum(math.prod(shape) for shape in model_shapes(PRESETS[name]).values())
        assert f"{count / 1e6:,.1f} M" == text
        assert text in page


def test_the_tables_are_those_of_the_results() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert tables.render(text, ROOT) == text, f"{path.name}: run python -m moe3d_deploy.benchmarks.tables"


def test_a_changed_figure_would_be_found() -> None:
    path = ROOT / "docs" / "export.md"
    text = path.read_text(encoding="utf-8")
    changed = re.sub(r"(\d+) MB \|", lambda match: f"{int(match[1]) + 1} MB |", text, count=1)
    assert changed != text
    assert tables.render(changed, ROOT) == text
