"""Imports go one way, so that each part can be read and used without those above it."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "streamvid"
LEVELS = [
    {"types", "config", "video", "files", "seeding"},
    {"core"},
    {"models", "codecs", "data", "teachers"},
    {"rollout"},
    {"methods", "serving", "evaluation"},
    {"training"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def inner(file: Path) -> set[str]:
    return {name.split(".", 1)[1] for name in imports(file) if name.startswith("streamvid.")}


def test_imports_go_one_way():
    """A package imports its own level or one below, and a method never another method."""
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).with_suffix("").parts
        if own[0] == "__init__":
            continue
        for name in inner(file):
            part = name.split(".")[0]
            if LEVEL_OF[part] > LEVEL_OF[own[0]]:
                wrong.append(f"{'/'.join(own)} imports {name}")
            if own[0] == part == "methods" and name != "methods.base":
                wrong.append(f"{'/'.join(own)} imports the method {name}")
            if own[0] == "rollout" and part in {"data", "teachers"}:
                wrong.append(f"{'/'.join(own)} imports {name}")
    assert wrong == []


def test_flash_attn_is_imported_in_one_file():
    users = {file.name for file in PACKAGE.rglob("*.py") if any(name.split(".")[0] == "flash_attn" for name in imports(file))}
    assert users <= {"attention.py"}


def test_importing_streamvid_is_light():
    """Neither diffusers nor transformers is loaded."""
    code = "import sys, streamvid; assert not {'diffusers', 'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
