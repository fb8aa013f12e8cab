"""Every script, copied alone into an empty folder, trains past its first updates."""

import json
import math
import re

import pytest
import torch
from conftest import SCRIPTS, fields, run_alone, scalars, small_args

FINAL = r"final: return -?\d+\.\d\d ± \d+\.\d\d over \d+ episodes? \| \d+ steps \| \d+\.\d s \| \d+ steps/s"
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU), pytest.param("cuda compiled", marks=ON_A_GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_trains_alone(script, device, tmp_path):
    device, *compiled = device.split()
    if device == "cuda" and "device" not in fields(script) or compiled and "compile" not in fields(script):
        pytest.skip("computes on the CPU only, or has no updates to compile")
    changes = {"device": device} if "device" in fields(script) else {}
    changes |= {"compile": True} if compiled else {}
    process, report = run_alone(script, tmp_path, **small_args(script, run_dir="run", **changes))
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(FINAL, process.stdout.strip().split("\n")[-1])
    assert not report["unchanged"], "parameters that no update reached"
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text()) == report["result"]
    assert json.loads((run / "args.json").read_text())
    logged = scalars(run)
    losses = [value for tag, points in logged.items() if tag.startswith("losses/") for _, value in points]
    assert losses or not report["trained"], "networks were trained, but no loss was logged"
    assert all(map(math.isfinite, losses))
    assert "eval/return" in logged
