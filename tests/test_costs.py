"""The table of costs: what is counted, what is measured, and the record that the notebook reads."""
import json
from pathlib import Path

import pytest

from finessl.bench.costs import BACKBONES, costs_table, main, measure_costs
from finessl.bench.runner import BenchConfig
from finessl.engine.peft_names import CONV_PEFT, VIT_PEFT

RECORD = Path(__file__).resolve().parent.parent / "figures" / "records" / "peft_costs.json"


def test_every_way_of_a_resnet_is_counted_and_timed():
    config = BenchConfig.from_name("timm:test_resnet", 2, "cpu", "float32", 32, peft="linear", pool=64)
    rows = measure_costs(config, rounds=2)
    assert tuple(rows) == CONV_PEFT and all(len(w["step_ms"]) == 2 and min(w["step_ms"]) > 0 for w in rows.values())
    norms = [m for m in config.encoder.modules() if hasattr(m, "running_mean")]
    assert rows["bn"]["trained"] == sum(2 * m.num_features for m in norms) and rows["linear"]["trained"] == 0
    assert rows["full"]["trained"] == sum(p.numel() for p in config.encoder.parameters())


def test_the_command_writes_a_record_and_prints_its_table(tmp_path, capsys):
    out = tmp_path / "costs.json"
    assert main(["--out", str(out), "--backbones", "pocket", "--batch", "2", "--rounds", "1"]) == 0
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    assert tuple(record["costs"]["pocket"]["ways"]) == VIT_PEFT and record["cpu"] and record["rounds"] == 1
    assert record["command"].startswith("python -m finessl.bench.costs --out") and "vpt-shallow" in said
    table = costs_table(record).loc["pocket"]
    assert table.loc["linear", "× linear"] == 1 and table.loc["full", "of full, %"] == 100
    (tmp_path / "mine.json").write_text("{}")
    for wrong in (["--out", str(tmp_path / "mine.json")], ["--out", str(out), "--rounds", "0"],
                  ["--out", str(out), "--backbones", "pockt"]):
        with pytest.raises(SystemExit): main(wrong)


def test_the_record_is_of_todays_ways():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for name in BACKBONES.split(","):
        ways = CONV_PEFT if "resnet" in name else VIT_PEFT
        assert tuple(record["costs"][name]["ways"]) == ways, name
        assert all(len(w["step_ms"]) == record["rounds"] >= 5 for w in record["costs"][name]["ways"].values())
    assert record["cpu"] and not record["dirty"]
