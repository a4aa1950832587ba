"""Imports go one way, so that each part can be read and used without those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "streamvid"
LEVELS = [
    {
        "types",
        "config",
        "video",
        "frames",
        "files",
        "seeding",
        "shipped",
        "threads",
        "weights",
        "printing",
        "command_line",
        "hub",
        "metering",
        "reports",
    },
    {"core"},
    {"models", "codecs", "data", "teachers", "training"},
    {"rollout"},
    {"objectives", "evaluation"},
    {"settings", "students"},
    {"serving"},
    {"experiment"},
    {"studies"},
    {"gpu_check"},
    {"bench"},
    {"cli"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(source: str) -> set[str]:
    """Absolute names of all modules that a source imports, also inside functions; `from a import b`
    gives a and a.b.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute, so that their direction can be read"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def violations(own: tuple[str, ...], source: str) -> list[str]:
    """What a module, named as ("objectives", "dmd"), must not import."""
    wrong = []
    for name in imports(source):
        package, *inner = name.split(".")
        if package in ("tools", "demos", "tests") or (
            package == "streamvid" and inner and not allowed(own, tuple(inner))
        ):
            wrong.append(f"{'/'.join(own)} imports {name}")
    return wrong


def allowed(own: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """A package imports its own level or one below; objectives and the rollout have rules of their
    own.
    """
    if other[0] not in LEVEL_OF:  # streamvid.__version__
        return True
    if own[0] == "objectives" and other[0] == "training":
        return other[1:2] in ((), ("method",))
    if own[0] == "rollout" and LEVEL_OF[other[0]] == LEVEL_OF["models"]:
        codec = own == ("rollout", "sampler") and other[:2] == ("codecs", "base")
        return codec or other[:2] == ("models", "kv_cache") or other in {("models",), ("codecs",)}
    return LEVEL_OF[other[0]] <= LEVEL_OF[own[0]]


def modules() -> list[tuple[tuple[str, ...], str]]:
    files = [
        file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem != "__init__"
    ]
    return [(file.relative_to(PACKAGE).with_suffix("").parts, file.read_text()) for file in files]


def test_every_package_has_its_level():
    assert {own[0] for own, _ in modules()} <= set(LEVEL_OF)


def test_imports_go_one_way():
    assert [line for own, source in modules() for line in violations(own, source)] == []


@pytest.mark.parametrize(
    "own, source",
    [
        ("core/process", "from streamvid.models.rope import rotate"),
        ("core/process", "from streamvid import models"),
        ("core/process", "def f():\n    import streamvid.models"),
        ("models/rope", "from streamvid.rollout.noise import KeyedNoise"),
        ("rollout/loop", "from streamvid.codecs.base import VideoCodec"),
        ("rollout/sampler", "from streamvid.codecs.text import PromptEncoder"),
        ("rollout/loop", "from streamvid.teachers import wan"),
        ("rollout/loop", "from streamvid.models.causal_wan import CausalWanTransformer3DModel"),
        ("objectives/dmd", "from streamvid.settings.video import VideoSetting"),
        ("objectives/dmd", "from streamvid.training.ema import EMA"),
        ("evaluation/runs", "from streamvid.experiment import build"),
        ("experiment/build", "import tools.sample"),
        ("experiment/build", "from streamvid.cli import sample"),
    ],
)
def test_a_wrong_import_is_found(own, source):
    assert violations(tuple(own.split("/")), source)


@pytest.mark.parametrize(
    "own, source",
    [
        ("rollout/sampler", "from streamvid.codecs.base import VideoCodec"),
        ("rollout/loop", "from streamvid.models.kv_cache import StreamKVCache"),
        ("objectives/dmd", "from streamvid.training.method import BatchSource"),
        ("experiment/build", "import streamvid.objectives\nfrom streamvid import __version__"),
    ],
)
def test_a_right_import_is_not(own, source):
    assert violations(tuple(own.split("/")), source) == []


def test_kernels_of_attention_are_chosen_in_one_file():
    """And imported in none: they come through diffusers' dispatch."""
    kernels = {"flash_attn", "flash_attn_interface", "sageattention", "xformers"}
    dispatch = "diffusers.models.attention_dispatch.dispatch_attention_fn"
    for own, source in modules():
        names = list(imports(source))
        assert not kernels & {name.split(".")[0] for name in names}, own
        assert own == ("models", "attention") or dispatch not in names


@pytest.mark.parametrize("module", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda p: p.stem)
def test_a_command_line_is_read_without_torch(module):
    """So that help and a wrong option take no seconds; what a command runs, it imports then."""
    code = f"import sys, streamvid.cli.{module.stem}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_streamvid_is_light():
    """Neither diffusers nor transformers is loaded."""
    code = (
        "import sys, streamvid; assert not {'diffusers', 'transformers', 'torch'} &"
        " set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
