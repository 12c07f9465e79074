"""The configuration: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snowmelt.config import (
    FORMAT,
    Config,
    DataConfig,
    DiffusionConfig,
    TrainingConfig,
    UNetConfig,
    config_tables,
    read_config,
    to_toml,
)
from snowmelt.errors import UserError
from snowmelt.tables import from_table

FULL = Config(
    DataConfig(size=24, channels=3, classes=("a dog", 'qu"ote', "naïve"), std=0.1 + 0.2, fingerprint="ab"),
    network=UNetConfig(channels=(16, 32), attention=(True, False), blocks=2, patch=2, dropout=0.1),
    diffusion=DiffusionConfig(schedule="flow", predicts="velocity", weight="min_snr", label_dropout=0.0),
    training=TrainingConfig(steps=None, seconds=1234.5, flip=True, seed=2**40),
    request={"source": "photos", "size": 24, "duration": None, "nested": {"gone": None, "kept": [1, 2]}},
    version="9",
)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(folder: Path, old: str, new: str) -> Path:
    """The file of `FULL` with one thing altered by hand."""
    text = to_toml(FULL)
    assert text.count(old) == 1
    return written(folder, text.replace(old, new))


def test_what_is_written_is_read(tmp_path):
    read = read_config(written(tmp_path, to_toml(FULL)))
    # None is TOML's way of not being there, in the free-form request too.
    assert read.request == {"source": "photos", "size": 24, "nested": {"kept": [1, 2]}}
    assert read == from_table(Config, config_tables(FULL), "") and read.training == FULL.training
    assert (read.data, read.network, read.diffusion) == (FULL.data, FULL.network, FULL.diffusion)


@settings(deadline=None)
@given(
    steps=st.none() | st.integers(1, 2**62),
    rate=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    classes=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
)
def test_any_values_survive(tmp_path_factory, steps, rate, classes):
    config = Config(DataConfig(8, 1, classes), training=TrainingConfig(steps=steps, learning_rate=rate))
    assert read_config(written(tmp_path_factory.mktemp("config"), to_toml(config))) == config


def test_defaults_need_not_be_written(tmp_path):
    assert read_config(written(tmp_path, "[data]\nsize = 8\nchannels = 1\n")) == Config(DataConfig(8, 1))


def test_a_file_from_before_a_gpu_chose_is_read(tmp_path):
    """It says nothing of layout and compiler: all was computed in the default way."""
    lines = [line for line in to_toml(FULL).splitlines() if not line.startswith(("layout", "compile"))]
    read = read_config(written(tmp_path, "\n".join(lines)))
    assert read.training == FULL.training and (read.training.layout, read.training.compile) == ("default", False)


def test_an_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unknown key 'leaning_rate'; did you mean 'learning_rate'"):
        read_config(changed(tmp_path, "learning_rate =", "leaning_rate ="))
    with pytest.raises(UserError, match="unknown key 'netwrk'; did you mean 'network'"):
        read_config(changed(tmp_path, "[network]", "[netwrk]"))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("size = 24\nchannels = 3", 'size = "many"\nchannels = 3', "data.size"),
        ("blocks = 2", "blocks = [2]", "network.blocks"),
        ("seconds = 1234.5", 'seconds = "long"', "training.seconds"),
        ("size = 24\nchannels = 3", "channels = 3", "data.size"),
        ("groups = 8", "groups = 5", "multiples of network.groups 5"),
        ('layout = "default"', 'layout = "last"', "training.layout"),
    ],
)
def test_values_that_do_not_fit_are_named(tmp_path, old, new, named):
    with pytest.raises(UserError) as refusal:
        read_config(changed(tmp_path, old, new))
    assert named in str(refusal.value) and "config.toml" in str(refusal.value)
    assert "\n" not in str(refusal.value), "one sentence"


def test_what_is_no_toml_is_refused(tmp_path):
    with pytest.raises(UserError, match="not readable as TOML"):
        read_config(written(tmp_path, "size: 24"))
    (tmp_path / "config.toml").write_bytes(b'version = "\xff"')
    with pytest.raises(UserError, match="not readable as TOML"):
        read_config(tmp_path / "config.toml")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "other.toml")


def test_a_later_format_is_refused_whatever_else_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"later Snowmelt \(9\); upgrade"):
        read_config(changed(tmp_path, f"format = {FORMAT}", f"format = {FORMAT + 1}\nfuture = true"))


@pytest.mark.parametrize("key, value", [("flip", "false"), ("steps", 8.7), ("steps", True), ("seed", "1")])
def test_values_are_not_bent_into_another_type(key, value):
    with pytest.raises(UserError):
        from_table(Config, {"data": {"size": 8, "channels": 1}, "training": {key: value}}, "f")


@pytest.mark.parametrize("table", [{"network": [1]}, {"data": {"size": 8, "channels": 1, "classes": "abc"}}])
def test_wrong_shapes_are_refused(table):
    with pytest.raises(UserError):
        from_table(Config, {"data": {"size": 8, "channels": 1}, **table}, "f")


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("data", {"size": 0}, "data.size is 0"),
        ("data", {"channels": 2}, "data.channels is 2; give 1"),
        ("data", {"std": 0.0}, "data.std is 0.0"),
        ("data", {"std": math.nan}, "data.std is nan"),
        ("data", {"counts": (1,)}, "data.counts"),
        ("data", {"classes": ("a", "b"), "counts": (1,)}, "data.counts"),
        ("data", {"classes": ("a", "b"), "counts": (2, -1)}, "data.counts"),
        ("data", {"classes": ("a", "b"), "counts": (0, 0)}, "data.counts"),
        ("network", {"dropout": 2.0}, "network.dropout is 2.0"),
        ("network", {"dropout": 1.0}, "network.dropout is 1.0"),
        ("network", {"dropout": math.nan}, "network.dropout is nan"),
        ("network", {"frequency_shift": math.nan}, "network.frequency_shift is nan"),
        ("network", {"frequency_shift": -math.inf}, "network.frequency_shift is -inf"),
        ("network", {"channels": (2**40,), "attention": (False,)}, "with 1099511627776 channels is too large"),
        ("network", {"channels": (8,) * 17, "attention": (False,) * 17}, "with 17 sizes is too large"),
        ("network", {"blocks": 10**9}, "with 1000000000 blocks at each size is too large"),
        ("network", {"patch": 65}, "with 65 pixels to the side of a patch is too large"),
        ("training", {"steps": -(10**400)}, "training.steps is -1000"),
    ],
)
def test_what_no_run_can_have_is_refused(section, values, named):
    tables = {"data": {"size": 8, "channels": 1}}
    tables[section] = tables.get(section, {}) | values
    with pytest.raises(UserError) as refusal:
        from_table(Config, tables, "here")
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["a = " + "[" * 200_000, "a = 1" + "0" * 5000])
def test_toml_beyond_the_reader_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="not readable as TOML"):
        read_config(written(tmp_path, text))


@pytest.mark.parametrize("width", [104, 48])
def test_a_width_that_heads_do_not_divide_is_refused(width):
    with pytest.raises(UserError, match="head_channels"):
        UNetConfig(channels=(width,), attention=(True,))


def test_a_class_name_is_text():
    with pytest.raises(UserError, match="half a character"):
        DataConfig(8, 1, ("a", "b\ud800"))
    assert DataConfig(8, 1, ("größe", "☀", "𝄞")).classes[2] == "𝄞"
