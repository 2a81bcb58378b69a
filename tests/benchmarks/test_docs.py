"""The page of benchmarks shows what is stored, and every table that it asks for is some script's."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import attention, dense, docs, representation
from benchmarks.labelled_sets import SETS
from benchmarks.markdown import fill
from benchmarks.report import RESULTS

MACHINE = {"device": "x86_64", "cores": 2, "torch": "2.14", "commit": "0123456789abcdef"}


def store(folder: Path, script: str, rows: list[dict]) -> None:
    told = {"machine": MACHINE, "arguments": {"rounds": "3", "json": "x.json"}, "rows": rows}
    (folder / f"{script}.json").write_text(json.dumps(told))


def test_tables_come_from_stored_rows(tmp_path):
    row = {"variant": "matmul", "size": "ViT-B", "dtype": "float32", "median_s": 0.002, "p20_s": 0.001}
    store(tmp_path, "attention", [row | {"p80_s": 0.003, "ratio": 1.5}])
    found = docs.collect(tmp_path)
    assert "| ViT-B | float32 | matmul | 2.00 | 1.00–3.00 | 1.50 |" in found["attention"]
    assert found["attention"].endswith(
        "<sub>x86_64, 2 cores, torch 2.14, commit 0123456789abcdef; rounds=3</sub>"
    )


def test_fewer_threads_than_cores_are_told():
    told = {"machine": MACHINE | {"cores": 16, "threads": 4}, "arguments": {}}
    assert (
        docs.origin(told) == "<sub>x86_64, 4 threads of 16 cores, torch 2.14, commit 0123456789abcdef</sub>"
    )
    told["machine"]["threads"] = 16
    assert "x86_64, 16 cores, torch" in docs.origin(told)


def test_rows_of_another_machine_are_tables_beside_those_of_the_first(tmp_path):
    row = {"variant": "sdpa", "size": "ViT-B", "dtype": "float32", "median_s": 0.002, "p20_s": 0.001}
    store(tmp_path, "attention", [row | {"p80_s": 0.003, "ratio": 1.0}])
    store(tmp_path, "attention.h100", [row | {"median_s": 0.001, "p80_s": 0.003, "ratio": 1.0}])
    found = docs.collect(tmp_path)
    assert found.keys() == {"attention", "attention_h100"}
    assert "| 2.00 |" in found["attention"] and "| 1.00 | 1.00–3.00 |" in found["attention_h100"]


def test_a_result_of_no_script_is_refused(tmp_path):
    store(tmp_path, "nothing", [])
    with pytest.raises(ValueError, match=r"benchmarks/nothing\.py"):
        docs.collect(tmp_path)


def test_the_page_is_up_to_date():
    page = docs.PAGE.read_text()
    assert fill(page, docs.collect(RESULTS), partly=True) == page, "run `make bench-docs`"


def test_the_page_of_evaluation_shows_what_is_stored():
    folder, tables = docs.PAGE.parents[1] / "docs", {}
    for path in (folder / "results").glob("*.json"):
        told = json.loads(path.read_text())
        if path.stem == "dense":
            tables["dense"] = dense.figures_table(told)
            continue
        tables[path.stem] = representation.accuracy_table(told, SETS[path.stem])
        if representation.PLAIN in told["rows"]:
            tables[f"{path.stem}_equal_time"] = representation.race_table(told, SETS[path.stem])
    page = (folder / "evaluation.md").read_text()
    shown = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert tables.keys() == {name for name, text in shown if "Not measured yet" not in text}
    assert fill(page, tables, partly=True) == page


def test_the_page_asks_for_tables_that_scripts_make():
    page = docs.PAGE.read_text()
    sources, stored = (
        "".join(path.read_text() for path in docs.PAGE.parent.glob("*.py")),
        docs.collect(RESULTS),
    )
    for name in re.findall(r"<!-- table: (\w+) -->", page):
        assert f'"{name}":' in sources or name in stored


def test_backends_that_differ_are_not_compared():
    import torch

    one, other = torch.ones(3), torch.full((3,), 1.1)
    same = {"sdpa": lambda: (one, one), "matmul": lambda: (one, one)}
    attention.require_same(same, 1e-6)
    for what, pair in {"result": (other, one), "gradient": (one, other)}.items():
        with pytest.raises(SystemExit, match=f"the {what} of matmul differs .* no speed-up is told"):
            attention.require_same(same | {"matmul": lambda pair=pair: pair}, 1e-2)
