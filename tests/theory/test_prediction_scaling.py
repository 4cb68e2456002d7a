"""Which parametrisation a network has, against networks built in it; what `predict` shows; `lathe predict`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lathe.theory.infinite_width_feature_learning import ABC, ABCNetwork
from lathe.theory.prediction import predict

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def abc_network(abc):
    return lambda width: ABCNetwork(abc, width, 6, 3, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "abc"),
    [
        ("standard", ABC.standard(2)),
        ("NTK", ABC.ntk(2)),
        ("muP", ABC.mup(2)),
        ("muP", ABC.mup(2).shift(0.5)),
        ("mean-field", ABC.mean_field()),
        ("neither", ABC((0, 0, 0), (0, 1, 1))),
    ],
)
def test_two_widths_show_the_parametrisation(name, abc):
    make = abc_network(abc)
    found = predict(make(64), X, draws=0, make_model=make, widths=(128, 512)).scaling
    assert found.name == name and found.certain
    assert [float(layer.a) for layer in found.layers] == [float(a) for a in abc.a]
    assert [float(layer.b) for layer in found.layers] == [float(b) for b in abc.b]
    if name != "neither":
        # The rates that are told are those of the theory, whose limit is stable and moves.
        assert found.abc.nontrivial and found.abc.feature_learning == abc.feature_learning
        if name in ("NTK", "muP"):
            assert [-rate.sgd for rate in found.rates] == list(abc.c)


def pytorch(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def test_pytorch_networks_are_standard_and_say_so_without_two_widths():
    exact = predict(pytorch(64), X, draws=0, make_model=pytorch).scaling
    guess = predict(pytorch(64), X, draws=0).scaling
    assert (exact.name, exact.certain, guess.name, guess.certain) == ("standard", True, "standard", False)
    assert exact.rates == guess.rates and "make_model" in guess.explanation
    # One rate for all layers falls as 1 / width with SGD, width^(-3/2) with Adam: the smallest of each.
    assert min(rate.sgd for rate in exact.rates) == -ABC.standard(2).c[0]
    assert min(rate.adam for rate in exact.rates) == -ABC.standard(2, optimizer="adam").c[0]


@pytest.mark.parametrize(("name", "abc"), [("NTK", ABC.ntk(2)), ("muP", ABC.mup(2)), ("mean-field", ABC.mean_field())])
def test_one_network_shows_what_it_looks_like(name, abc):
    assert predict(abc_network(abc)(256), X, draws=0).scaling.name == name


def test_widths_that_do_not_grow_together_are_refused():
    with pytest.raises(ValueError, match="got the same shapes"):
        predict(pytorch(8), X, draws=0, make_model=lambda width: pytorch(8))
    with pytest.raises(ValueError, match="same factor"):
        predict(pytorch(8), X, draws=0, make_model=lambda w: nn.Sequential(nn.Linear(6, w), nn.Linear(w, w * w)))
    with pytest.raises(ValueError, match="two different widths"):
        predict(pytorch(8), X, draws=0, make_model=pytorch, widths=(8, 8))


def test_a_prediction_is_a_table_a_picture_and_plain_data(tmp_path):
    from lathe.gallery.theme import export

    told = []
    found = predict(pytorch(32), X, draws=3, progress=lambda *state: told.append(state))
    assert told[-1] == ("simulate", 3, 3) and ("theory", 1, 6) in told
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [layer["name"] for layer in plain["layers"]] == ["0", "2", "4"]
    assert set(plain) >= {"layers", "kernel", "criticality", "depth_to_width", "scaling", "notes", "measured_kernel"}
    assert plain["layers"][1]["C_W"] == pytest.approx(1 / 3) and plain["scaling"]["rates"][0]["name"] == "0.weight"
    text = str(found)
    assert "criticality: ordered" in text and "depth to width" in text and "C_W = 2, C_b = 0 in 3 layers" in text
    assert found.table().row_count == 3 and found.layer("2").fed_by == "relu"
    with pytest.raises(KeyError, match="no layer '3'"):
        found.layer("3")
    for suffix in (".png", ".html"):
        export(found.plot().to_dict(), tmp_path / f"net{suffix}")
        assert (tmp_path / f"net{suffix}").stat().st_size > 10_000
    assert predict(pytorch(32), X, draws=0).plot().to_dict()["hconcat"]


NETS = """
import torch
from torch import nn
def mlp(width=32):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
def with_example():
    return mlp(), torch.randn(4, 6)
def recurrent():
    return nn.LSTM(4, 4), torch.randn(2, 3, 4)
def broken():
    raise RuntimeError("no weights today")
number = 3
"""


@pytest.fixture
def lathe(tmp_path, monkeypatch, capsys):
    """`lathe predict` in a folder with nets.py: exit code, standard output and standard error."""
    from lathe import cli

    (tmp_path / "nets_for_predict.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lathe", "predict", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    yield run
    sys.modules.pop("nets_for_predict", None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_the_command_predicts_and_draws(lathe, tmp_path):
    code, out, _ = lathe("nets_for_predict:mlp", "--input", "4x6", "--draws", "2", "--plot", "mlp.svg")
    assert code == 0 and "criticality: ordered" in out and (tmp_path / "mlp.svg").read_text().startswith("<svg")
    code, out, _ = lathe("nets_for_predict:with_example", "--draws", "0", "--json")
    assert code == 0 and len(json.loads(out)["layers"]) == 2
    code, out, _ = lathe("nets_for_predict:mlp", "--input", "4x6", "--draws", "0", "--widths", "32x128", "--json")
    scaling = json.loads(out)["scaling"]
    assert code == 0 and scaling["certain"] and scaling["name"] == "standard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nets_for_predict",), "must be package.module:function"),
        (("no_such_module:f",), "there is no module 'no_such_module'"),
        (("nets_for_predict:nothing",), "has no 'nothing'"),
        (("nets_for_predict:number",), "must be a function that returns a network, got int"),
        (("nets_for_predict:broken",), "failed: RuntimeError: no weights today"),
        (("nets_for_predict:mlp",), "returns no example input"),
        (("nets_for_predict:mlp", "--input", "4by6"), "--input must be a shape"),
        (("nets_for_predict:mlp", "--input", "4x7"), "does not run on example_input"),
        (("nets_for_predict:mlp", "--input", "4x6", "--plot", "a.gif"), "--plot must end in"),
        (("nets_for_predict:recurrent",), "lstm: recurrent layers"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_two(lathe, arguments, message):
    code, out, err = lathe(*arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1, err


def test_help_teaches_and_needs_no_torch():
    code = "import sys; sys.argv = ['lathe', 'predict', '--help']; from lathe import cli\ntry:\n  cli.main()\n"
    code += "finally:\n  assert 'torch' not in sys.modules\n"
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "lathe predict my_project.nets:mlp --input 8x784" in done.stdout, done.stderr


def test_a_correlation_length_that_is_infinite_is_null_in_json():
    net = pytorch(64)
    for layer in (net[0], net[2], net[4]):
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    found = predict(net, X, draws=0)
    assert math.isinf(found.criticality.correlation_length)
    assert found.to_json()["criticality"]["correlation_length"] is None
