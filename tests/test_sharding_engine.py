"""Text from a mesh is the text from one device."""

import json
from typing import Any

import jax
import pytest

from m1jax.generate import main
from tests.tools import DATA

HELLO = DATA / "m1_hello"


def generated(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    with pytest.raises(SystemExit) as exit:
        main(["--model", str(HELLO), "--prompt", "Who are you?", "--json", *map(str, args)])
    out, err = capsys.readouterr()
    assert exit.value.code in (0, None), err
    return json.loads(out)


def test_the_same_text_on_a_mesh(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--greedy", "--max-tokens", 24), ("--seed", 5, "--max-tokens", 12, "-n", 3)
    want = [[sample["text"] for sample in generated(capsys, *args)["samples"]] for args in asked]
    devices = jax.devices()
    for text, count in (("data=1,expert=2,tensor=1", 2), ("data=2,expert=2,tensor=2", 8)):
        monkeypatch.setattr(jax, "devices", lambda *_, count=count: devices[:count])
        got = [[sample["text"] for sample in generated(capsys, *args, "--mesh", text)["samples"]] for args in asked]
        assert got == want


def test_a_mesh_that_does_not_fit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in {"expert=3": "needs 3 devices, 8 are present", "heads=2": "unknown axis 'heads'"}.items():
        with pytest.raises(SystemExit) as exit:
            main(["--model", str(HELLO), "--prompt", "Hi", "--mesh", text])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
