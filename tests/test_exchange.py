"""Exchange: what leaves comes back the same, and what comes from elsewhere draws the same pictures here."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import stirred
from snowmelt import checkpoint
from snowmelt.cli import run as cli
from snowmelt.config import Config, DataConfig, DiffusionConfig, TrainingConfig, UNetConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion import linear
from snowmelt.diffusion.guidance import clamped
from snowmelt.diffusion.process import linear_betas, log_snr_table
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.foreign.betas import PREDICTIONS, diffusion_of
from snowmelt.models import build_learner
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.presets import EXPORTED
from snowmelt.run import Run
from snowmelt.training.progress import Progress

pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")

TINY = UNetConfig(channels=(16, 32), attention=(False, True), head_channels=8)
CPU = Precision(torch.device("cpu"))


def run_of(path: Path, *, classes: tuple[str, ...] = (), network: UNetConfig = TINY, **diffusion: object) -> Run:
    """A run whose weights are chance."""
    data = DataConfig(8, 3, classes, tuple(range(1, 1 + len(classes))), 0.4, "fingerprint")
    levels = DiffusionConfig(**{"predicts": "v", "schedule": "cosine"} | diffusion)
    run = Run.create(path, Config(data, network=network, diffusion=levels, training=TrainingConfig(steps=5)))
    learner = build_learner(run.config, CPU)
    labels = torch.arange(64) % len(classes) if classes else None
    learner.model.study([Batch(torch.randn(64, 3, 8, 8), labels)])
    weights = stirred(learner.model).state_dict()
    groups = {"weights": weights, "average": weights, "optimizer": learner.optimizer_tensors()}
    checkpoint.save(run.checkpoints, 7, groups, Progress(step=7).as_dict())
    return run


def unet(**settings: object) -> UNet2DModel:
    """One of `diffusers`, as people make it: nearly everything as it comes."""
    small = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return stirred(UNet2DModel(**small | settings))


GOOGLE = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "layers_per_block": 2,
}
"""The settings of google/ddpm-cifar10-32 and its sisters."""


def saved(folder: Path, network: UNet2DModel, **scheduler: object) -> Path:
    DDPMPipeline(network, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def model_of(run: Run) -> DiffusionModel:
    model, _ = run.load_model(CPU)
    assert isinstance(model, DiffusionModel)
    return model.eval()


def imported(folder: Path, out: Path, *words: str) -> Run:
    assert cli(["import", str(folder), "--out", str(out), *words]) == 0
    return Run.open(out)


def exported(run: Run, out: Path, *words: str) -> Path:
    assert cli(["export", str(run.path), "--out", str(out), *words]) == 0
    return out


def average(run: Run) -> dict[str, Tensor]:
    return checkpoint.load(run.newest_checkpoint(), "average")


@torch.no_grad()
def drawn(model: DiffusionModel, steps: list[int], seed: int, count: int, *, ancestral: bool = False) -> Tensor:
    """What our samplers draw at the given steps of the table, from the noise of a pipeline; in [0, 1] like there."""
    rng = torch.Generator().manual_seed(seed)
    betas = torch.tensor(model.config.diffusion.betas or linear_betas().tolist(), dtype=torch.float64)
    # The level that stands for no picture at all is -20: alpha is 5e-5 there, which is nothing next to 1/255.
    levels = log_snr_table(betas).clamp(min=-20)[steps]
    data = model.config.data
    shape = (count, data.channels, data.size, data.size)
    x = torch.randn(shape, generator=rng)
    method = SAMPLERS["ddpm" if ancestral else "ddim"]
    walk = method(clamped(model.bind(None)), x, levels, lambda _: torch.randn(shape, generator=rng))
    return list(walk)[-1].x0 / 2 + 0.5


def of_pipeline(
    folder: Path, steps: int, seed: int, count: int, *, ancestral: bool = False
) -> tuple[Tensor, list[int]]:
    """The pictures of a folder, and the steps of the table that it visited."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is DDPMPipeline
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(seed)
    asked = {"batch_size": count, "generator": rng, "num_inference_steps": steps, "output_type": "pt"}
    if not ancestral:
        # Where the estimate was clipped, the noise that belongs to it is taken: as we do, and Ho et al. did.
        other = DDIMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
        other.set_progress_bar_config(disable=True)
        return other(**asked, use_clipped_model_output=True).images, other.scheduler.timesteps.tolist()
    return pipe(**asked).images, pipe.scheduler.timesteps.tolist()


# Out and back


def test_export_and_import_is_the_identity(tmp_path):
    run = run_of(tmp_path / "run", classes=("cat", "a dog"))
    folder = exported(run, tmp_path / "folder", "--keep-classes")
    back = imported(folder, tmp_path / "back")
    before, after = average(run), average(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert back.config.network == run.config.network and back.config.diffusion == run.config.diffusion
    assert back.config.data == dataclasses.replace(run.config.data, fingerprint="")
    again = exported(back, tmp_path / "again", "--keep-classes")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 5 and all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    for path in (run.path, back.path):
        words = ["--count", "3", "--steps", "4", "--classes", "a dog", "--out", str(path / "drawn")]
        assert cli(["sample", str(path), *words]) == 0
    drawn = [sorted((path / "drawn").glob("*.png")) for path in (run.path, back.path)]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*drawn, strict=True))


def test_what_was_told_of_changes_stays_at_home(tmp_path):
    """Pictures that are drawn are unchanged: elsewhere, and back here, the network draws the same without it."""
    run = run_of(tmp_path / "run", augment=0.5)
    back = imported(exported(run, tmp_path / "folder"), tmp_path / "back")
    assert back.config.diffusion == dataclasses.replace(run.config.diffusion, augment=0.0)
    before, after = average(run), average(back)
    (left,) = before.keys() - after.keys()
    assert left.endswith("told_embedding.weight") and all(torch.equal(before[name], after[name]) for name in after)


NETWORKS = {
    "today's": TINY,
    "mixed heads": UNetConfig(channels=(8, 16), attention=(True, True), head_channels=16),
    "everything else": UNetConfig(
        channels=(8, 16),
        attention=(True, False),
        blocks=2,
        groups=4,
        head_channels=8,
        dropout=0.1,
        embedding="add",
        epsilon=1e-6,
        halving="corner",
        sines_first=True,
        frequency_shift=1.0,
        middle_groups=2,
    ),
    "no attention": UNetConfig(channels=(8,), attention=(False,), middle_attention=False),
    "no norm in the middle": UNetConfig(channels=(8, 16), attention=(False, False), head_channels=4, middle_groups=0),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_network_opens_in_diffusers_and_comes_back(tmp_path, name):
    run = run_of(tmp_path / "run", network=NETWORKS[name], predicts="noise")
    folder = exported(run, tmp_path / "folder")
    theirs = DiffusionPipeline.from_pretrained(folder).unet
    back = imported(folder, tmp_path / "back")
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    answer = model_of(run).denoiser.backbone(x, time)
    assert torch.equal(model_of(back).denoiser.backbone(x, time), answer)
    # float32 through some twenty layers, each rounding by 6e-8.
    assert (theirs(x, time).sample - answer).abs().max() < 1e-5 * answer.abs().max()


@pytest.mark.parametrize(("predicts", "schedule"), [("noise", "linear"), ("image", "cosine"), ("v", "cosine")])
def test_the_exported_pipeline_draws_our_pictures(tmp_path, predicts, schedule):
    run = run_of(tmp_path / "run", predicts=predicts, schedule=schedule)
    folder = exported(run, tmp_path / "folder")
    for ancestral in (False, True):
        pictures, steps = of_pipeline(folder, 20, seed=5, count=3, ancestral=ancestral)
        assert len(steps) == 20 and steps[0] == 999
        ours = drawn(model_of(run), steps, seed=5, count=3, ancestral=ancestral)
        assert pictures.std() > 0.1
        # Their table is float32: at its noisy end alpha is off by 1e-5 of itself, and noise prediction divides by it.
        assert (pictures - ours.clamp(0, 1)).abs().max() < 1 / 255


@pytest.mark.parametrize("settings", [{}, GOOGLE, {"num_class_embeds": 4}], ids=["as it comes", "google", "classes"])
@torch.no_grad()
def test_an_imported_network_answers_like_the_original(tmp_path, settings):
    theirs = unet(**settings)
    run = imported(saved(tmp_path / "folder", theirs), tmp_path / "run")
    backbone = model_of(run).denoiser.backbone
    x, time = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 421.0, 999.0])
    labels = torch.tensor([0, 2, 3]) if "num_class_embeds" in settings else None
    reference = theirs(x, time, labels).sample
    # float32 through some thirty layers, each rounding by 6e-8.
    assert (backbone(x, time, labels) - reference).abs().max() < 1e-5 * reference.abs().max()


SCHEDULERS = {
    "linear": {"prediction_type": "sample"},
    "other ends": {"beta_start": 0.001, "beta_end": 0.03},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid", "beta_end": 0.03},
    "few": {"num_train_timesteps": 100, "beta_end": 0.2, "prediction_type": "v_prediction"},
    "zero": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "given": {"trained_betas": np.linspace(0.001, 0.05, 200).tolist(), "num_train_timesteps": 200},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_network_of_diffusers_draws_the_same_pictures_here(tmp_path, name):
    settings = SCHEDULERS[name]
    folder = saved(tmp_path / "folder", unet(), **settings, timestep_spacing="trailing")
    run = imported(folder, tmp_path / "run")
    assert bool(run.config.diffusion.betas) == (name != "linear")
    again = exported(run, tmp_path / "again")
    for draw in (folder, again):
        # The sigmoid table is DDPM's alone.
        ancestral = name == "sigmoid" and draw is folder
        pictures, steps = of_pipeline(draw, 20, seed=1, count=2, ancestral=ancestral)
        ours = drawn(model_of(run), steps, seed=1, count=2, ancestral=ancestral)
        assert (pictures - ours.clamp(0, 1)).abs().max() < 1 / 255
    back = imported(again, tmp_path / "back")
    assert back.config.diffusion == run.config.diffusion
    assert cli(["sample", str(run.path), "--count", "2", "--steps", "5"]) == 0


def test_a_learned_variance_is_learned_range_there(tmp_path):
    run = run_of(tmp_path / "run", variance="learned", predicts="noise")
    pipe = DiffusionPipeline.from_pretrained(exported(run, tmp_path / "folder"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.out_channels == 6 and pipe.scheduler.config.variance_type == "learned_range"
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)
    back = imported(tmp_path / "folder", tmp_path / "back")
    assert back.config.diffusion == run.config.diffusion
    before, after = average(run), average(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_a_class_becomes_part_of_the_network(tmp_path, capsys):
    """Also of one whose accent was typed otherwise than it was written."""
    run = run_of(tmp_path / "run", classes=("cat", "Cafe\u0301"))
    backbone = model_of(run).denoiser.backbone
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    for name, label in (("cat", 0), ("Caf\u00e9", 1), (None, 2)):
        words = [] if name is None else ["--class", name]
        pipe = DiffusionPipeline.from_pretrained(exported(run, tmp_path / str(name), *words))
        assert ("no class" if name is None else f"class {name}") in capsys.readouterr().err
        answer = backbone(x, time, torch.full((2,), label))
        # One sum is taken in another order, and float32 rounds by 6e-8 in every layer.
        assert (pipe.unet(x, time).sample - answer).abs().max() < 1e-5 * answer.abs().max()
        assert imported(tmp_path / str(name), tmp_path / f"{name}-back").config.data.classes == ()
    kept = DiffusionPipeline.from_pretrained(exported(run, tmp_path / "kept", "--keep-classes")).unet
    labels = torch.tensor([1, 2])
    answer = backbone(x, time, labels)
    assert (kept(x, time, labels).sample - answer).abs().max() < 1e-5 * answer.abs().max()


# In from elsewhere


def test_folders_of_the_first_days(tmp_path):
    """Everything in one place, attention by other names, half precision, `UNetRes` before the blocks."""
    theirs = unet(**GOOGLE)
    folder = saved(tmp_path / "folder", theirs)
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    settings = json.loads((folder / "config.json").read_text())
    settings["down_block_types"] = [f"UNetRes{name}" for name in settings["down_block_types"]]
    (folder / "config.json").write_text(json.dumps(settings))
    path = folder / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.") if "attentions" in name else name
        old[name] = tensor.half()
    assert any("proj_attn" in name for name in old)
    save_file(old, path)
    scheduler = json.loads((folder / "scheduler_config.json").read_text())
    del scheduler["prediction_type"]
    for predicts, of_noise in (("image", False), ("noise", True)):
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler | {"predict_epsilon": of_noise}))
        run = imported(folder, tmp_path / f"run-{predicts}")
        assert run.config.diffusion.predicts == predicts
    found = {name.removeprefix("denoiser.backbone."): tensor for name, tensor in average(run).items()}
    expected = theirs.state_dict()
    assert all(torch.equal(found[name], tensor.half().float()) for name, tensor in expected.items())


def test_a_network_alone_is_taken_as_that_of_ddpm(tmp_path, capsys):
    unet().save_pretrained(tmp_path / "alone")
    run = imported(tmp_path / "alone", tmp_path / "run")
    assert "does not say how the network was trained" in capsys.readouterr().err
    assert run.config.diffusion == DiffusionConfig(schedule="linear", predicts="noise")


def test_resuming_begins_with_the_imported_weights(tmp_path):
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    folder = saved(tmp_path / "folder", unet(in_channels=1, out_channels=1, num_class_embeds=11, **small))
    run = imported(folder, tmp_path / "run", "--pictures", "builtin:digits", "--steps", "3")
    data = run.config.data
    assert len(data.classes) == 10 and sum(data.counts) > 1000 and data.fingerprint
    start = checkpoint.load(run.newest_checkpoint(), "weights")
    assert int(run.newest_checkpoint().name) == 0
    assert all(torch.equal(start[name], tensor) for name, tensor in average(run).items())
    backbone = {name.removeprefix("denoiser.backbone."): tensor for name, tensor in start.items()}
    file = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(backbone[name], tensor) for name, tensor in file.items())
    assert cli(["train", "--resume", str(run.path)]) == 0
    lines = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(np.isfinite(line["loss"]) for line in lines)
    end = checkpoint.load(run.newest_checkpoint(), "weights")
    moved = {name: (end[name] - start[name]).abs().max() for name in start}
    # Three steps of at most the learning rate; networks that begin anew differ by their whole weights, 0.1 and more.
    assert all(distance < 1e-2 for distance in moved.values()) and max(moved.values()) > 1e-5
    assert json.loads((run.path / "status.json").read_text())["state"] == "finished"


def test_resuming_without_pictures_says_so(tmp_path, capsys):
    run = imported(saved(tmp_path / "folder", unet()), tmp_path / "run")
    before = sorted(run.path.rglob("*"))
    assert cli(["train", "--resume", str(run.path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--pictures SOURCE" in said
    assert {path for path in run.path.rglob("*") if path not in before} <= {run.path / ".lock", run.path / ".owner"}


def test_prepared_pictures_are_used_where_they_are(tmp_path):
    prepared = tmp_path / "digits"
    assert cli(["prepare", "builtin:digits", "--out", str(prepared)]) == 0
    folder = saved(tmp_path / "folder", unet(in_channels=1, out_channels=1, num_class_embeds=10))
    run = imported(folder, tmp_path / "run", "--pictures", str(prepared), "--every-label")
    assert run.data == prepared and not (run.path / "data").exists()
    rows = average(run)["denoiser.backbone.class_embedding.weight"]
    # A mean of ten in float32.
    torch.testing.assert_close(rows[10], rows[:10].mean(0), rtol=0, atol=1e-6)


def test_labels_without_pictures_are_numbers(tmp_path):
    run = imported(saved(tmp_path / "folder", unet(num_class_embeds=4)), tmp_path / "run")
    assert run.config.data.classes == ("0", "1", "2")
    assert cli(["sample", str(run.path), "--classes", "2", "--count", "1", "--steps", "3", "--guidance", "2"]) == 0


def test_notes_of_another_network_are_ignored(tmp_path):
    folder = exported(run_of(tmp_path / "run", classes=("cat", "dog")), tmp_path / "folder", "--keep-classes")
    notes = json.loads((folder / "snowmelt.json").read_text())
    notes["data"] |= {"classes": ["cat"], "counts": [1]}
    (folder / "snowmelt.json").write_text(json.dumps(notes))
    assert imported(folder, tmp_path / "back").config.data.classes == ("0", "1")


# ONNX


@pytest.mark.parametrize("classes", [(), ("cat", "dog")], ids=["no classes", "classes"])
@torch.no_grad()
def test_onnx_answers_alike(tmp_path, monkeypatch, classes):
    """With a linear estimate of large pictures, and with answers that are cut off, too."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(linear, "FINEST", 4)
    small = UNetConfig(channels=(8,), attention=(False,), head_channels=4)
    network = dataclasses.replace(TINY, patch=2, channels=(8, 16)) if classes else small
    betas = tuple(np.linspace(0.001, 0.05, 200).tolist()) if classes else ()
    predicts = {"predicts": "v", "linear": 4} if classes else {"predicts": "edm", "linear": 2, "censored": True}
    run = run_of(tmp_path / "run", classes=classes, network=network, betas=betas, **predicts)
    folder = exported(run, tmp_path / "folder", "--format", "onnx")
    about = json.loads((folder / "denoiser.json").read_text())
    assert (about["size"], about["channels"], about.get("classes", [])) == (8, 3, list(classes))
    session = onnxruntime.InferenceSession(folder / "denoiser.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == about["inputs"]
    assert np.all(np.diff(about["log_snrs"]) > 0)
    denoiser = model_of(run).denoiser
    for count in (1, 2, 7):
        for level in (-12.0, -9.7, -3.0, 0.0, 4.2, 9.2, 11.0):
            x, log_snr = torch.randn(count, 3, 8, 8), torch.full((count,), level)
            labels = torch.arange(count) % 3 if classes else None
            feed = dict(zip(about["inputs"], (x, log_snr, labels), strict=False))
            answer = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})[0]
            reference = denoiser(x, log_snr, labels).numpy()
            # float32 in another order of sums.
            assert abs(answer - reference).max() < 1e-4


def test_onnx_without_its_packages_names_them(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli(["export", str(run.path), "--out", str(tmp_path / "out"), "--format", "onnx"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'snowmelt[onnx]'" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Refusals


def change(path: Path, **values: object) -> None:
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, **values}))


def pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def with_weights(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        edit(weights)
        save_file(weights, path)

    return damage


def in_unet(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "unet" / "config.json", **values)


def in_scheduler(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "scheduler" / "scheduler_config.json", **values)


def in_index(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model_index.json", **values)


def with_notes(**data: object) -> Callable[[Path], None]:
    notes = {"format": 1, "data": {"size": 8, "channels": 3} | data, "diffusion": {"predicts": "noise"}}
    return lambda folder: (folder / "snowmelt.json").write_text(json.dumps(notes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled": (pickled, "safe_serialization=True"),
    "no weights": (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "is missing"),
    "cut": (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"123"), "is damaged"),
    "a weight less": (with_weights(lambda w: w.pop("conv_in.bias")), "first at conv_in.bias"),
    "a weight more": (with_weights(lambda w: w.update(extra=torch.zeros(1))), "first at extra"),
    "another shape": (with_weights(lambda w: w.update({"conv_in.bias": torch.zeros(3)})), "first at conv_in.bias"),
    "not finite": (with_weights(lambda w: w["conv_in.bias"].fill_(torch.nan)), "not finite"),
    "another pipeline": (in_index(_class_name="StableDiffusionPipeline"), "StableDiffusionPipeline"),
    "code of its own": (in_index(unet=["my_code", "MyNet"]), "my_code"),
    "another network": (in_unet(_class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
    "other blocks": (in_unet(down_block_types=["SkipDownBlock2D", "AttnDownBlock2D"]), "SkipDownBlock2D"),
    "not mirrored": (in_unet(up_block_types=["UpBlock2D", "AttnUpBlock2D"]), "up_block_types"),
    "other resampling": (in_unet(downsample_type="resnet"), "downsample_type"),
    "other activation": (in_unet(act_fn="gelu"), "act_fn"),
    "fourier": (in_unet(time_embedding_type="fourier"), "time_embedding_type"),
    "wide embedding": (in_unet(time_embedding_dim=7), "time_embedding_dim"),
    "scaled middle": (in_unet(mid_block_scale_factor=1.4), "mid_block_scale_factor"),
    "no middle": (in_unet(mid_block_type=None), "mid_block_type"),
    "centred input": (in_unet(center_input_sample=True), "center_input_sample"),
    "class by time": (in_unet(class_embed_type="timestep"), "class_embed_type"),
    "not square": (in_unet(sample_size=[8, 16]), "sample_size"),
    "no size": (in_unet(sample_size=None), "sample_size"),
    "odd size": (in_unet(sample_size=7), "sample_size"),
    "latents": (in_unet(in_channels=4, out_channels=4), "in_channels"),
    "variance unsaid": (in_unet(out_channels=6), "variance_type"),
    "groups": (in_unet(norm_num_groups=5), "norm_num_groups"),
    "heads": (in_unet(attention_head_dim=64), "attention_head_dim"),
    "no number": (in_unet(layers_per_block="two"), "layers_per_block"),
    "no list": (in_unet(block_out_channels=32), "block_out_channels"),
    "another scheduler": (in_scheduler(_class_name="ScoreSdeVeScheduler"), "ScoreSdeVeScheduler"),
    "another prediction": (in_scheduler(prediction_type="flow_prediction"), "prediction_type"),
    "another table": (in_scheduler(beta_schedule="laplace"), "beta_schedule"),
    "no betas": (in_scheduler(beta_start="a lot"), "a lot"),
    "betas too large": (in_scheduler(beta_end=2.0), "give numbers between 0 and 1"),
    "a list of predictions": (in_scheduler(prediction_type=["epsilon"]), "prediction_type = ['epsilon']"),
    "a list of tables": (in_scheduler(beta_schedule=["linear"]), "beta_schedule = ['linear']"),
    "a beta below 0": (in_scheduler(beta_schedule="scaled_linear", beta_start=-0.1), "betas from -0.1 to 0.02"),
    "a beta of 400 digits": (in_scheduler(beta_start=10**400), "give numbers between 0 and 1"),
    "given betas of 400 digits": (
        in_scheduler(trained_betas=[0.1, 10**400], num_train_timesteps=2),
        "trained_betas that are not 2 numbers between 0 and 1",
    ),
    "too many steps": (in_scheduler(num_train_timesteps=10**13), "give a whole number from 2 to 100,000"),
    "too few betas": (in_scheduler(trained_betas=[0.1, 0.2]), "trained_betas"),
    "noise of nothing": (in_scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    "all dropped": (in_unet(dropout=2.0), "network.dropout is 2.0"),
    "no shift": (in_unet(freq_shift=math.nan), "network.frequency_shift is nan"),
    "a shift of 400 digits": (in_unet(freq_shift=10**400), "too large"),
    "too wide": (in_unet(block_out_channels=[2**40, 2**41]), "2199023255552 channels is too large"),
    "too deep": (in_unet(layers_per_block=10**9), "1000000000 blocks at each size is too large"),
    "too many labels": (in_unet(num_class_embeds=2**62), "None or 2 to 65,536"),
    "too large": (in_unet(sample_size=2**40), "up to 65,536 for both sides"),
    "channels that are no whole number": (in_unet(in_channels=3.0), "in_channels = 3.0"),
    "nested JSON": (lambda f: (f / "unet" / "config.json").write_text("[" * 200_000), "not readable as JSON"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "no JSON": (lambda f: (f / "unet" / "config.json").write_text("{"), "not readable as JSON"),
    "no object": (lambda f: (f / "unet" / "config.json").write_text("[]"), "not a JSON object"),
    "later notes": (lambda f: (f / "snowmelt.json").write_text('{"format": 99}'), "later Snowmelt"),
    "notes of nothing": (with_notes(std=0.0), "data.std is 0.0"),
    "notes of other counts": (with_notes(counts=[1]), "data.counts"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "no folder of diffusers"),
    "nothing there": (lambda f: shutil.rmtree(f), "There is no folder"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("exchange") / "folder", unet())


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_imported_is_one_sentence_and_writes_nothing(sound, tmp_path, capsys, name):
    damage, said = DAMAGES[name]
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    assert cli(["import", str(folder), "--out", str(tmp_path / "runs" / "new")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pictures", "nowhere"], "nowhere"),
        (["--steps", "0"], "--steps 0 trains nothing"),
        (["--for", "5s"], "too short"),
        (["--for", "1m", "--steps", "5"], "not both"),
        (["--every-label"], "no classes"),
        (["--picture", "x"], "did you mean '--pictures'?"),
    ],
)
def test_mistakes_in_importing(sound, tmp_path, capsys, words, said):
    out = tmp_path / "runs" / "new"
    assert cli(["import", str(sound), "--out", str(out), *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert said in err[-1] and not any("Traceback" in line for line in err)
    assert not any(tmp_path.iterdir())


def test_pictures_of_other_classes_or_sizes_are_refused(tmp_path, capsys):
    folder = saved(tmp_path / "folder", unet(in_channels=1, out_channels=1, num_class_embeds=10))
    words = ["import", str(folder), "--out", str(tmp_path / "run"), "--pictures"]
    assert cli([*words, "builtin:digits"]) == 2
    assert "10 classes and the network 9; add --every-label" in capsys.readouterr().err
    change(folder / "unet" / "config.json", sample_size=16)
    assert cli(["prepare", "builtin:digits", "--out", str(tmp_path / "digits")]) == 0
    assert cli([*words, str(tmp_path / "digits"), "--every-label"]) == 2
    assert "8 pixels and 1 channels and the network draws 16 and 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_not_touched(sound, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("mine")
    assert cli(["import", str(sound), "--out", str(tmp_path / "here")]) == 2
    assert "exists already" in capsys.readouterr().err
    run = run_of(tmp_path / "run")
    assert cli(["export", str(run.path), "--out", str(tmp_path / "here")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("made", "words", "said"),
    [
        ({"predicts": "edm"}, [], "train with --predicts v"),
        ({"predicts": "edm", "classes": ("cat", "dog")}, [], "train with --predicts v"),
        ({"predicts": "velocity"}, [], "train with --predicts v"),
        ({"linear": 8}, [], "without diffusion.linear"),
        ({"network": dataclasses.replace(TINY, patch=2)}, [], "squares of 2 x 2 pixels"),
        (
            {"network": dataclasses.replace(TINY, attention=(True, True), channels=(8, 32), head_channels=16)},
            [],
            "heads",
        ),
        ({"network": dataclasses.replace(TINY, embedding="add", middle_groups=0)}, [], "middle_groups = 0"),
        ({}, ["--class", "cat"], "without classes"),
        ({}, ["--format", "onnx", "--keep-classes"], "leave --class and --keep-classes away"),
        ({"classes": ("cat", "dog")}, ["--class", "cart"], "did you mean 'cat'?"),
        ({"classes": ("cat", "dog")}, ["--class", "cat", "--keep-classes"], "exclude each other"),
        ({}, ["--clas", "cat"], "did you mean '--class'?"),
    ],
)
def test_mistakes_in_exporting(tmp_path, capsys, made, words, said):
    run = run_of(tmp_path / "run", **made)
    before = sorted(tmp_path.rglob("*"))
    assert cli(["export", str(run.path), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_may_be_exported_is_what_others_predict():
    """The names that presets know without torch."""
    assert set(EXPORTED) == set(PREDICTIONS.values())


def test_the_tables_are_those_of_diffusers():
    """All of them, also where no network is at hand."""
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        for steps in (50, 1000):
            for rescaled in (False, True):
                settings = {"beta_schedule": name, "num_train_timesteps": steps, "prediction_type": "v_prediction"}
                theirs = DDPMScheduler(**settings, rescale_betas_zero_snr=rescaled).betas
                about = settings | {"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": rescaled}
                ours = diffusion_of(about, Path("here"), learns_variance=False).betas or linear_betas().tolist()
                bars = [torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0) for betas in (ours, theirs)]
                # A thousand float32 factors near 1, each rounded by 6e-8.
                torch.testing.assert_close(*bars, rtol=1e-4, atol=1e-6)
