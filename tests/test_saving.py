"""What `save` and a run of the trainer put in the place of what was there, and what they leave alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import m1jax
from m1jax.errors import UserError
from m1jax.exporting import export
from m1jax.saving import save
from m1jax.train import supervised
from m1jax.train.settings import Settings, parse
from tests.tools import HELLO, SMALL, random_model

MODEL = random_model(SMALL)


def test_a_folder_that_m1jax_has_made_is_replaced(tmp_path: Path) -> None:
    save(MODEL, tmp_path / "m")
    with pytest.raises(UserError, match=r"m exists and is not empty: choose another name$"):
        save(MODEL, tmp_path / "m")
    save(MODEL, str(tmp_path / "m"), "bfloat16", str(HELLO), overwrite=True)
    assert m1jax.load(tmp_path / "m").dtype == np.float32 and (tmp_path / "m" / "tokenizer.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_m1jax_has_not_made_stays(kind: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    place = mine / "thesis.txt" if kind == "file" else mine
    if kind == "link":
        place = tmp_path / "link"
        place.symlink_to(mine)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="not made by m1jax" if kind == "folder" else "not a folder"):
        save(MODEL, place, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dtype", ["int8", "float16", "bf16"])
def test_a_dtype_that_is_not_stored_is_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"dtype '{dtype}' is not supported: choose float32 or bfloat16"):
        save(MODEL, tmp_path / "m", dtype)
    assert not list(tmp_path.iterdir())


def settings(tmp_path: Path, out: str, **model: str) -> Settings:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "1 + 1 = 2"}) + "\n")
    data = {"length": 16, "rows": 1, "files": [str(tmp_path / "corpus.jsonl")]}
    return parse(Settings, {"stage": "pretrain", "out": out, "steps": 1, "data": data, "model": model})


def test_training_never_takes_the_place_of_what_it_begins_with(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(m1jax.load(HELLO), folder, tokenizer=HELLO)
    (folder / "notes.txt").write_text("mine")
    for begins in ({"path": str(folder)}, {"config": str(HELLO / "config.json"), "tokenizer": str(folder)}):
        with pytest.raises(
            UserError, match=f"{folder} is where the trained model goes, and {folder} what it begins with"
        ):
            supervised.run(settings(tmp_path, str(tmp_path), **begins))
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("kind", ["another run's", "a released model", "something else"])
def test_training_leaves_alone_what_is_not_its_own(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(m1jax.load(HELLO), tmp_path / "begin", tokenizer=HELLO)
    if kind == "another run's":
        save(MODEL, folder)
    elif kind == "a released model":
        export(tmp_path / "begin", folder)
    else:
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="exists and is not empty: move it or choose another out"):
        supervised.run(settings(tmp_path, str(tmp_path), path=str(tmp_path / "begin")))
    assert sorted(folder.rglob("*")) == before


def test_an_empty_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out is empty: name a folder"):
        settings(tmp_path, "", path=str(HELLO))
