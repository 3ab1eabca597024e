"""The benchmarks' report says what the rows say; merging pieces loses none. Nothing is timed."""

from __future__ import annotations

import copy
import json
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

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
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


def line(measured: list[dict[str, Any]], *words: str) -> Any:
    """The one line of the summary that holds all these words."""
    found = [x for x in report.summary(made_of(measured)) if all(w in x.what for w in words)]
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


@pytest.mark.parametrize(("ms", "met"), [(1000 / 0.89, "no"), (1000 / 0.9, "yes"), (900.0, "yes")])
def test_share_of_peak_is_held_against_its_bar(ms, met):
    found = line(rows(ours=ms), "1536/20", "of peak")
    assert found.measured == pytest.approx(1000 / ms)
    assert (found.bar, found.aim, found.met) == (0.90, 1.00, met)


def test_speed_up_is_over_the_best_peer_and_names_the_missing():
    group = rows(ours=1000.0, **{"eager NCHW": 2000.0, "OpenVINO": 1400.0, "peak": 1.0})
    group.append({**group[0], "system": "ONNX Runtime", "note": "is missing"})
    del group[-1]["ms"]
    found = line(group, "1536/20", "best peer")
    assert found.measured == pytest.approx(1.4)
    assert found.met == "yes"
    assert found.detail == "best of 2: OpenVINO; not timed: ONNX Runtime"


def test_only_batch_4_on_2_threads_is_held_against_the_bars_of_whole_models():
    others = [{**row, "batch": 16, "group": "16"} for row in rows(ours=1.0, eager=5.0)]
    others += [{**row, "threads": 1, "group": "1"} for row in rows(ours=1.0, eager=5.0)]
    assert line(others, "1536/20", "of peak").measured is None
    assert line(others, "1536/20", "best peer").measured is None


def test_what_was_not_measured_is_neither_met_nor_missed():
    lines = report.summary(made_of([]))
    assert len(lines) >= 14
    for empty in lines:
        assert empty.measured is None
        assert empty.met == ""
        assert empty.row()["measured"] == "not measured"


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
    small = line(measured, "768/32", "batch 1 against")
    assert (small.measured, small.met) == (pytest.approx(0.89), "no")
    threads = line(measured, "768/32", "2 threads against 1")
    assert (threads.measured, threads.met) == (pytest.approx(10 / 5.2), "yes")
    assert "1.97" in threads.detail
    large = line(measured, "2048 px against 224 px")
    assert (large.measured, large.met, large.at_most) == (pytest.approx(1.11), "no", True)
    assert "against 83" in large.detail


def test_depthwise_half_alone_is_ours_and_nobody_elses():
    row = {"suite": "kernels", "group": "g", "model": "768 x 32 x 32, k=7, relu", "batch": 1}
    row |= {"threads": 2, "part": "depthwise half", "of peak": 0.6, "ms": 1.0}
    measured = [
        row | {"system": "ours"},
        row | {"system": "eager NCHW", "of peak": 0.1},
        row | {"system": "ours", "part": "block", "of peak": 0.9},
    ]
    found = line(measured, "depthwise half")
    assert (found.measured, found.met, found.aim) == (0.6, "yes", 0.75)


def test_memory_is_that_of_the_worst_batch():
    measured = [
        {"suite": "memory", "group": str(b), "model": "256/8", "batch": b, "system": s, "MiB": mib}
        for b, pair in {1: (90, 100), 16: (303, 300)}.items()
        for s, mib in zip(("ours", "eager NCHW"), pair, strict=True)
    ]
    found = line(measured, "256/8", "peak memory")
    assert (found.measured, found.met) == (pytest.approx(1.01), "no")
    assert found.detail.endswith(": 16")


def test_numerics_line_keeps_the_rules_verdict():
    row = {
        "suite": "numerics",
        "group": "256/8",
        "model": "256/8",
        "system": "ours, direct products",
    }
    row |= {"max error": 3e-7, "rms error": 1e-7, "max / eager's": 2.01, "rms / eager's": 1.5}
    # The rule allows a floor of rounding units above twice eager's error.
    found = line([row | {"within rule": True}], "256/8", "direct products")
    assert (found.measured, found.met) == (2.01, "yes")
    assert line([row | {"within rule": False}], "256/8", "direct products").met == "no"


def test_a_default_that_is_one_of_the_two_products_is_not_told_twice():
    row = {"suite": "numerics", "group": "256/8", "model": "256/8", "within rule": True}
    row |= {"max error": 3e-7, "rms error": 1e-7, "max / eager's": 1.1, "rms / eager's": 1.0}
    row |= {"system": "ours, variable not set"}
    assert line([row], "256/8", "variable not set").met == "yes"
    lines = report.summary(made_of([row | {"note": "the same bits as with direct products"}]))
    assert not [x for x in lines if "not set" in x.what]


def test_rounding_does_not_hide_a_missed_bar():
    assert report.Line("x", 0.8996, 0.90).row()["measured"] == "0.900"
    assert report.Line("x", 0.8996, 0.90).met == "no"


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
    assert "| what | bar | aim | measured | met | detail |" in table
    assert any(r.startswith("| 1536/20 | 4 | 2 | ours |") and "| 1.25 |" in r for r in table)
    assert any("a / b" in r for r in table)
    assert "![cpu-models.svg](cpu-models.svg)" in text
    speed = written[2].read_text()
    assert "![cpu-speed.svg](cpu-speed.svg)" in text
    # Every bar has its figure: 4 images in 0.8 s, and in 2.
    assert all(f"<!-- {label} -->" in speed for label in ("ours", "5", "2", "batch 4"))
    # 125 % of peak: the axis goes past the tallest bar.
    assert "<!-- 120 -->" in written[1].read_text()


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
        # Text is drawn as paths, and named in a comment before each.
        assert "<!--" in (tmp_path / chart).read_text()
    waterfall = (tmp_path / "cpu-steps.svg").read_text()
    assert all(f"<!-- {step} -->" in waterfall for step in steps)
    assert "| 256/8 | 4 | 2 | eager NCHW | 1.5 |" in text
    # The side itself, not a power of two.
    assert "<!-- 4096 -->" in (tmp_path / "cpu-resolution.svg").read_text()


def on_gpu(suite: str, system: str, **columns: Any) -> dict[str, Any]:
    row = timed(suite, system, model="768/32", batch=64, device="Card", dtype="bfloat16", **columns)
    del row["threads"]
    return row


def test_rows_of_a_gpu_get_promises_tables_and_charts_of_their_own(tmp_path):
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
    (promise,) = report.promises(made)
    assert promise.measured == pytest.approx(1.2), "our own graph is no peer"
    assert promise.detail == "best of 1: eager NCHW; not timed: TensorRT"
    path = tmp_path / "gpu.json"
    results.save(made, path)
    names = [p.name for p in report.write(path)]
    assert names == ["gpu.md", "gpu-models.svg", "gpu-speed.svg", "gpu-resolution.svg"]
    text = (tmp_path / "gpu.md").read_text()
    assert "| Card | bfloat16 |" in text
    assert "| of limit |" in text
    assert "not measured" not in text, "promises of a processor are told"
    assert "<!-- % of limit -->" in (tmp_path / "gpu-models.svg").read_text()


def test_the_same_rows_draw_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    made = made_of(rows("1536/20", ours=800.0, **{"eager NCHW": 2000.0}))
    pictures = []
    for name in ("a.svg", "b.svg"):
        assert charts.draw(made, "models", tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert not charts.draw(made, "memory", tmp_path / "c.svg")


def test_the_terminal_can_leave_out_what_was_not_measured():
    made = made_of(rows(ours=1000.0))
    whole, short = (report.text(made, report.tables(made, unmeasured=u)) for u in (True, False))
    assert "not measured" in whole
    assert "not measured" not in short
    assert "What it shows" in short


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


def test_the_readme_has_figures_and_marks_those_of_gpus_as_predictions():
    text = figures.pages()[0].read_text()
    for name in ("whole-models", "reached", "gpu-predicted"):
        assert f"<!-- figures: {name} -->\n" in text
    assert "Predictions, not measurements" in text


def test_what_was_missed_is_told_of_every_kind_of_result_file(tmp_path):
    """Of processors and GPUs, files to results, and streaming."""
    machines = {"cpu": MACHINE, "inference": MACHINE, "streaming": MACHINE}
    streamed = {"suite": "times", "group": "m@8x8, 1 threads", "model": "m"}
    late = {**on_gpu("models", "ours", ms=10.0), "img/s": 1.0}
    early = {**on_gpu("models", "eager NCHW", ms=7.0), "img/s": 1.4}
    measured = {
        "cpu": rows(ours=1000 / 0.5),
        "inference": [pipeline_row(**{"overhead ms": 7.25, "model": "m"})],
        "streaming": [
            {**streamed, "system": s, "s": t} for s, t in (("stream", 3.0), ("whole", 2))
        ],
        "gpu": [late, early],
    }
    for name, found in measured.items():
        machine_ = machines.get(name, {**MACHINE, "gpu": "Card"})
        path = tmp_path / "some-machine" / f"{name}.json"
        results.save(results.new_report(machine_, RUN, found), path)
    told = figures.missed(tmp_path)
    for name, figure in (("cpu", 0.5), ("inference", 7.25), ("streaming", 1.5), ("gpu", 0.7)):
        assert f"some-machine (`{name}.json`)" in told
        assert f"| {figure:.2f} |" in told, (name, told)
    assert figures.missed(tmp_path / "nowhere") == "Every bar was reached."
    counted = figures.reached(tmp_path)
    for name, worst in (("cpu", "0.50 for >= 0."), ("streaming", "1.50 for <= ")):
        assert f"| some-machine (`{name}.json`) | 0 of " in counted, counted
        assert worst in counted, counted


def test_exceptions_of_compiled_kernels_are_told_by_name(tmp_path):
    row = {"op": "patch_embed", "kernel": "p = 7", "dtype": "bfloat16", "broken_bars": []}
    row |= {"architecture": 100, "spills": 0, "stack": 0}
    cuda = {"architecture": 80, "kernel": "tf32-large", "stack": 0, "broken_bars": []}
    for name, static in (("gpu_static", [row]), ("cuda_static", [cuda])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"static": static}))
    assert figures.gpu_exceptions(tmp_path) == "Every kernel meets every bar."
    spilled = [{**row, "spills": 2, "architecture": arch} for arch in (90, 100)]
    cuda["broken_bars"] = ["no HMMA"]
    for name, static in (("gpu_static", [row, *spilled]), ("cuda_static", [cuda])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"static": static}))
    told = figures.gpu_exceptions(tmp_path).splitlines()
    assert len(told) == 4
    assert told[2] == (
        "| patch_embed, p = 7 | bfloat16 | sm_90, sm_100 | 2 values spilled (aimed at: 0) |"
    )
    assert told[3] == "| tf32-large |  | sm_80 | no HMMA |"


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
        ("<!-- figures: nobody -->\n<!-- end of figures -->", "no figures are called nobody"),
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
    assert figures.measured_beside(row, [slower, ours]) == ours
    for other in (
        {"device": "NVIDIA GeForce RTX 3090"},
        {"model": "1024/20"},
        {"infer_img_size": 256},
        {"precision": "float16"},
    ):
        assert figures.measured_beside(row, [ours | other]) is None
    assert figures.measured_beside(row | {"bench": "train"}, [ours]) is None


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
    ("changed", "measured", "met"),
    [
        ({}, [1.5, 0.96], ["yes", "yes"]),
        ({"overhead ms": 2.5, "of the model alone": 0.9}, [2.5, 0.9], ["no", "no"]),
        # Decoding is the longer half: the model alone is no measure then.
        ({"decode ms": 11.0, "of the model alone": 0.7}, [1.5, 0.97], ["yes", "yes"]),
        ({"cores": 1, "of the limit": 0.9}, [1.5, 0.9], ["yes", "no"]),
    ],
)
def test_files_to_results_are_held_against_what_can_be_reached(changed, measured, met):
    lines = report.inference_summary(made_of([pipeline_row(**changed)]))
    assert [x.measured for x in lines] == measured
    assert [x.met for x in lines] == met


def test_what_busy_neighbours_leave_the_model_is_told_beside_the_bar():
    row = pipeline_row(**{"of the model alone": 0.9, "of the model beside": 0.99})
    line = report.inference_summary(made_of([row]))[1]
    assert (line.measured, line.met) == (0.9, "no")
    assert line.detail.endswith("; of the model while other cores decode: 0.99")


@pytest.mark.parametrize("wrong", ["missing", "repeated", "wrongly failed"])
def test_one_image_that_is_not_there_once_misses_the_bar(wrong):
    row = {"suite": "kills", "group": "csv", "results": "csv", "kills": 5, "images": 9, "rows": 8}
    row |= {"errors": 1, "missing": 0, "repeated": 0, "wrongly failed": 0}
    good, bad = (report.inference_summary(made_of([r])) for r in (row, {**row, wrong: 1}))
    assert [x.met for x in good] == ["yes"]
    assert [x.met for x in bad] == ["no"]
    text = report.markdown(made_of([row, pipeline_row()]))
    assert "Every image once" in text
    assert "of peak" not in text, "promises of other suites are told"
