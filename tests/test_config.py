"""Configuration: defaults, YAML and key=value give one typed object, and a mistake gives one clear
line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

from streamvid.config import build_config, load_config, read_config, save_config, to_plain


@dataclass
class Optimizer:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: Optional[float] = 1.0  # noqa: UP045 (the older form, too)


@dataclass
class Method:
    lr_scale: float = 1.0
    order: Literal["chunked", "rolling"] = "chunked"
    times: tuple[float, ...] = (1.0, 0.5)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=3e-4))


@dataclass
class Other:
    width: int = 4


@dataclass
class Config:
    name: str
    steps: int = 10
    verbose: bool = False
    precision: Literal["no", "bf16"] = "bf16"
    out: Path = Path("runs")
    note: str | None = None
    title: str = ""
    tags: tuple[str, ...] = ()
    method: Method = field(default_factory=Method)
    optimizers: dict[str, Optimizer] = field(
        default_factory=lambda: {"student": Optimizer(lr=1e-5)}
    )
    sizes: list[int] = field(default_factory=list)
    part: Method | Other | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")


def load(*overrides, path=None):
    return load_config(Config, path, ["name=x", *overrides])


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: file\nsteps: 1e2\nprecision: no\nmethod: {times: [1, 0.75, 0.5], optimizer: {betas:"
        " [0, 0.99]}}\noptimizers: {fake_score: {lr: 2e-6, clip_norm: null}}\nnote:"
        " ${name}-${method.order}\n"
    )
    config = load_config(
        Config, path, ["method.order=rolling", "optimizers.student.betas=[0.5,0.9]", "out=a/b"]
    )
    assert config == Config(
        name="file",
        steps=100,
        precision="no",
        out=Path("a/b"),
        note="file-rolling",
        method=Method(
            order="rolling", times=(1.0, 0.75, 0.5), optimizer=Optimizer(lr=3e-4, betas=(0.0, 0.99))
        ),
        optimizers={
            "student": Optimizer(lr=1e-5, betas=(0.5, 0.9)),
            "fake_score": Optimizer(lr=2e-6, clip_norm=None),
        },
    )
    assert isinstance(config.steps, int) and isinstance(config.method.times[0], float)


@pytest.mark.parametrize("name", ["007", "yes", "a: b", "null and void", "x=y", "~"])
def test_a_text_needs_no_quotes_on_the_command_line(name):
    """`name=007` used to become the number 7, and a prompt with a colon a mapping."""
    assert load_config(Config, None, [f"name={name}"]).name == name


def test_null_and_unions():
    config = load(
        "note=null", "part.width=8", "optimizers.student=null", "method.optimizer.clip_norm=null"
    )
    assert config.note is None and config.part == Other(8) and config.optimizers == {}
    assert config.method.optimizer == Optimizer(lr=3e-4, clip_norm=None)
    assert load("note=7").note == "7"


@pytest.mark.parametrize(
    "override, message",
    [
        ("metod.lr_scale=1", "unknown key 'metod.lr_scale'; did you mean 'method.lr_scale'?"),
        ("method.ordr=1", "unknown key 'method.ordr'; did you mean 'method.order'?"),
        ("lr_scale=2", "unknown key 'lr_scale'; did you mean 'method.lr_scale'?"),
        (
            "optimizers.student.beta=1",
            "unknown key 'optimizers.student.beta'; did you mean 'optimizers.student.betas'",
        ),
        (
            "method.zzz=1",
            "unknown key 'method.zzz'; 'method' knows lr_scale, order, times, optimizer",
        ),
        ("steps=many", "steps: expected int, got str 'many'"),
        ("steps=1.5", "steps: expected int, got float 1.5"),
        ("steps=true", "steps: expected int, got bool True"),
        ("steps=null", "steps: expected int, got null"),
        ("verbose=1", "verbose: expected bool, got int 1"),
        ("precision=fp8", "precision: expected one of 'no', 'bf16', got str 'fp8'"),
        ("method.times=[1,x]", "method.times[1]: expected float, got str 'x'"),
        ("method=3", "method: expected a mapping of lr_scale, order, times, optimizer, got int 3"),
        (
            "optimizers.student.betas=[1]",
            "expected a list of 2 values (float, float), got list [1]",
        ),
        ("optimizers.student.lr=x", "optimizers.student.lr: expected float, got str 'x'"),
        ("method.optimizer.clip_norm=x", "method.optimizer.clip_norm: expected float, got str 'x'"),
        ("steps.a=1", "steps: expected int, got dict {'a': '1'}"),
        ("steps", "override 'steps' is not of the form key=value"),
        ("note=${nothing}", "Interpolation key 'nothing' not found"),
        ("steps=0", "steps=0 must be at least 1"),
        ("name=", "name: expected str, got an empty text"),
        ("name=null", "name: expected str, got null"),
        ("out=null", "out: expected a path, got null"),
        ("out=' '", "out: expected a path, got an empty text"),
        ("note=", "note: expected str or null, got an empty text"),
        ("note=''", "note: expected str, got an empty text"),
        (
            "method.optimizer.clip_norm=",
            "method.optimizer.clip_norm: expected float or null, got an empty text",
        ),
        ("method.optimizer.clip_norm=~", "method.optimizer.clip_norm: expected float, got null"),
        (
            "optimizers.student=",
            "optimizers.student: expected a mapping of lr, betas, clip_norm, got an empty text",
        ),
        ("part=", "part: expected"),
        ("steps=", "steps: expected int, got an empty text"),
        ("method.lr_scale=1e400", "method.lr_scale: expected float, got float inf"),
        ("method.lr_scale=.nan", "method.lr_scale: expected float, got float nan"),
        ("method.lr_scale=1:30", "method.lr_scale: expected float, got str '1:30'"),
        ("method.times=[1,1:30]", "method.times: expected a list of float, got str '[1,1:30]'"),
        (
            "method.optimizer.clip_norm=1:30.5",
            "method.optimizer.clip_norm: expected float, got str '1:30.5'",
        ),
        (f"method.{'a.' * 2000}b=1", "2002 keys deep"),
        (f"method.times={'[' * 400}{']' * 400}", "method.times"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_expectation_and_value(override, message):
    with pytest.raises(ValueError) as error:
        load(override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_text_may_be_empty_where_its_default_is():
    """Such as a negative prompt; where a path stood, an unset variable of the shell once meant
    random weights.
    """
    assert load("title=").title == "" and load("title=''").title == ""
    with pytest.raises(ValueError, match="note: expected str or null, got an empty text"):
        build_config(Config, {"name": "x", "note": ""})  # as a file has it
    with pytest.raises(ValueError, match=r"tags\[1\]: expected str, got an empty text"):
        load("tags=[a,'']")


def test_a_text_may_look_like_a_time(tmp_path):
    """In a file it needs quotes, on the command line none."""
    (tmp_path / "run.yaml").write_text("title: '1:30'\nnote: at 1:30\n")
    assert (load(path=tmp_path / "run.yaml").title, load("title=1:30").title) == ("1:30", "1:30")
    assert load(path=tmp_path / "run.yaml").note == "at 1:30"
    for text in ("1:30", "0:30", "-1_0:5", "0:30.5", "1:75", "007:08"):
        save_config(load(f"title={text}"), tmp_path / "saved.yaml")
        assert load_config(Config, tmp_path / "saved.yaml").title == text


def test_an_interpolation_to_nothing_sets_nothing(monkeypatch):
    monkeypatch.setenv("UNSET_PLACE", "")
    with pytest.raises(ValueError, match="note: expected str or null, got an empty text"):
        load("note=${oc.env:UNSET_PLACE}")


def test_a_missing_required_key():
    with pytest.raises(ValueError, match="name has no default: set it, it is str"):
        load_config(Config)


def test_bases_are_relative_and_later_ones_win(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.yaml").write_text("steps: 1\nmethod: {order: rolling}\n")
    (tmp_path / "parts" / "b.yaml").write_text("base: c.yaml\nsteps: 2\n")
    (tmp_path / "parts" / "c.yaml").write_text("steps: 3\nsizes: [1, 2]\n")
    run = tmp_path / "run.yaml"
    run.write_text("base: [parts/a.yaml, parts/b.yaml]\nmethod: {lr_scale: 2}\n")
    assert read_config(run) == {
        "steps": 2,
        "method": {"order": "rolling", "lr_scale": 2},
        "sizes": [1, 2],
    }
    (tmp_path / "parts" / "c.yaml").write_text("base: ../run.yaml\n")
    with pytest.raises(ValueError, match="is its own base"):
        read_config(run)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "does not exist"),
        ("a: [1", "is not valid YAML"),
        ("- 1", "must hold"),
        ("a: 1\na: 2", "not valid"),
        ("base: no.yaml", "named as a base in"),
        ("base: 5", "base: expected a file or a list of files, got int 5"),
        ("base: [5]", "got int 5"),
        ("base: ''", "got str ''"),
        ("base: {a: b}", "got dict"),
        ("a: 1\nb: 1:30", "YAML reads 1:30 in line 2 as a number in sixties"),
        ("a: [1, -1:30:00.5]", "reads -1:30:00.5 in line 1"),
        (f"a: {'[' * 400}{']' * 400}", "nested too deeply"),
        ("a: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_a_file_that_is_missing_or_no_yaml_is_one_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(path=path)
    assert "\n" not in str(error.value)


def test_what_is_saved_loads_to_an_equal_object(tmp_path):
    config = load(
        "method.times=[0.1,1e-7]", "note=a: ü", "precision=no", "part.order=rolling", "sizes=[1,2]"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Config, tmp_path / "config.yaml") == config
    assert to_plain(config)["method"]["times"] == [0.1, 1e-7]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
