"""muP on models that people bring: against the package mup, the unscaled model, the coordinate check, and exports."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from conformance import check_compiles, check_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lathe.theory.infinite_width_feature_learning import (
    ABC,
    MuConv1dReadout,
    MuConv3dReadout,
    MuConvReadout,
    MuReadout,
    coordinate_check,
    fold_,
    parametrize,
    update_rule,
)


def mlp(width: int, readout: type[nn.Module] = nn.Linear) -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU(),
        readout(width, 4),
    )  # fmt: skip


def cnn(width: int, readout: type[nn.Module] = nn.Linear) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), readout(width, 4),
    )  # fmt: skip


class Block(nn.Module):
    """An untied transformer: embedding, one block, readout."""

    def __init__(self, width: int, readout: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.place = nn.Parameter(torch.randn(1, 5, width))
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = readout(width, 11)

    def forward(self, tokens):
        h = self.embedding(tokens) + self.place
        n = self.norm(h)
        h = h + self.o(F.scaled_dot_product_attention(self.q(n), self.k(n), self.v(n)))
        return self.head(h + self.down(torch.relu(self.up(h))))


EXAMPLES = {mlp: torch.randn(5, 10), cnn: torch.randn(2, 3, 8, 8), Block: torch.arange(10).reshape(2, 5)}
MODELS = list(EXAMPLES)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("make", MODELS)
def test_rates_decay_and_outputs_are_those_of_mup(make, rule):
    mup = pytest.importorskip("mup")
    torch.manual_seed(1)
    theirs = make(32, mup.MuReadout)
    ours = make(32)
    ours.load_state_dict(theirs.state_dict())
    mup.set_base_shapes(theirs, make(8, mup.MuReadout), delta=make(16, mup.MuReadout))
    with torch.device("meta"):
        base = make(8)
    scaled = parametrize(ours, base=base, optimizer=rule)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    x = EXAMPLES[make]
    x = x.double() if x.is_floating_point() else x
    torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-6, atol=1e-6)
    optimizer = {"sgd": mup.MuSGD, "adam": mup.MuAdam}[rule](theirs.parameters(), lr=0.3, weight_decay=0.2)
    told = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    names = {id(p): name for name, p in ours.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in scaled.param_groups(0.3, 0.2) for p in g["params"]}
    for name, parameter in theirs.named_parameters():
        assert found[name] == pytest.approx(told[id(parameter)], abs=1e-12), name


def test_the_rates_of_the_sheet():
    for rule, rates in (("sgd", [8, 8, 1, 8, 1, 8, 8, 1]), ("adam", [1, 1, 1 / 8, 1, 1 / 8, 1, 1, 1])):
        assert list(parametrize(mlp(64), base=mlp, base_width=8, optimizer=rule).rates.values()) == rates


@pytest.mark.parametrize("scheme", ["mup", "ntp", "sp", ABC.standard(2), ABC.mup(2).shift(0.3)])
@pytest.mark.parametrize("make", MODELS)
def test_at_the_base_width_nothing_changes(make, scheme):
    torch.manual_seed(0)
    plain = make(8)
    scaled = copy.deepcopy(plain)
    result = parametrize(scaled, scheme, base=make, base_width=8)
    assert set(result.rates.values()) == {1.0}
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(plain(EXAMPLES[make]), scaled(EXAMPLES[make]))


@pytest.mark.parametrize("scheme", ["mup", "ntp", ABC.standard(2), ABC.mup(2)])
def test_a_scheme_and_its_shift_train_alike(scheme):
    abc = scheme if isinstance(scheme, ABC) else {"mup": ABC.mup(2), "ntp": ABC.ntk(2)}[scheme]
    x, y = torch.randn(6, 10, dtype=torch.float64), torch.randint(4, (6,))
    outputs = []
    for rule in (scheme, abc.shift([1, -0.5, 0.7])):
        torch.manual_seed(0)
        model = mlp(32).double()
        scaled = parametrize(model, rule, base=mlp, base_width=8)
        optimizer = torch.optim.SGD(scaled.param_groups(0.1), momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-10, rtol=0)


def test_initial_sizes_follow_their_law_whatever_the_initialiser():
    def own(width, law):
        model = mlp(width)
        for layer in model:
            if isinstance(layer, nn.Linear):
                {"kaiming": nn.init.kaiming_normal_, "orthogonal": nn.init.orthogonal_}.get(
                    law, functools.partial(nn.init.normal_, std=0.02)
                )(layer.weight)
                nn.init.zeros_(layer.bias)
        return model

    for law in ("kaiming", "orthogonal", "constant"):
        make = functools.partial(own, law=law)
        model, base = make(256), make(32)
        parametrize(model, base=base)
        for number, power in ((0, 0), (2, 0.5), (4, 0.5), (6, 0)):
            ratio = (model[number].weight.std() / base[number].weight.std()).item()
            wanted = 8**-power
            if law == "orthogonal" and number == 0:  # falls with the fan-out there: sqrt(10 / 256), and is brought back
                wanted = ratio
            assert ratio == pytest.approx(wanted, rel=0.15), (law, number)
    told = {name: p.shape for name, p in mlp(32).named_parameters()}
    with pytest.raises(ValueError, match=r"cannot tell .*'2.weight'.*init='fan_in'"):
        parametrize(own(256, "constant"), base=told)
    by_hand, measured = own(256, "constant"), own(256, "constant")
    by_hand.load_state_dict(measured.state_dict())
    parametrize(by_hand, base=told, init="constant")
    parametrize(measured, base=own(32, "constant"))
    for one, other in zip(by_hand.parameters(), measured.parameters()):
        assert torch.equal(one, other)


def test_hugging_face_models_keep_their_tied_embedding():
    transformers = pytest.importorskip("transformers")

    def make(width):
        config = transformers.GPT2Config(
            vocab_size=30, n_positions=8, n_embd=width, n_layer=1, n_head=width // 8, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)

    model = make(64).eval()
    tokens = torch.arange(8).unsqueeze(0)
    embedding = model.transformer.wte.weight
    before = embedding.detach().clone()
    scaled = parametrize(model, base=make, base_width=16, optimizer=torch.optim.AdamW)
    assert model.lm_head.weight is model.transformer.wte.weight is embedding
    assert torch.equal(embedding, before)
    kinds = {tensor.name: (tensor.kind, tensor.rate) for tensor in scaled.tensors}
    assert kinds["transformer.wte.weight"] == ("tied", 1.0)
    assert kinds["transformer.h.0.mlp.c_fc.weight"] == ("hidden", 0.25)
    hidden = model.transformer(tokens).last_hidden_state
    torch.testing.assert_close(model(tokens).logits, hidden @ embedding.mT / 4)
    with pytest.raises(ValueError, match="is shared"):
        fold_(model)
    logits = model(tokens).logits
    torch.testing.assert_close(fold_(model, untie=True)(tokens).logits, logits)
    assert torch.equal(model.transformer.wte.weight, before)
    with pytest.raises(ValueError, match="embedding and readout at once"):
        parametrize(make(64), ABC.standard(2), base=make, base_width=16)
    with pytest.raises(ValueError, match="tied embedding to zero"):
        parametrize(make(64), base=make, base_width=16, zero_readout=True)


def test_blocks_that_are_shared_are_one_tensor():
    def make(width):
        block = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        return nn.Sequential(nn.Linear(3, width), block, block, nn.Linear(width, 2))

    scaled = parametrize(make(32), base=make, base_width=8)
    assert [tensor.kind for tensor in scaled.tensors] == ["input", "input", "hidden", "input", "readout", "fixed"]


def test_readouts_that_no_multiplier_fits_get_its_equivalent():
    class Raw(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first = nn.Linear(3, width)
            self.head = nn.Parameter(torch.randn(2, width))

        def forward(self, x):
            return torch.relu(self.first(x)) @ self.head.mT

    class Layered(Raw):
        def __init__(self, width):
            super().__init__(width)
            head = self.head
            del self.head
            self.last = nn.Linear(width, 2, bias=False)
            self.last.weight = head

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    outputs = []
    for make, options in ((Raw, {"readout": ["head"]}), (Layered, {})):
        torch.manual_seed(0)
        model = make(24).double()
        scaled = parametrize(model, base=make, base_width=6, **options)
        optimizer = torch.optim.SGD(scaled.param_groups(0.1))
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-10, rtol=0)


def test_groups_keep_the_users_options_and_follow_wrappers():
    model = mlp(32)
    scaled = parametrize(model, base=mlp, base_width=8, optimizer="adam")
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    groups = scaled.param_groups(
        0.1, 0.2, groups=[{"params": biases, "weight_decay": 0.0}, {"params": weights, "lr": 0.4, "betas": (0.8, 0.9)}]
    )
    assert [(g["lr"], g["weight_decay"], g.get("betas")) for g in groups] == [
        (0.1, 0.0, None), (0.4, 0.2, (0.8, 0.9)), (0.1, 0.8, (0.8, 0.9))
    ]  # fmt: skip
    assert sum(len(g["params"]) for g in groups) == len(biases) + len(weights)
    assert {g["weight_decay"] for g in scaled.param_groups(0.1, 0.2, decoupled=True)} == {0.2}
    wrapped = nn.DataParallel(copy.deepcopy(model))
    same = scaled.param_groups(0.1, model=wrapped)
    assert [(g["lr"], len(g["params"])) for g in same] == [
        (g["lr"], len(g["params"])) for g in scaled.param_groups(0.1)
    ]
    with pytest.raises(ValueError, match="must hold parameters of the model that was parametrised"):
        scaled.param_groups(0.1, groups=[{"params": [nn.Parameter(torch.zeros(2))]}])
    model[0].weight.requires_grad_(False)
    assert sum(len(g["params"]) for g in scaled.param_groups(0.1)) == len(biases) + len(weights) - 1


def test_optimisers_are_told_apart():
    for kind in (torch.optim.SGD, torch.optim.ASGD):
        assert update_rule(kind) == "sgd"
    for kind in (torch.optim.AdamW, torch.optim.RMSprop, functools.partial(torch.optim.NAdam, lr=1.0)):
        assert update_rule(kind) == "adam"
    assert update_rule(torch.optim.SGD([nn.Parameter(torch.zeros(1))])) == "sgd"
    for kind in (torch.optim.LBFGS, torch.optim.Adafactor):
        with pytest.raises(ValueError, match=rf"{kind.__name__} is not known: pass optimizer='sgd' if"):
            update_rule(kind)


def test_a_scaled_model_survives_copies_and_folds_exactly():
    torch.manual_seed(0)
    model = cnn(16).eval()
    parametrize(model, base=cnn, base_width=4, output_mult=2.0)
    x = EXAMPLES[cnn]
    expected = model(x)
    assert model[-1].multiplier == 0.5
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    twin = cnn(16).eval()
    parametrize(twin, base=cnn, base_width=4, output_mult=2.0)
    twin.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for copied in (twin, copy.deepcopy(model)):
        assert torch.equal(copied(x), expected)
    plain = fold_(copy.deepcopy(model))
    assert type(plain[-1]) is nn.Linear
    assert torch.equal(plain(x), expected)  # a power of two
    fresh = cnn(16).eval()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(x), expected)


@pytest.mark.compile
def test_scaled_models_compile():
    model = mlp(16)
    parametrize(model, base=mlp, base_width=4)
    check_compiles(lambda: copy.deepcopy(model), EXAMPLES[mlp])


def test_zero_readouts_start_at_zero():
    model = mlp(16)
    parametrize(model, base=mlp, base_width=4, zero_readout=True)
    assert torch.equal(model(EXAMPLES[mlp]), model[-1].bias.expand(5, -1))


@pytest.mark.parametrize(
    ("model", "options", "error", "says"),
    [
        (mlp(16), {"base": {"0.weight": (8, 10)}}, ValueError, "it lacks"),
        (mlp(16), {"base": {n: (*p.shape, 1) for n, p in mlp(8).named_parameters()}}, ValueError, "as many dimensions"),
        (nn.Bilinear(8, 8, 8), {"base": nn.Bilinear(4, 4, 4)}, NotImplementedError, "'weight'.*grows in 3"),
        (mlp(16), {"base": mlp}, ValueError, "base_width must be"),
        (mlp(16), {"base": mlp, "base_width": 4, "optimizer": "lion"}, ValueError, "optimizer must be"),
        (mlp(16), {"base": mlp, "base_width": 4, "scheme": "mip"}, ValueError, "scheme must be"),
        (mlp(16), {"base": mlp, "base_width": 4, "scheme": ABC.mup(2, "adam")}, ValueError, "is an ABC for 'adam'"),
        (mlp(16), {"base": mlp, "base_width": 4, "scheme": ABC.mup(1)}, ValueError, "without hidden weights"),
        (mlp(16), {"base": mlp, "base_width": 4, "readout": ["7"]}, ValueError, "readout must name"),
        (mlp(16), {"base": lambda n: mlp(4), "base_width": 4}, ValueError, "does not grow"),
        (
            mlp(16),
            {"base": mlp, "base_width": 4, "scheme": ABC((0, 0, 1, 1), (0, HALF := 0.5, -HALF, 0), 0)},
            ValueError,
            "treat all its hidden layers",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(model, options, error, says, shape_checks_off):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        parametrize(model, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, MuReadout) for module in model.modules())


def test_a_second_call_is_refused():
    model = mlp(16)
    parametrize(model, base=mlp, base_width=4)
    with pytest.raises(RuntimeError, match="parametrised before"):
        parametrize(copy.deepcopy(model), base=mlp, base_width=4)


# Readouts as layers.


@pytest.mark.parametrize(
    ("layer", "arguments", "shape", "wrong"),
    [
        (MuReadout, (6, 3), (4, 6), [(4, 5)]),
        (MuConvReadout, (4, 2, 3), (2, 4, 5, 5), [(2, 3, 5, 5)]),
        (MuConv1dReadout, (4, 2, 3), (2, 4, 5), [(2, 3, 5)]),
        (MuConv3dReadout, (2, 2, 2), (1, 2, 3, 3, 3), [(1, 3, 3, 3, 3)]),
    ],
)
def test_readouts_are_layers(layer, arguments, shape, wrong):
    check_layer(
        lambda: layer(*arguments, width_mult=4.0),
        torch.randn(shape),
        wrong_inputs=[torch.randn(each) for each in wrong],
    )


@given(width_mult=st.sampled_from([0.5, 2.0, 16.0]), output_mult=st.floats(0.1, 10.0))
@settings(max_examples=8, deadline=None)
def test_a_readout_by_hand_is_what_parametrize_makes(width_mult, output_mult):
    torch.manual_seed(0)
    plain = nn.Linear(16, 3)
    torch.manual_seed(0)
    by_hand = MuReadout.like(plain, width_mult=width_mult, output_mult=output_mult)
    model = nn.Sequential(plain)
    parametrize(model, base={"0.weight": (3, int(16 / width_mult)), "0.bias": (3,)}, output_mult=output_mult)
    x = torch.randn(4, 16)
    torch.testing.assert_close(model(x), by_hand(x))
    mine = nn.Sequential(by_hand)
    kept = by_hand.weight.clone()
    result = parametrize(mine, base={"0.weight": (3, int(16 / width_mult)), "0.bias": (3,)})
    assert torch.equal(by_hand.weight, kept)
    assert result.rates["0.weight"] == pytest.approx(width_mult)


# The coordinate check.


def task():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 10, generator=generator), torch.randint(4, (32,), generator=generator)


@pytest.mark.parametrize(
    ("scheme", "optimizer", "lr", "passes"),
    [
        ("mup", torch.optim.SGD, 0.1, True),
        ("mup", functools.partial(torch.optim.SGD, momentum=0.5), 0.05, True),
        ("mup", torch.optim.AdamW, 0.02, True),
        ("ntp", torch.optim.SGD, 0.1, True),
        (ABC.standard(2), torch.optim.SGD, 1.0, True),
        ("sp", torch.optim.SGD, 0.1, False),
        ("sp", torch.optim.Adam, 0.02, False),
    ],
)
def test_the_check_passes_what_scales_and_fails_what_does_not(scheme, optimizer, lr, passes):
    check = coordinate_check(
        mlp, [32, 128, 512], task(), optimizer, scheme=scheme, lr=lr, base_width=4, steps=2, seeds=6, tolerance=0.2
    )
    assert check.passed is passes, f"\n{check}"
    assert check.layers == ("0", "1", "2", "3", "4", "5", "6")
    assert check.sizes.shape == check.changes.shape == (3, 7, 3)
    assert (check.changes[..., 0] == 0).all()
    assert ("<- off" in str(check)) is not passes


def test_the_check_is_a_probe_that_leaves_no_trace():
    before = torch.get_rng_state()
    check = coordinate_check(mlp, [16, 32, 64], task(), steps=1, seeds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert check.plot().to_dict()["mark"]["type"] == "line"
    with pytest.raises(ValueError, match="three rising numbers"):
        coordinate_check(mlp, [64, 32, 16], task())
    with pytest.raises(ValueError, match="steps and seeds"):
        coordinate_check(mlp, [16, 32, 64], task(), steps=0)


def test_the_check_takes_models_with_losses_of_their_own():
    transformers = pytest.importorskip("transformers")

    def make(width):
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=6, n_embd=width, n_layer=1, n_head=width // 8, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)

    tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": tokens, "labels": tokens}
    check = coordinate_check(make, [32, 64, 128], data, torch.optim.Adam, lr=0.01, base_width=8, seeds=2, steps=2)
    assert check.expected.abs().max() == 0
    assert check.slopes.abs().max() < 0.3, f"\n{check}"
