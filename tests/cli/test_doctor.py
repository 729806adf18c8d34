"""doctor: what the machine offers, what a job takes; and a job that cannot fit is refused before it starts."""

import pytest
import torch

from slotmemory.backbones import kernels
from slotmemory.cli import disk, fit
from slotmemory.errors import InputError
from tests.cli.conftest import words_of

MB = 10**6


@pytest.fixture
def free(monkeypatch):
    """Say how much memory is free."""
    return lambda count: monkeypatch.setattr(fit, "free_bytes", lambda device: count)


def test_it_names_kernels_free_memory_disk_and_optional_parts(slotmemory, model):
    done = slotmemory("doctor", "--model", model)
    assert done.status == 0, done.err
    for text in ("kernels", "flash: ", "free memory", "on the processor", "free disk"):
        assert text in done.out
    assert "diffusers" in done.out and "checksum" in done.out and "takes" not in done.out


def test_with_a_script_it_says_what_it_takes(slotmemory, model, script):
    done = slotmemory("doctor", script, "--model", model, "--memory", "sink", "-m", "window=6", "--dtype", "fp32")
    assert done.status == 0, done.err
    assert "5 chunks of 48x32, memory sink" in done.out and "it fits" in done.out
    assert "72 tokens per layer in memory" in done.out  # 6 - 3 frames of 24 tokens
    assert "of memory at the most" in done.out and "of them taken now" in done.out
    assert "disk        about " in done.out and "--trial measures them); it fits here" in done.out


def test_what_the_script_asks_for_is_forecast(slotmemory, model, script):
    script.write_text(f"options: {{model: {model}, memory: none}}\n" + script.read_text())
    plain, large = (slotmemory("doctor", script, "--scale", scale).out for scale in (2, 8))
    assert "memory none" in plain and "0 tokens per layer" in plain
    video = [float(out.split("(video ")[1].split()[0]) for out in (plain, large)]
    pixels = [57 * 96 * 64, 57 * 384 * 256]
    assert video == pytest.approx([disk.VIDEO * count / 1000 for count in pixels], rel=0.03)  # kB


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "tyni"], "slotmemory: unknown model 'tyni'; known: "),
        (["--model", "./mine.yaml"], "slotmemory: mine.yaml: like: unknown preset 'longlve'"),
        (["--model", "empty/"], "slotmemory: {}/empty holds no transformer"),
    ],
)
def test_a_complaint_names_the_model_once(slotmemory, tmp_path, words, said):
    (tmp_path / "mine.yaml").write_text("like: longlve\n")
    (tmp_path / "empty").mkdir()
    done = slotmemory("doctor", *words)
    assert done.status == 2 and f"{words[1]}: not usable" in done.out
    assert done.err.startswith(said.format(tmp_path)) and "model '" not in done.err.replace("unknown model '", "")


def test_a_complaint_that_does_not_say_of_which_model_is_told_it(slotmemory, monkeypatch):
    def refuse(*_):
        raise InputError("its tokenizer is damaged")

    monkeypatch.setattr("slotmemory.cli.doctor._model", refuse)
    assert slotmemory("doctor", "--model", "tiny").err == "slotmemory: model 'tiny': its tokenizer is damaged\n"


def test_what_is_wrong_with_the_memory_of_a_job_is_no_fault_of_the_model(slotmemory, model, script):
    done = slotmemory("doctor", script, "--model", model, "--memory", "sink", "-m", "windov=6")
    assert done.status == 2 and "checksum" in done.out and "not usable" not in done.out
    assert done.err == "slotmemory: unknown argument of memory 'sink' 'windov'; did you mean 'window'?\n"


def test_a_preset_that_is_not_here_is_forecast_and_not_fetched(slotmemory, script, monkeypatch, free):
    pytest.importorskip("diffusers", reason="the Wan VAE needs diffusers: pip install 'slotmemory[wan]'")
    monkeypatch.setattr("slotmemory.checkpoints.hub.cached", lambda address: None)
    monkeypatch.setattr("slotmemory.checkpoints.hub.fetch", lambda addresses: pytest.fail("it was fetched"))
    free(17 * 10**9)
    script.write_text("shots: [{prompt: A cat., seconds: 30}]")
    done = slotmemory("doctor", script, "--model", "longlive", "--memory", "sink", "--dtype", "bf16")
    assert done.status == 0, done.err
    assert "not on this machine yet; its first use fetches Efficient-Large-Model/LongLive-1.3B" in done.out
    assert "40 chunks of 832x480" in done.out and "14040 tokens per layer" in done.out
    assert "does not fit: --budget " in done.out


@pytest.mark.parametrize(
    "count, words, expected",
    [
        (1, [], ["about 51 MB of memory and 1 bytes are free", "use a smaller picture", "--dtype bf16 halves it"]),
        (
            fit.FIRST_USE + 1_100_000,
            ["--memory", "everything"],
            ["another memory, such as --memory sink --budget ", "or a device with"],
        ),
    ],
)
def test_a_job_that_cannot_fit_is_refused_before_anything_is_written(
    slotmemory, script, model, tmp_path, free, count, words, expected
):
    free(count)
    done = slotmemory(*words_of(script, model, "run", "--dtype", "fp32", *words))
    assert done.status == 2 and done.err.count("\n") == 1 and not (tmp_path / "run").exists()
    for text in expected:
        assert text in done.err


def test_the_budget_that_is_advised_does_fit(slotmemory, script, model, tmp_path, free):
    free(fit.FIRST_USE + 1_050_000)
    words = ["--memory", "sink", "-m", "window=12", "--dtype", "fp32"]
    advised = slotmemory(*words_of(script, model, "run", *words)).err.split("--budget ")[1].split()[0]
    done = slotmemory(*words_of(script, model, "run", *words, "--budget", advised))
    assert done.status == 0, done.err


def test_what_the_system_does_not_tell_refuses_nothing(slotmemory, script, model, free):
    free(None)
    assert slotmemory("doctor", script, "--model", model).out.count("does not tell") == 2


def test_an_accelerator_needs_room_for_its_driver_and_the_text_encoder(free):
    footprint = fit.Footprint({"weights": 3000 * MB, "memory": 1000 * MB}, 11000 * MB, 100, 10 * MB, 0)
    cpu, gpu = (fit.Forecast(footprint, torch.device(kind), 14600 * MB) for kind in ("cpu", "cuda"))
    assert cpu.needed == 14000 * MB + fit.FIRST_USE and cpu.fits
    assert gpu.needed == 14000 * MB * 1.05 + 500 * MB and not gpu.fits
    assert "use --offload text" in fit.advice(gpu, torch.bfloat16)


def test_what_rests_on_the_processor_needs_room_there():
    footprint = fit.Footprint({"weights": 3000 * MB}, 0, 0, 10 * MB, 0, host=900 * MB)
    short, enough = (
        fit.Forecast(footprint, torch.device("cuda"), 80_000 * MB, resident=400 * MB, host_free=free)
        for free in (700 * MB, 1000 * MB)
    )
    assert enough.fits and enough.process == 1350 * MB
    with pytest.raises(
        InputError, match="950 MB of the processor's memory beside cuda .* leave out --offload, or free 250"
    ):
        fit.refuse(short, torch.bfloat16)


def test_mapped_files_count_in_what_the_process_holds_and_not_in_what_it_needs():
    footprint = fit.Footprint({"weights": 100 * MB}, 0, 0, 10 * MB, 0)
    found = fit.Forecast(footprint, torch.device("cpu"), 200 * MB, resident=300 * MB, reading=800 * MB)
    assert found.process == 1150 * MB and found.needed == 150 * MB and found.fits
    assert "800 MB of it while weights are read" in fit.told(found, torch.bfloat16)[-1]


def test_a_disk_without_room_is_refused_before_anything_is_loaded(slotmemory, script, model, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_disk", lambda folder: 100_000)
    monkeypatch.setattr("slotmemory.engine.Engine.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    done = slotmemory(*words_of(script, model, "run"))
    assert done.status == 2 and done.err.count("\n") == 1 and not (tmp_path / "run").exists()
    for text in ("of disk and 100 kB are free at run (video ", "or --out on a disk with "):
        assert text in done.err


def test_the_scale_that_is_advised_does_fit_on_the_disk(slotmemory, script, model, monkeypatch):
    monkeypatch.setattr(disk, "free_disk", lambda folder: 500_000)
    refused = slotmemory(*words_of(script, model, "run", "--scale", "16"))
    assert refused.status == 2 and refused.err.count("\n") == 1
    advised = int(refused.err.split("--scale ")[1].split(" would fit")[0])

    def load(*_, **__):
        raise InputError("there is room")

    monkeypatch.setattr("slotmemory.engine.Engine.from_pretrained", load)
    fits, larger = (slotmemory(*words_of(script, model, "run", "--scale", advised + more)).err for more in (0, 1))
    assert "there is room" in fits and f"--scale {advised} would fit" in larger


def test_what_a_run_holds_already_needs_no_room_again(tmp_path):
    found = disk.Disk({"video": 1000, "state": 2000, "pictures": 400, "trace": 0}, beside=2000)
    assert (found.total, found.least) == (3400, 4000 + 1400 // disk.CALMER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "free_disk", lambda folder: 3000)
        with pytest.raises(InputError, match="a smaller --budget makes a smaller state"):
            disk.refuse_disk(found, tmp_path / "run", 1)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "state.safetensors").write_bytes(bytes(2000))
        disk.refuse_disk(found, tmp_path / "run", 1)


# kernels


def test_the_kernels_of_this_machine_agree_with_the_formula():
    found = kernels.check(torch.device("cpu"), torch.float32, 64)
    assert all(kernel.right for kernel in found)
    assert any(kernel.error is not None for kernel in found)  # torch has a fused kernel for processors


@pytest.mark.parametrize(
    "harm", [lambda x: x * 1.01, lambda x: x / 0, lambda x: x * float("nan")], ids=["off", "infinite", "no number"]
)
def test_a_wrong_kernel_is_switched_off_with_a_message(monkeypatch, caplog, harm):
    switched = []
    backend = kernels.FUSED["flash"][0]
    monkeypatch.setattr(kernels, "FUSED", {"flash": (backend, switched.append)})
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", lambda q, k, v: harm(kernels.formula(q, k, v)))
    (kernel,) = kernels.check.__wrapped__(torch.device("cpu"), torch.float32, 32)
    assert switched == [False] and not kernel.right and "WRONG" in str(kernel)
    assert "the flash attention kernel is wrong by up to" in caplog.text


def test_a_kernel_that_is_not_built_in_is_passed_over(monkeypatch, caplog):
    def absent(q, k, v):
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", absent)
    found = kernels.check.__wrapped__(torch.device("cpu"), torch.float32, 32)
    assert [kernel.error for kernel in found] == [None] * 3 and not caplog.text and "not here" in str(found[0])
