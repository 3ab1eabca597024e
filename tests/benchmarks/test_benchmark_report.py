"""The benchmarks' report says what the rows say; merging pieces loses none. Nothing is timed."""

from __future__ import annotations

import copy
import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import charts
import competitors
import figures
import machine
import pytest
import report
import results
import torch

from convmixer_fast.testing import error_report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"name": "epyc-zen1-2c", "cpu": "AMD EPYC", "cores": 2, "isa": "avx2", "system": "Linux"}
RUN = {"date": "2025-01-31", "torch": "2.9.0", "engine": "aa"}


def rows(model: str = "1536/20", **ms: float) -> list[dict[str, Any]]:
    """A group of whole models, batch 4 and 2 threads, whose work is 1 second of the peak."""
    return [
        {
            "suite": "models",
            "group": f"{model}, batch 4, threads 2",
            "model": model,
            "batch": 4,
            "threads": 2,
            "system": system,
            "ms": value,
            "img/s": 4e3 / value,
            "of peak": 1e3 / value,
        }
        for system, value in ms.items()
    ]


def made_of(measured: list[dict[str, Any]], **run: Any) -> dict[str, Any]:
    return results.new_report(MACHINE, {**RUN, **run}, measured)


def finding(measured: list[dict[str, Any]], *words: str) -> Any:
    """The one finding that holds all these words."""
    found = [x for x in report.findings(made_of(measured)) if all(w in x.what for w in words)]
    assert len(found) == 1, [x.what for x in found]
    return found[0]


# Merging


def test_merging_adds_groups_and_replaces_them_whole():
    old = made_of(rows("1536/20", ours=1000.0, eager=2000.0) + rows("768/32", ours=1.0))
    before = copy.deepcopy(old)
    new = made_of(rows("1536/20", ours=900.0) + rows("1024/20", ours=5.0), engine="bb")
    merged = results.merge(old, new)
    assert old == before, "the old report was changed"
    seen = {(r["model"], r["system"]): r["ms"] for r in merged["rows"]}
    # The old group's eager row is gone: it was not measured beside the new one of ours.
    assert seen == {("768/32", "ours"): 1.0, ("1536/20", "ours"): 900.0, ("1024/20", "ours"): 5.0}
    runs = {r["model"]: merged["runs"][r["run"]]["engine"] for r in merged["rows"]}
    assert runs == {"768/32": "aa", "1536/20": "bb", "1024/20": "bb"}


def test_runs_that_no_row_is_of_are_dropped_and_equal_ones_are_one():
    first = made_of(rows(ours=1.0))
    again = results.merge(first, made_of(rows("768/32", ours=2.0)))
    assert again["runs"] == [RUN]
    replaced = results.merge(first, made_of(rows(ours=3.0), engine="bb"))
    assert [run["engine"] for run in replaced["runs"]] == ["bb"]
    assert [row["run"] for row in replaced["rows"]] == [0]


def test_many_pieces_in_any_order_give_the_same_rows():
    pieces = [made_of(rows(m, ours=float(i))) for i, m in enumerate(("a", "b", "c", "d"), 1)]
    forward = backward = None
    for piece in pieces:
        forward = results.merge(forward, piece)
    for piece in reversed(pieces):
        backward = results.merge(backward, piece)
    by_model = [sorted(r["rows"], key=lambda row: row["model"]) for r in (forward, backward)]
    assert by_model[0] == by_model[1]
    assert len(by_model[0]) == 4


def test_rows_of_another_machine_are_refused():
    other = results.new_report({**MACHINE, "cores": 4}, RUN, rows(ours=1.0))
    with pytest.raises(ValueError, match="different machines"):
        results.merge(made_of(rows(ours=1.0)), other)


def test_groups_of_another_build_of_the_engine_do_not_count_as_done():
    there = made_of(rows(ours=1.0))
    group = ("models", "1536/20, batch 4, threads 2")
    assert results.groups(there) == {group}
    assert results.groups(there, "aa") == {group}
    assert results.groups(there, "bb") == set()
    assert results.groups(None) == set()


def test_a_saved_report_is_read_back_and_others_are_refused(tmp_path):
    path = tmp_path / "deep" / "cpu.json"
    assert results.load(path) is None
    whole = made_of([*rows(ours=1.0, eager=2.0), {"suite": "s", "group": "g", "note": '"|\n'}])
    results.save(whole, path)
    assert results.load(path) == whole
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]
    for other in ({"rows": []}, {"machine": {}, "runs": [], "rows": [{"ms": 1}]}, [1]):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="no report of these benchmarks"):
            results.load(path)


# The summary


def test_share_of_peak_is_a_finding_without_a_promise():
    found = finding(rows(ours=1000 / 0.89), "1536/20", "of peak")
    assert found.measured == pytest.approx(0.89)
    assert (found.promise, found.kept) == (None, "")
    assert found.row() == {"what": found.what, "measured": "0.89", "detail": ""}


def test_speed_up_is_over_the_best_peer_and_names_the_missing():
    group = rows(ours=1000.0, **{"eager NCHW": 2000.0, "OpenVINO": 1400.0, "peak": 1.0})
    group.append({**group[0], "system": "ONNX Runtime", "note": "is missing"})
    del group[-1]["ms"]
    found = finding(group, "1536/20", "best peer")
    assert found.measured == pytest.approx(1.4)
    assert found.detail == "best of 2: OpenVINO; not timed: ONNX Runtime"


def test_only_batch_4_on_2_threads_is_in_the_summary_of_whole_models():
    others = [{**row, "batch": 16, "group": "16"} for row in rows(ours=1.0, eager=5.0)]
    others += [{**row, "threads": 1, "group": "1"} for row in rows(ours=1.0, eager=5.0)]
    assert not report.findings(made_of(others))


def test_what_was_not_measured_is_not_in_the_summary():
    assert not report.findings(made_of([]))
    assert not report.tables(made_of([]))
    alone = report.findings(made_of(rows(ours=1000.0)))
    assert [x.what for x in alone] == ["1536/20, of peak, batch 4, 2 threads"]


def scaling(model: str, **columns: Any) -> dict[str, Any]:
    return {"suite": "scaling", "group": model, "model": model, "system": "ours", **columns}


def test_scaling_lines():
    measured = [
        scaling("768/32", batch=4, threads=2, **{"img/s": 10.0}),
        scaling("768/32", batch=1, threads=2, **{"img/s": 8.9}),
        scaling("768/32", batch=4, threads=1, **{"img/s": 5.2}),
        scaling("768/32", threads=1, **{"GMAC/s": 30.0}) | {"system": "peak"},
        scaling("768/32", threads=2, **{"GMAC/s": 59.0}) | {"system": "peak"},
        scaling("768/32", batch=1, threads=2, side=2048, **{"ns / patch": 111.0, "img/s": 0.1}),
        scaling("768/32", batch=83, threads=2, side=224, **{"ns / patch": 100.0, "img/s": 9.0}),
    ]
    small = finding(measured, "768/32", "batch 1 against")
    assert small.measured == pytest.approx(0.89)
    threads = finding(measured, "768/32", "2 threads against 1")
    assert threads.measured == pytest.approx(10 / 5.2)
    assert "1.97" in threads.detail
    large = finding(measured, "2048 px against 224 px")
    assert large.measured == pytest.approx(1.11)
    assert "against 83" in large.detail


def test_depthwise_half_alone_is_ours_and_nobody_elses():
    row = {"suite": "kernels", "group": "g", "model": "768 x 32 x 32, k=7, relu", "batch": 1}
    row |= {"threads": 2, "part": "depthwise half", "of peak": 0.6, "ms": 1.0}
    measured = [
        row | {"system": "ours"},
        row | {"system": "eager NCHW", "of peak": 0.1},
        row | {"system": "ours", "part": "block", "of peak": 0.9},
    ]
    found = finding(measured, "depthwise half")
    assert found.measured == 0.6


def test_memory_is_that_of_the_worst_batch():
    measured = [
        {"suite": "memory", "group": str(b), "model": "256/8", "batch": b, "system": s, "MiB": mib}
        for b, pair in {1: (90, 100), 16: (303, 300)}.items()
        for s, mib in zip(("ours", "eager NCHW"), pair, strict=True)
    ]
    found = finding(measured, "256/8", "peak memory")
    assert found.measured == pytest.approx(1.01)
    assert found.detail.endswith(": 16")


def test_the_rule_decides_whether_its_promise_is_kept():
    row = {
        "suite": "numerics",
        "group": "256/8",
        "model": "256/8",
        "system": "ours, direct products",
    }
    row |= {"max error": 3e-7, "rms error": 1e-7, "max / eager's": 2.01, "rms / eager's": 1.5}
    # The rule allows a floor of rounding units above twice eager's error.
    found = finding([row | {"within rule": True}], "256/8", "direct products")
    assert (found.measured, found.promise, found.kept) == (2.01, report.ERROR, "yes")
    assert finding([row | {"within rule": False}], "256/8", "direct products").kept == "no"


def test_a_default_that_is_one_of_the_two_products_is_not_told_twice():
    row = {"suite": "numerics", "group": "256/8", "model": "256/8", "within rule": True}
    row |= {"max error": 3e-7, "rms error": 1e-7, "max / eager's": 1.1, "rms / eager's": 1.0}
    row |= {"system": "ours, variable not set"}
    assert finding([row], "256/8", "variable not set").kept == "yes"
    lines = report.findings(made_of([row | {"note": "the same bits as with direct products"}]))
    assert not [x for x in lines if "not set" in x.what]


def test_rounding_does_not_hide_a_broken_promise():
    found = report.Finding("x", 0.8996, promise=0.90)
    assert found.row()["measured"] == "0.900"
    assert (found.row()["promise"], found.kept) == (">= 0.90", "no")
    below = report.Finding("x", 2.5, promise=2.0, at_most=True)
    assert (below.row()["promise"], below.kept) == ("<= 2.00", "no")


# What is written


def test_tables_and_charts_are_written_beside_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    measured = rows("1536/20", ours=800.0, **{"eager NCHW": 2000.0, "peak": 1000.0})
    measured += [{**r, "batch": 1, "group": "b1"} for r in rows("768/32", ours=1200.0)]
    measured[1]["note"] = "a | b"
    path = tmp_path / "cpu.json"
    results.save(made_of(measured), path)
    written = report.write(path)
    assert [p.name for p in written] == ["cpu.md", "cpu-models.svg", "cpu-speed.svg"]
    text = written[0].read_text()
    table = [r for r in text.splitlines() if r.startswith("|")]
    assert "| what | measured | detail |" in table
    assert any(r.startswith("| 1536/20 | 4 | 2 | ours |") and "| 1.25 |" in r for r in table)
    assert any("a / b" in r for r in table)
    assert "![cpu-models.svg](cpu-models.svg)" in text
    speed = written[2].read_text()
    assert "![cpu-speed.svg](cpu-speed.svg)" in text
    # Every bar has its figure: 4 images in 0.8 s, and in 2.
    assert all(f">{label}</text>" in speed for label in ("ours", "5", "2", "batch 4"))
    # 125 % of peak: the axis goes past the tallest bar.
    assert ">120</text>" in written[1].read_text()


def timed(suite: str, system: str, **columns: Any) -> dict[str, Any]:
    group = f"{columns['model']}, {columns.get('side')}, {columns['batch']}"
    return {"suite": suite, "group": group, "threads": 2, "system": system, **columns}


def test_every_suite_with_a_chart_gets_one_and_its_table(tmp_path):
    pytest.importorskip("matplotlib")
    steps = ("eager NCHW", "depthwise half in one kernel", "all blocks in one call")
    measured = [
        timed("steps", s, model="1024/20", batch=4, ms=ms, **{"of peak": 700 / ms})
        for s, ms in zip(steps, (900.0, 950.0, 700.0), strict=True)
    ]
    for system, factor in (("ours", 1.0), ("eager NCHW", 1.5)):
        for side, batch in ((64, 1), (224, 1), (4096, 1), (224, 64)):
            cost = {"ns / patch": 1e4 * factor, "ms": factor}
            measured.append(
                timed("resolution", system, model="1024/20", side=side, batch=batch, **cost)
            )
        mib = {"MiB": 600, "MiB above imports": round(100 * factor)}
        measured.append(timed("memory", system, model="1024/20", batch=4, **mib))
        measured.append(timed("training", system, model="256/8", batch=4, ms=10 * factor))
    path = tmp_path / "cpu.json"
    results.save(made_of(measured), path)
    written = [p.name for p in report.write(path)]
    assert written == ["cpu.md", "cpu-steps.svg", "cpu-memory.svg", "cpu-resolution.svg"]
    text = (tmp_path / "cpu.md").read_text()
    for chart in written[1:]:
        assert f"![{chart}]({chart})" in text
        assert "</text>" in (tmp_path / chart).read_text()
    waterfall = (tmp_path / "cpu-steps.svg").read_text()
    assert all(f">{step}</text>" in waterfall for step in steps)
    assert "| 256/8 | 4 | 2 | eager NCHW | 1.5 |" in text
    # The side itself, not a power of two.
    assert ">4096</text>" in (tmp_path / "cpu-resolution.svg").read_text()


def on_gpu(suite: str, system: str, **columns: Any) -> dict[str, Any]:
    row = timed(suite, system, model="768/32", batch=64, device="Card", dtype="bfloat16", **columns)
    del row["threads"]
    return row


def test_rows_of_a_gpu_get_findings_tables_and_charts_of_their_own(tmp_path):
    pytest.importorskip("matplotlib")
    limit = {"GMAC/s": 1.0}
    measured = [
        on_gpu("models", "ours", ms=10.0, **{"img/s": 6400.0, "of limit": 0.8}),
        on_gpu("models", "ours + CUDA graph", ms=9.0, **{"img/s": 7111.0, "of limit": 0.9}),
        on_gpu("models", "eager NCHW", ms=12.0, **{"img/s": 5333.0, "of limit": 0.6}),
        on_gpu("models", "TensorRT", note="torch_tensorrt is missing"),
        on_gpu("models", "limit, matrix products", **limit),
    ]
    for side, batch in ((64, 1), (224, 1), (224, 64)):
        row = on_gpu("resolution", "ours", side=side, ms=1.0, **{"ns / patch": 5.0})
        measured.append({**row, "batch": batch})
    measured.append(on_gpu("resolution", "eager NCHW", side=4096, note="out of memory"))
    machine_ = {**MACHINE, "gpu": "Card"}
    made = results.new_report(machine_, RUN, measured)
    (found,) = report.findings(made)
    assert found.measured == pytest.approx(1.2), "our own graph is no peer"
    assert found.detail == "best of 1: eager NCHW; not timed: TensorRT"
    path = tmp_path / "gpu.json"
    results.save(made, path)
    names = [p.name for p in report.write(path)]
    assert names == ["gpu.md", "gpu-models.svg", "gpu-speed.svg", "gpu-resolution.svg"]
    text = (tmp_path / "gpu.md").read_text()
    assert "| Card | bfloat16 |" in text
    assert "| of limit |" in text
    assert "float32, batch" not in text, "the text is that of a CPU's summary"
    assert ">% of limit</text>" in (tmp_path / "gpu-models.svg").read_text()


def test_the_same_rows_draw_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    made = made_of(rows("1536/20", ours=800.0, **{"eager NCHW": 2000.0}))
    pictures = []
    for name in ("a.svg", "b.svg"):
        assert charts.draw(made, "models", tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert not charts.draw(made, "memory", tmp_path / "c.svg")


# Peers


def test_a_peer_may_be_a_little_worse_than_eager_but_not_another_model_or_dtype():
    exact = torch.randn(64, dtype=torch.float64)
    same = (exact + 1e-6 * torch.randn(64, dtype=torch.float64)).float()
    worse = (exact + 3 * (same.double() - exact)).float()
    assert not error_report(worse, same, exact).ok
    assert competitors.check_peer(worse, same, exact).max_error > 0
    for wrong in (same.bfloat16().float(), same.flip(0), torch.zeros(64), same * float("nan")):
        with pytest.raises(competitors.Unavailable, match="does not compute this model"):
            competitors.check_peer(wrong, same, exact)


# The machine's name


@pytest.mark.parametrize(
    ("cpu", "cores", "numbers", "name"),
    [
        ("AMD EPYC", 2, (23, 1), "epyc-zen1-2c"),
        ("AMD EPYC", 2, (25, 17), "epyc-zen4-2c"),
        ("AMD EPYC", 2, (25, 255), "epyc-family25-model255-2c"),
        ("AMD EPYC", 2, (None, None), "epyc-2c"),
        ("AMD EPYC 7763 64-Core Processor", 8, (25, 1), "epyc-7763-8c"),
        ("AMD Ryzen 9 7950X 16-Core Processor", 16, (25, 97), "ryzen-9-7950x-16c"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 4, (6, 106), "xeon-platinum-8375c-4c"),
        ("Intel(R) Xeon(R) Processor @ 2.80GHz", 2, (6, 106), "xeon-icelake-2c"),
        ("Intel(R) Xeon(R) Processor", 2, (6, 999), "xeon-model999-2c"),
        ("Intel(R) Core(TM) i7-1185G7 @ 3.00GHz", 4, (6, 140), "core-i7-1185g7-4c"),
        ("Apple M2", 8, (None, None), "apple-m2-8c"),
        ("", 1, (None, None), "cpu-1c"),
    ],
)
def test_machine_name(cpu, cores, numbers, name):
    assert machine.machine_name(cpu, cores, *numbers) == name


def test_rows_outlive_an_update_of_the_system_and_name_it(monkeypatch):
    monkeypatch.setattr(machine.platform, "release", lambda: "6.1")
    where, run = machine.this_machine(), machine.this_software()
    old = results.new_report(where, run, [{"suite": "models", "group": "a", "ms": 1.0}])
    monkeypatch.setattr(machine.platform, "release", lambda: "6.2")
    assert machine.this_machine() == where
    now = machine.this_software()
    assert (run["kernel"], now["kernel"]) == ("6.1", "6.2")
    new = results.new_report(where, now, [{"suite": "models", "group": "b", "ms": 2.0}])
    both = results.merge(old, new)
    assert both["runs"] == [run, now]
    assert [(row["group"], row["run"]) for row in both["rows"]] == [("a", 0), ("b", 1)]
    with pytest.raises(ValueError, match=r"do not mix: .*: name another folder with --out"):
        results.merge(old, {**new, "machine": {**where, "cores": 99}})


def test_no_path_of_a_machine_is_kept(monkeypatch):
    for name, value in (
        ("STRASSEN", "0"),
        ("CACHE", str(Path("some") / "folder")),
        ("BUILD_CACHE", "kept"),
    ):
        monkeypatch.setenv(f"CONVMIXER_FAST_{name}", value)
    asked = machine.this_software()["environment"].split()
    assert {"CONVMIXER_FAST_STRASSEN=0", "CONVMIXER_FAST_CACHE"} <= set(asked)
    assert not [each for each in asked if "BUILD" in each or "folder" in each]


# Figures in the README and the documentation


@pytest.mark.parametrize("page", figures.pages(), ids=lambda p: p.name)
def test_figures_in_pages_are_those_of_the_result_files(page):
    text = page.read_text()
    assert figures.filled(text) == text, "run: python benchmarks/report.py --readme"


def test_the_readme_names_its_hardware_and_shows_one_chart():
    readme, *_ = figures.pages()
    text = readme.read_text()
    assert "<!-- figures: headline -->\n" in text
    assert re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) == ["docs/overview.svg"]
    assert figures.hardware() in text
    measured = (figures.ROOT / "docs" / "measured.md").read_text()
    assert "Predictions, not measurements" in measured


def test_the_readmes_chart_is_drawn_from_the_result_files():
    (told,) = re.findall(r"<dc:description>(.*?)</dc:description>", figures.OVERVIEW.read_text())
    files = sorted(figures.RESULTS.glob("*/cpu.json"))
    drawn = charts.overview_data(map(results.load, files))
    assert json.loads(html.unescape(told)) == json.loads(json.dumps(drawn)), (
        "run: python benchmarks/report.py --readme"
    )


def test_only_the_readmes_chart_is_kept_in_the_repository():
    if not (figures.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(figures.ROOT), "ls-files", "*.svg"]
    kept = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert kept == [str(figures.OVERVIEW.relative_to(figures.ROOT))]


def test_the_overview_is_against_eager_pytorch_in_its_faster_layout(tmp_path):
    pytest.importorskip("matplotlib")
    speeds = {"eager NCHW": 2000.0, "eager channels-last": 1500.0, "torch.compile": 1200.0}
    speeds |= {"torch.compile + freezing": 1250.0, "OpenVINO": 900.0, "peak": 1.0}
    made = made_of(rows("1536/20", ours=1000.0, **speeds) + rows("256/8", ours=1.0))
    (panel,) = charts.overview_data([made])
    assert panel["speeds"] == [
        (
            "1536/20, batch 4",
            {"convmixer_fast": 1.5, "torch.compile": 1.25, "OpenVINO": 1.667},
        )
    ]
    charts.overview([made], tmp_path / "overview.svg")
    picture = (tmp_path / "overview.svg").read_text()
    for label in ("1536/20, batch 4", "OpenVINO", "convmixer_fast"):
        assert f">{label}</text>" in picture
    assert ">ONNX Runtime</text>" not in picture
    results.save(made, tmp_path / "some-machine" / "cpu.json")
    told = figures.headline(tmp_path)
    assert "1.50 times eager, 0.90 times the fastest peer" in told
    assert "slower than a peer: 1536/20, batch 4 (0.90)." in told
    assert "No GPU has been measured yet" in told


def test_the_page_of_measurements_has_every_table_of_every_machine(tmp_path):
    """Of CPUs and GPUs, files to results, and streams."""
    streamed = {"suite": "times", "group": "m@8x8, 1 threads", "model": "m", "us/kpx": 1.0}
    measured = {
        "cpu": rows(ours=1000.0, **{"eager NCHW": 900.0, "peak": 1.0}),
        "inference": [pipeline_row(**{"overhead ms": 7.25, "model": "m"})],
        "streaming": [
            {**streamed, "system": s, "s": t} for s, t in (("stream", 3.0), ("whole", 2))
        ],
        "gpu": [
            {**on_gpu("models", "ours", ms=10.0), "img/s": 1.0},
            {**on_gpu("models", "eager NCHW", ms=7.0), "img/s": 1.4},
        ],
    }
    for name, found in measured.items():
        machine_ = {**MACHINE, "gpu": "Card"} if name == "gpu" else MACHINE
        path = tmp_path / "some-machine" / f"{name}.json"
        results.save(results.new_report(machine_, RUN, found), path)
    told = figures.measured(tmp_path)
    assert told.count("## some-machine\n") == 1
    for title in ("Whole models", "Files to results", "Streams: time against the whole image"):
        assert f"### {title}\n" in told
        assert f"**{title}.**" in figures.legend(tmp_path)
    for name in measured:
        assert f"Date 2025-01-31, torch 2.9.0, engine aa (`some-machine/{name}.json`)." in told
    assert "<!-- chart: some-machine/cpu-models -->" in told
    lines = told.splitlines()
    assert "| 1536/20 | 4 | 2 | 4 | 1000 | 1 | **0.90** |" in lines, "peak is no peer"
    assert "| Card | bfloat16 | 768/32 | 64 | 1 | 10 | **0.70** |" in lines
    assert any("| 7.25 |" in line for line in lines)
    assert figures.hardware(tmp_path) == "Measured figures come from CPUs and from GPUs: Card."


def test_a_changed_figure_is_put_right_and_nothing_else_is_touched():
    page = "before 1.5\n<!-- figures: roofline -->\nold\n<!-- end of figures -->\nafter 2.5\n"
    new = figures.filled(page)
    assert new.startswith("before 1.5\n<!-- figures: roofline -->\n| model |")
    assert new.endswith("<!-- end of figures -->\nafter 2.5\n")
    assert "old" not in new
    assert figures.filled(new) == new


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("<!-- figures: nobody -->\n<!-- end of figures -->", "unknown figures nobody"),
        ("<!-- figures: roofline -->\n", "has no"),
    ],
)
def test_a_mark_that_cannot_be_filled_is_an_error(page, error):
    with pytest.raises(ValueError, match=error):
        figures.filled(page)


def test_ours_stands_beside_timms_row_only_from_the_same_hardware_and_precision():
    row = {"model": "convmixer_768_32", "bench": "infer", "device": "RTX 4090", "img_size": 224}
    row |= {"precision": "amp float16"}
    ours = {"model": "768/32", "device": "NVIDIA GeForce RTX 4090", "precision": "amp"}
    ours |= {"infer_samples_per_sec": 2000.0, "infer_img_size": 224}
    slower = ours | {"infer_samples_per_sec": 1500.0}
    assert figures.measured_on_same_card(row, [slower, ours]) == ours
    for other in (
        {"device": "NVIDIA GeForce RTX 3090"},
        {"model": "1024/20"},
        {"infer_img_size": 256},
        {"precision": "float16"},
    ):
        assert figures.measured_on_same_card(row, [ours | other]) is None
    assert figures.measured_on_same_card(row | {"bench": "train"}, [ours]) is None


def test_published_rows_are_the_newest_of_each_setting_and_name_their_file():
    published = json.loads(figures.PUBLISHED.read_text())
    newest = figures.newest(published["rows"])
    assert 0 < len(newest) < len(published["rows"])
    for row in newest:
        assert row["file"].startswith("results/benchmark-")
        number = [int(n) for n in row["torch"].split(".")]
        same = [r for r in published["rows"] if {**r, **_run_of(row)} == row]
        assert number == max([int(n) for n in r["torch"].split(".")] for r in same)


def _run_of(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("torch", "batch_size", "samples_per_sec", "file")}


def pipeline_row(**changed: Any) -> dict[str, Any]:
    row = {"suite": "pipeline", "group": "m", "model": "m", "cores": 2, "model ms": 10.0}
    row |= {"decode ms": 6.0, "overhead ms": 1.5, "of the model alone": 0.96, "of the limit": 0.97}
    return row | changed


@pytest.mark.parametrize(
    ("changed", "measured"),
    [
        ({}, [1.5, 0.96]),
        ({"overhead ms": 2.5, "of the model alone": 0.9}, [2.5, 0.9]),
        # Decoding is the longer half: the model alone is no measure then.
        ({"decode ms": 11.0, "of the model alone": 0.7}, [1.5, 0.97]),
        ({"cores": 1, "of the limit": 0.9}, [1.5, 0.9]),
    ],
)
def test_files_to_results_are_held_against_what_can_be_reached(changed, measured):
    found = report.findings(made_of([pipeline_row(**changed)]))
    assert [x.measured for x in found] == measured


def test_the_speed_of_the_model_next_to_busy_cores_is_a_detail():
    row = pipeline_row(**{"of the model alone": 0.9, "of the model beside": 0.99})
    found = report.findings(made_of([row]))[1]
    assert found.measured == 0.9
    assert found.detail.endswith("; against the model while other cores decode: 0.99")


def test_findings_of_streams_by_height_and_against_the_whole_image():
    height = {"suite": "heights", "group": "g", "model": "m", "system": "stream"}
    measured = [
        {**height, "height": h, "MiB": mib, "us a row": us}
        for h, mib, us in ((2048, 500, 10.0), (16384, 510, 10.5))
    ]
    measured.append({**height, "height": 2048, "system": "eager", "MiB": 900, "us a row": 20.0})
    time = {"suite": "times", "group": "m@8x8", "model": "m", "us/kpx": 1.0}
    measured += [{**time, "system": s, "s": t} for s, t in (("stream", 3.0), ("whole", 2.0))]
    found = {x.what: x for x in report.findings(made_of(measured))}
    assert found["stream, peak memory, most / least, g"].measured == pytest.approx(1.02)
    assert found["stream, time of a row, most / least, g"].measured == pytest.approx(1.05)
    assert found["time of a stream / of the whole image, m@8x8"].measured == pytest.approx(1.5)
    assert found["stream, peak memory, most / least, g"].detail == "heights 2048, 16384"


@pytest.mark.parametrize("wrong", ["missing", "repeated", "wrongly failed"])
def test_one_image_that_is_not_there_once_breaks_the_promise(wrong):
    row = {"suite": "kills", "group": "csv", "results": "csv", "kills": 5, "images": 9, "rows": 8}
    row |= {"errors": 1, "missing": 0, "repeated": 0, "wrongly failed": 0}
    good, bad = (report.findings(made_of([r])) for r in (row, {**row, wrong: 1}))
    assert [x.kept for x in good] == ["yes"]
    assert [x.kept for x in bad] == ["no"]
    text = report.markdown(made_of([row, pipeline_row()]))
    assert "Every image once" in text
    assert "of peak" not in text, "the summary tells of suites that were not run"
