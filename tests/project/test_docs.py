"""The documentation builds without a warning, its Python runs, its messages are the package's."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import fresh_python
import messages
import numpy as np
import pytest
import torch
from PIL import Image

from convmixer_fast import ConvMixer, cli, save_checkpoint
from convmixer_fast.inference.predictor import MAX_MEMORY

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page that are marked as in one of these languages."""
    return [code for language, code in FENCED.findall(page.read_text()) if language in languages]


BLOCKS = [
    pytest.param(page, code, id=f"{page.relative_to(DOCS).with_suffix('')}-{i}")
    for page in PAGES
    for i, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_python_blocks_run(page, code, tmp_path, monkeypatch, capsys):
    if "timm" in code:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {})


COMMANDS = [
    pytest.param(line.strip(), id=f"{page.name}-{i}-{j}")
    for page in (ROOT / "README.md", *PAGES)
    for i, block in enumerate(blocks(page, "", "bash", "sh"))
    for j, line in enumerate(block.splitlines())
    if line.strip() and not line.strip().startswith("#")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_those_that_there_are(command, capsys):
    """Each is understood: by its own parser, or it is a file of the repository."""
    for part in command.split("&&"):
        words = shlex.split(part, comments=True)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # a variable for that command
            words.pop(0)
        if words[0] == "convmixer-fast":
            assert cli.build_parser().parse_args(words[1:]).run
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("pip", "pytest", "mkdocs"), command


#: Those that are run here; `pip` and `pytest` lines are CI's, demo and buckets have other tests.
RUN = [
    param
    for param in COMMANDS
    if param.values[0].startswith("convmixer-fast")
    and not any(word in param.values[0] for word in ("demo", "://"))
]
#: What makes a command short. The last of two values of an option counts.
SHORT = {
    "benchmark": "--img-size 28 -b 1 --num-warm-iter 1 --num-bench-iter 1",
    "evaluate": "--img-size 32",
    "predict": "--img-size 32",
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files that the commands name."""
    model = ConvMixer(8, 1, kernel_size=3, patch_size=4, num_classes=2)
    save_checkpoint(model, tmp_path / "mine.safetensors")
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8)
    for name, image in zip(("photos/a", "photos/b", "val/0/a", "val/1/b"), pixels, strict=True):
        path = tmp_path / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    Image.fromarray(pixels[0]).save(tmp_path / "slide.tif")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", RUN)
def test_commands_run_as_printed(command, desk, capsys):
    words = shlex.split(command, comments=True)[1:]
    code = cli.main(words + SHORT.get(words[0], "").split())
    told = capsys.readouterr()
    if "--gpu" in words and not torch.cuda.is_available():
        assert "there is no GPU to report on" in told.err
        return
    assert code == 0, told.err
    assert told.out.strip()
    outputs = ("out.csv", "where.png", "my-gpu.json")
    for name in set(outputs) & set(words):
        assert (desk / name).stat().st_size > 0, f"{name} is not there"


def test_every_way_to_start_has_a_block():
    started = {param.values[0].name for param in BLOCKS if param.values[0].parent.name == "start"}
    assert started == {"swap.md", "batch.md", "large.md", "gpu.md", "benchmark.md"}


def build_site(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """The strict build; with ``--quiet`` mkdocs does not count the warnings that it hides."""
    pytest.importorskip("mkdocs", reason='pip install ".[docs]"')
    pytest.importorskip("material", reason='pip install ".[docs]"')
    pytest.importorskip("mkdocstrings", reason='pip install ".[docs]"')
    if not (ROOT / "mkdocs.yml").is_file():
        pytest.skip("not run from a source tree")
    return fresh_python.run(
        *("-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)),
        env={"NO_MKDOCS_2_WARNING": "1"},
        timeout=300,
    )


def test_site_builds_without_a_warning(tmp_path):
    done = build_site(ROOT / "mkdocs.yml", tmp_path)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "Documentation built" in told
    assert "WARNING" not in told
    api = (tmp_path / "reference" / "api" / "index.html").read_text()
    for name in ("ConvMixer", "optimize", "load_checkpoint", "assert_numerics"):
        assert f'id="convmixer_fast.{"testing." if "assert" in name else ""}{name}"' in api
    kernels = (tmp_path / "design" / "kernels" / "index.html").read_text()
    assert "Write the limit down" in kernels
    measured = (tmp_path / "measured" / "index.html").read_text()
    shown = re.findall(r'<img [^>]*src="\.\./(charts/[^"]+)"', measured)
    assert len(shown) == (DOCS / "measured.md").read_text().count("<!-- chart: ") > 0
    for chart in shown:
        assert "</svg>" in (tmp_path / chart).read_text()


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("[to itself](index.md#a) ::: documented.right", ""),
        ("[to a page](nowhere.md)", "nowhere.md"),
        ("[to a heading](#nowhere)", "nowhere"),
        ("[to a root](/nowhere/)", "/nowhere/"),
        ("[to a name][convmixer_fast.nothing]", "convmixer_fast.nothing"),
        ("::: documented.wrong", "'x, y'"),
        ('--8<-- "nowhere.md"', "nowhere.md"),
    ],
)
def test_a_broken_page_fails_the_build(page, told, tmp_path):
    """The project's own configuration, on one page."""
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\n"
        f"nav: [index.md]\n"
        f"hooks: []\n"
        f"plugins: {{mkdocstrings: {{handlers: {{python: {{paths: [{tmp_path}]}}}}}}}}\n"
    )
    (tmp_path / "documented.py").write_text(DOCUMENTED)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n" + page.replace(" :::", "\n\n:::"))
    done = build_site(config, tmp_path / "site")
    assert (done.returncode == 0) == (not told), done.stdout + done.stderr
    assert told in done.stdout + done.stderr


DOCUMENTED = '''
def right(x: int, y: int) -> None:
    """One line an argument.

    Args:
        x: a number.
        y: a number.
    """


def wrong(x: int, y: int) -> None:
    """One line for two.

    Args:
        x, y: numbers.
    """
'''


def test_pages_are_all_in_the_navigation():
    listed = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


HEADINGS = re.findall(r"^### `(.+)`$", (DOCS / "reference" / "errors.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def sources() -> list[str]:
    files = [*(ROOT / "convmixer_fast").rglob("*.py"), ROOT / "setup.py"]
    found = [text for file in files for text in messages.of(file)]
    return [*found, (ROOT / "csrc" / "CMakeLists.txt").read_text()]


@pytest.mark.parametrize("heading", [h for h in HEADINGS if "instruction set" not in h])
def test_an_error_that_is_explained_is_one_that_the_package_prints(heading, sources):
    assert messages.printed_by(heading, sources), f"nothing prints {heading!r}"


def test_the_engines_own_error_is_printed_as_explained():
    (heading,) = [h for h in HEADINGS if "instruction set" in h]
    script = "from convmixer_fast.backends.cpu import native; print(native.why_unavailable())"
    told = fresh_python.run("-c", script, env={"CONVMIXER_FAST_ISA": "nonsense"}).stdout
    if "unknown instruction set" not in told:
        pytest.skip(f"no engine here: {told.strip()}")
    assert messages.printed_by(heading, [told])


def test_a_message_that_nobody_prints_is_noticed(sources):
    assert not messages.printed_by("the moon is in the wrong …", sources)
    assert messages.printed_by("a … b", ["say a long b", "no"])
    assert not messages.printed_by("b … a", ["say a long b"])


def test_readme_and_pages_link_to_files_that_exist():
    for page in (ROOT / "README.md", *PAGES):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


#: A figure of a measurement, by its unit.
FIGURE = re.compile(
    r"\d[\d.,]* ?(?:img/s|[KMGT]?(?:MAC|FLOP|B)/s|GMACs?\b|[KMG]i?B\b|[mµun]s\b|%"
    r"|times (?:faster|slower|the)|seconds|minutes|hours)"
)
#: Settings, and what says so.
SETTINGS = {
    "1 GiB": MAX_MEMORY["cpu"] == 2**30,
    "8 GiB": MAX_MEMORY["cuda"] == 2**33,
}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_figures_are_typed_nowhere(page):
    """A rate, a share, a time or a size of a measurement stands in a generated place only."""
    text = re.sub(r"<!-- figures: .*?<!-- end of figures -->", "", page.read_text(), flags=re.S)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    typed = [found for found in FIGURE.findall(text) if not SETTINGS.get(found)]
    assert not typed, typed


def test_a_typed_figure_is_noticed():
    for figure in ("5.5 img/s", "94 %", "18.3 GMAC/s", "2 GB/s", "1.3 times the", "12 ms", "3 MiB"):
        assert FIGURE.search(f"It reaches {figure} here."), figure
    assert not FIGURE.search("convmixer_768_32 at 224 pixels, batch 4, k = 7, 2 threads")


#: Words that the glossary of CONTRIBUTING.md's language rule replaces.
REPLACED = re.compile(
    r"\b(anew|mend(?:s|ed)?|as ever|beside|somebody|anybody|nobody|retreat|verdicts?|serves|served"
    r"|in the place of)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "page",
    [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES],
    ids=lambda p: p.stem,
)
def test_pages_use_the_words_of_the_glossary(page):
    """Outside of code and quoted messages."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    # The names of the measured columns are those of the stored rows.
    text = text.replace("of the model beside", "").replace("model beside ms", "")
    assert not REPLACED.findall(text)


def test_a_replaced_word_is_noticed():
    assert REPLACED.findall("Somebody's model is mended.") == ["Somebody", "mended"]
    assert not REPLACED.findall("besides, it recommends")
