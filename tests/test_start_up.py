"""What a command imports before it does its work, told by the modules that are loaded."""

import subprocess
import sys

import pytest

STUDENT = (
    "from streamvid.students.folder import TINY_STUDENT, load_student\nload_student(TINY_STUDENT)"
)
COMMAND = (
    "from streamvid.cli.__main__ import main\ntry:\n    main({})\nexcept SystemExit:\n    pass"
)


def loaded_by(code, among, tmp_path):
    """Those of some modules that a process has loaded after ``code``."""
    ask = f"import sys\nprint('loaded:', *[m for m in {sorted(among)!r} if m in sys.modules])"
    command = [sys.executable, "-c", f"{code}\n{ask}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    return set(done.stdout.splitlines()[-1].removeprefix("loaded:").split())


def test_opening_a_student_imports_no_other_networks(tmp_path):
    """Nor peft, which diffusers' mixins and its ``to`` would bring."""
    heavy = {"peft", "diffusers.models.transformers", "diffusers.models.unets", "scipy.stats"}
    codecs = {"streamvid.codecs.wan_vae", "streamvid.codecs.taehv"}
    assert loaded_by(STUDENT, heavy | codecs, tmp_path) == set()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["objectives", "--help"],
        ["train", "--help"],
        ["serve", "--help"],
        ["train", "--config", "absent.yaml"],
        ["train", "--config", "broken.yaml"],
    ],
    ids=" ".join,
)
def test_help_and_a_broken_run_file_need_no_torch(argv, tmp_path):
    (tmp_path / "broken.yaml").write_text("train: {name: [")
    code = COMMAND.format(argv)
    assert loaded_by(code, {"torch", "diffusers", "transformers"}, tmp_path) == set()


def test_the_adapters_of_diffusers_are_all_there():
    """As with ``PeftAdapterMixin`` among the bases, whatever it has in this version."""
    from diffusers.loaders import PeftAdapterMixin

    from streamvid.models.late_adapters import METHODS, LatePeftAdapters

    functions = {n for n, value in vars(PeftAdapterMixin).items() if not n.startswith("__")}
    assert functions == {n for n in vars(LatePeftAdapters) if not n.startswith("__")}
    for name in METHODS:
        theirs, ours = getattr(PeftAdapterMixin, name), getattr(LatePeftAdapters, name)
        assert getattr(theirs, "__func__", theirs) is getattr(ours, "__func__", ours)
