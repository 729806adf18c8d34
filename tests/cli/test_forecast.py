"""What `doctor` says of a job is what the job then takes: the peak of its process and the bytes of its folder."""

import os
import re
import subprocess
import sys

import pytest
import torch

from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from tests.models_for_tests import _write, write_model

# reads the peak of its own address space: the peak that a parent is told begins with the parent's own size
PEAK = """
import sys
from pathlib import Path
from slotmemory.cli import main
try:
    main(sys.argv[1:])
finally:
    print("peak", dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())["VmHWM"].split()[0])
"""
SCRIPT = """
seed: 3
shots:
  - {prompt: A red cat walks in the meadow., seconds: 1.5}
  - {prompt: A blue ghost jumps in the snow., seconds: 1.5}
"""
UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def said(pattern, text):
    """The bytes that a line of output says."""
    count, unit = re.search(pattern + r" about ([\d.]+) (\w+)", text).groups()
    return float(count) * UNITS[unit]


def large(folder):
    """A model of 143 MB, most of what its process takes beside torch."""
    write_model(folder)
    config = WanConfig(
        dim=512, ffn_dim=2048, num_heads=8, num_layers=8, freq_dim=16, text_dim=8, text_len=12, patch=(1, 1, 1)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _write(CausalWan(config), folder / "transformer.safetensors", config.to_json())
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell what a process held")
@pytest.mark.parametrize("make, memory", [(write_model, "slots"), (large, "everything")])
def test_memory_of_the_process_and_disk_are_forecast_within_a_tenth(tmp_path, make, memory):
    model = make(tmp_path / "model")
    (tmp_path / "script.yaml").write_text(SCRIPT)
    job = ["script.yaml", "--model", model, "--memory", memory, "--dtype", "fp32"]

    def run(*words):
        command = [sys.executable, "-c", PEAK, *map(str, words)]
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | one, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = run("doctor", *job, "--trial")
    made = run("generate", *job, "--threads", "1", "--out", "run")
    peak = int(made.split("peak ")[1].split()[0]) * 1024
    assert said("takes +", told) == pytest.approx(peak, rel=0.1)
    size = sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert said("disk +", told) == pytest.approx(size, rel=0.1)
