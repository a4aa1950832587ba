"""The scripts that make the shipped codec and text encoder: refused before they train, and a small
run of each.
"""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, UMT5EncoderModel

from streamvid.codecs.load import open_codec

TOOLS = Path(__file__).parents[2] / "tools"
NAMES = ("make_tiny_codec", "make_tiny_text")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "out, message",
    [
        ("/proc/x", "cannot write"),
        ("file", "cannot write"),
        ("", "--out is an empty text"),
    ],
)
def test_what_is_trained_has_a_place_first(name, capsys, tmp_path, monkeypatch, out, message):
    """It trained for ten minutes, and failed then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    main = runpy.run_path(str(TOOLS / f"{name}.py"))["main"]
    try:
        code = main(["--out", out])
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_small_codec_is_made_and_opens(tmp_path):
    argv = ["--out", str(tmp_path), "--minutes", "0.05", "--clips", "96"]
    subprocess.run([sys.executable, str(TOOLS / "make_tiny_codec.py"), *argv], check=True)
    assert open_codec(tmp_path).temporal_ratio == 4


@pytest.mark.slow
def test_a_small_text_encoder_is_made_and_opens(tmp_path):
    argv = ["--out", str(tmp_path), "--steps", "2"]
    subprocess.run([sys.executable, str(TOOLS / "make_tiny_text.py"), *argv], check=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    tokens = tokenizer(["a red circle moves up"], return_tensors="pt")
    hidden = encoder(**tokens).last_hidden_state
    assert hidden.shape == (*tokens.input_ids.shape, 64) and hidden.isfinite().all()
