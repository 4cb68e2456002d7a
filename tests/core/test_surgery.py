"""Against networks whose answer is known: what was asked for is replaced, everything else is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lathe.core.surgery import Skip, find_sequences, get_module, set_module, swap


class Twice(nn.Module):
    """Doubles; a replacement that a test can see in the output."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * (x if self.inner is None else self.inner(x))


class Block(nn.Module):
    """A residual block whose second BatchNorm goes into a sum."""

    def __init__(self, width=4, shared=False):
        super().__init__()
        self.relu2 = nn.ReLU(inplace=True)  # registered before what it follows
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu1 = self.relu2 if shared else nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + x)


class DataDependent(Block):
    """The same, with a decision that torch.fx cannot follow."""

    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x)))
        if y.sum() < -1e9:
            return y
        y = self.conv2(y)
        y = self.bn2(y)
        return self.relu2(y + x)


def merge(*modules):
    return Twice(nn.Sequential(*modules))


def types(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


def test_a_single_type_is_replaced_everywhere_and_the_output_shows_it():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Sequential(nn.Linear(3, 3)))
    x, first, second = torch.randn(2, 3), net[0], net[2][0]
    report = swap(net, {nn.Linear: Twice})
    assert [each.name for each in report.replaced] == ["0", "2.0"]
    torch.testing.assert_close(net(x), 2 * second(torch.tanh(2 * first(x))))
    assert report.model is net
    assert not report.skipped


def test_modules_in_lists_dicts_and_nested_containers_are_found():
    net = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]), "b": nn.Linear(2, 2)})
    assert [each.name for each in swap(net, {nn.Linear: Twice}).replaced] == ["a.0", "a.1.0", "b"]
    assert not any(type(module) is nn.Linear for module in [net["a"][0], net["a"][1][0], net["b"]])


def test_plain_lists_that_refer_to_registered_modules_follow():
    net = nn.Module()
    net.a = nn.Linear(2, 2)
    net.order = [net.a, {"again": (net.a,)}]
    swap(net, {nn.Linear: Twice})
    assert net.order[0] is net.a
    assert net.order[1]["again"][0] is net.a
    assert type(net.a) is Twice


def test_modules_that_torch_does_not_register_are_reported():
    net = nn.Module()
    net.layers = [nn.Linear(2, 2)]
    report = swap(net, {nn.Linear: Twice})
    assert report.replaced == []
    assert report.skipped[0].name == "layers[0]"
    assert "nn.ModuleList" in report.skipped[0].reason


def test_the_network_itself_is_replaced_in_the_report():
    net = nn.Linear(2, 2)
    report = swap(net, {nn.Linear: Twice})
    assert type(report.model) is Twice
    assert report.model.inner is net
    assert report.replaced[0].name == ""
    assert "(root)" in str(report)


def test_a_shared_module_stays_shared_and_its_rule_is_called_once():
    net, calls = nn.Module(), []
    net.a = nn.Linear(2, 2)
    net.b = nn.Sequential(net.a, net.a)
    report = swap(net, {nn.Linear: lambda linear: calls.append(linear) or Twice()})
    assert len(calls) == 1
    assert net.a is net.b[0] is net.b[1]
    assert type(net.a) is Twice
    assert report.replaced[0].names == ("a", "b.0", "b.1")
    assert "shared, also b.0, b.1" in str(report)


def test_a_shared_module_is_left_where_one_of_its_names_is_refused():
    net = nn.Module()
    net.a = net.b = nn.Linear(2, 2)
    report = swap(net, {nn.Linear: Twice}, where=lambda name: name == "a")
    assert net.a is net.b
    assert type(net.a) is nn.Linear
    assert "'b'" in report.skipped[0].reason


def test_where_is_asked_by_name_or_by_name_and_module():
    for where in (
        lambda name: name != "1",
        lambda name, module: module.out_features != 5,
        lambda name, unused=None: name != "1",
        lambda *both: both[0] != "1",
    ):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 4))
        report = swap(net, {nn.Linear: Twice}, where=where)
        assert [each.name for each in report.replaced] == ["0", "2"]
        assert report.skipped == [Skip("1", "Linear", "where= refused it")]


@pytest.mark.parametrize("bad", [lambda linear: 1 / 0, lambda linear: "no module", lambda linear: Twice])
def test_nothing_changes_when_a_rule_fails(bad):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh())
    before = list(net.modules())
    state = copy.deepcopy(net.state_dict())
    with pytest.raises((TypeError, ZeroDivisionError)):
        swap(net, {nn.ReLU: lambda _: Twice(), nn.Linear: lambda m: Twice() if m is net[0] else bad(m)})
    assert all(a is b for a, b in zip(before, net.modules(), strict=True))
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_a_rule_that_returns_no_module_is_named():
    with pytest.raises(TypeError, match="rule for Linear must return a module or None, got int for '0'"):
        swap(nn.Sequential(nn.Linear(2, 2)), {nn.Linear: lambda _: 3})


def test_none_leaves_a_module_alone_and_is_reported():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    report = swap(net, {nn.Linear: lambda m: Twice() if m.out_features == 3 else None})
    assert types(net)["0"] == "Linear"
    assert report.skipped == [Skip("0", "Linear", "the rule left it alone")]


def test_subclasses_and_earlier_replacements_are_left_alone():
    class Standardized(nn.Conv2d):
        pass

    net = nn.Sequential(nn.Conv2d(2, 2, 1), Standardized(2, 2, 1))
    rules = {nn.Conv2d: lambda conv: Standardized(2, 2, 1)}
    first = swap(net, rules)
    assert [each.name for each in first.replaced] == ["0"]
    assert "subclass of Conv2d" in first.skipped[0].reason
    second = swap(net, rules)
    assert second.replaced == []
    assert len(second.skipped) == 2


def test_replacements_are_not_looked_into():
    net = nn.Sequential(nn.Linear(2, 2))
    report = swap(net, {nn.Linear: lambda linear: nn.Sequential(linear, nn.Linear(2, 2))})
    assert len(report.replaced) == 1
    assert types(net)["0.1"] == "Linear"


def test_an_outer_module_goes_before_those_inside_it():
    net = nn.Sequential(Block(), nn.Conv2d(4, 4, 1))
    report = swap(net, {nn.Conv2d: Twice, Block: Twice, (nn.BatchNorm2d, nn.ReLU): merge})
    assert [each.name for each in report.replaced] == ["0", "1"]
    assert Skip("0.conv1", "Conv2d", "it stands inside '0', which was replaced") in report.skipped


def test_mode_device_and_dtype_are_kept():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).double().eval()
    swap(net, {nn.Linear: lambda _: nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.ReLU: lambda _: nn.PReLU()})
    assert not any(module.training for module in net.modules())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    on_meta = nn.Sequential(nn.Linear(2, 2, device="meta"))
    swap(on_meta, {nn.Linear: lambda _: nn.Linear(2, 2)})
    assert on_meta[0].weight.device.type == "meta"


def test_a_wrapped_module_keeps_its_own_mode():
    net = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)), nn.ReLU())
    net[0][0].eval()
    swap(net, {nn.Sequential: lambda block: Twice(block) if block is not net else None})
    assert net[0].training
    assert not net[0].inner[0].training


def test_packed_buffers_keep_their_dtype():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(4, dtype=torch.uint8))
            self.register_buffer("scale", torch.ones(1))

    net = nn.Sequential(nn.Linear(2, 2)).bfloat16()
    swap(net, {nn.Linear: lambda _: Packed()})
    assert (net[0].codes.dtype, net[0].scale.dtype) == (torch.uint8, torch.float32)


def test_hooks_and_ties_that_get_lost_are_reported():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = net[0].weight
    net[1].register_forward_hook(lambda *_: None)
    (replaced,) = swap(net, {nn.Linear: lambda _: nn.Linear(3, 5)}).replaced
    assert replaced.notes == ("1 hook lost", "weight is no longer tied to 0.weight")


def test_a_kept_tie_is_not_reported():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = net[0].weight
    assert swap(net, {nn.Linear: Twice}).replaced[0].notes == ()


# --- sequences ---


@pytest.mark.parametrize("example", [None, torch.ones(2, 4, 5, 5)])
@pytest.mark.parametrize("block", [Block, DataDependent])
def test_sequences_follow_the_data_and_not_the_registration(block, example):
    net = nn.Sequential(block(), nn.Identity(), block()).eval()
    report = swap(net, {(nn.BatchNorm2d, (nn.ReLU, nn.SiLU)): merge}, example_input=example)
    assert [each.sequence for each in report.replaced] == [("0.bn1", "0.relu1"), ("2.bn1", "2.relu1")]
    assert type(net[0].relu1) is nn.Identity
    assert {skip.name for skip in report.skipped} == {"0.bn2", "2.bn2"}
    assert bool(report.notes) == (block is DataDependent)
    if block is DataDependent:
        assert "torch.fx could not trace" in str(report)
        assert ("recorded" if example is not None else "order of registration") in str(report)


@pytest.mark.parametrize("block", [Block, DataDependent])
def test_a_rule_that_puts_the_same_modules_back_changes_no_output(block):
    net, x = nn.Sequential(block(), block()).eval(), torch.randn(2, 4, 5, 5)
    before = net(x)
    report = swap(net, {(nn.BatchNorm2d, nn.ReLU): nn.Sequential}, example_input=x)
    assert len(report.replaced) == 2
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("example", [None, torch.ones(2, 4, 5, 5)])
@pytest.mark.parametrize("block", [Block, DataDependent])
def test_a_shared_activation_is_no_end_of_a_sequence(block, example):
    net = block(shared=True).eval()
    report = swap(net, {(nn.BatchNorm2d, nn.ReLU): merge}, example_input=example)
    assert report.replaced == []
    assert any("called 2 times" in skip.reason for skip in report.skipped)


class Uses(nn.Module):
    """conv -> bn -> relu, with something else done to the BatchNorm's output."""

    def __init__(self, use, traceable):
        super().__init__()
        self.bn, self.relu, self.use, self.traceable = nn.BatchNorm1d(3), nn.ReLU(), use, traceable

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            return x
        y = self.bn(x)
        return self.use(y, self.relu, self)


def returned(y, relu, net):
    return relu(y), y


def residual(y, relu, net):
    return relu(y) + y


def viewed(y, relu, net):
    z = y[:, 0]
    return relu(y), z


def written(y, relu, net):
    y.add_(1)
    return relu(y)


def kept(y, relu, net):
    net.kept = [y]
    return relu(y)


def read(y, relu, net):
    return relu(y) * net.bn.weight


def functional(y, relu, net):
    return torch.relu(y)


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("use", [returned, residual, viewed, written, functional])
def test_an_output_that_something_else_uses_makes_no_sequence(use, traceable):
    net, x = Uses(use, traceable), torch.randn(4, 3)
    assert find_sequences(net, (nn.BatchNorm1d, nn.ReLU), x) == []
    assert find_sequences(net, (nn.BatchNorm1d, nn.ReLU)) == []


def test_an_output_that_the_network_keeps_makes_no_sequence():
    assert find_sequences(Uses(kept, traceable=False), (nn.BatchNorm1d, nn.ReLU), torch.randn(4, 3)) == []


def test_parameters_read_without_a_call_make_no_sequence():
    assert find_sequences(Uses(read, traceable=True), (nn.BatchNorm1d, nn.ReLU)) == []


def test_dropout_that_passes_its_input_through_does_not_hide_a_use():
    class Net(nn.Module):
        def __init__(self, leak):
            super().__init__()
            self.linear, self.dropout, self.norm, self.leak = nn.Linear(3, 3), nn.Dropout(), nn.LayerNorm(3), leak

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            y = self.linear(x)
            z = self.dropout(y)
            return self.norm(z) + (y if self.leak else z)

    found = [find_sequences(Net(leak), (nn.Linear, nn.Dropout), torch.randn(2, 3)) for leak in (False, True)]
    assert [len(each) for each in found] == [1, 0]


def test_a_sequence_in_training_only_must_hold_there():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm1d(3), nn.ReLU()

        def forward(self, x):
            y = self.bn(x)
            return (self.relu(y), y) if self.training else self.relu(y)

    for training in (True, False):
        assert find_sequences(Auxiliary().train(training), (nn.BatchNorm1d, nn.ReLU)) == []


def test_looking_for_sequences_leaves_the_network_as_it_was():
    class Remembers(DataDependent):
        def forward(self, x):
            self.seen = x
            self.bn1.num_batches_tracked.add_(1)
            return super().forward(x)

    net = Remembers()
    net.bn2.eval()
    state, attributes = copy.deepcopy(net.state_dict()), set(net.__dict__)
    for example in (None, torch.randn(2, 4, 5, 5)):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        find_sequences(net, (nn.BatchNorm2d, nn.ReLU), example)
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
        assert set(net.__dict__) == attributes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert net.bn1.training
        assert not net.bn2.training


def test_a_container_that_is_walked_in_a_loop_goes_by_registration():
    class Walks(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)])

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            for part in self.parts:
                x = part(x)
            return x

    net = Walks()
    report = swap(net, {(nn.Linear, nn.ReLU): merge})
    assert report.replaced[0].sequence == ("parts.0", "parts.1")
    assert "guess" in report.replaced[0].found_by
    (found,) = find_sequences(Walks(), (nn.Linear, nn.ReLU), torch.randn(1, 3))
    assert "recorded" in found.found_by


def test_longer_sequences_go_first_and_none_overlap():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2), nn.ReLU())
    rules = {
        nn.Conv2d: Twice,
        (nn.BatchNorm2d, nn.ReLU): lambda *_: Twice(),
        (nn.Conv2d, nn.BatchNorm2d, nn.ReLU): lambda *_: Twice(),
    }
    report = swap(net, rules)
    assert [each.sequence for each in report.replaced] == [("0", "1", "2"), ("3", "4")]
    assert [type(part).__name__ for part in net] == ["Twice", "Identity", "Identity", "Twice", "Identity"]


def test_a_sequence_left_alone_falls_to_the_rule_for_its_first_module():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    report = swap(net, {(nn.Linear, nn.ReLU): lambda *_: None, nn.Linear: Twice})
    assert [(each.name, each.sequence) for each in report.replaced] == [("0", ())]


def test_overlapping_places_are_all_found():
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    assert [found.names for found in find_sequences(net, (nn.Linear, nn.Linear))] == [
        ("0", "1"),
        ("1", "2"),
        ("2", "3"),
    ]


# --- networks not made for it ---


def hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    ids = {"input_ids": torch.arange(6)[None]}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=30, **small)), ids
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config), ids
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **small)), torch.randn(
            2, 3, 8, 8
        )
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config), torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit", "resnet"])
def test_transformers_models_give_the_same_answer_after_a_swap_that_computes_the_same(kind, recorded):
    net, example = hugging_face(kind)
    net.eval()
    answer = (lambda: net(**example)[0]) if isinstance(example, dict) else (lambda: net(example)[0])
    before = answer()
    activation, conv1d = {
        "bert": ("GELUActivation", None),
        "gpt2": ("NewGELUActivation", "Conv1D"),
        "vit": ("GELUActivation", None),
        "resnet": ("ReLU", None),
    }[kind]
    by_name = {type(module).__name__: type(module) for module in net.modules()}
    linear = by_name[conv1d] if conv1d else nn.BatchNorm2d if kind == "resnet" else nn.Linear
    single = nn.Conv2d if kind == "resnet" else linear
    rules = {(linear, by_name[activation]): nn.Sequential, single: nn.Sequential}
    report = swap(net, rules, example_input=example if recorded else None)
    assert sum(bool(each.sequence) for each in report.replaced) == {"bert": 2, "gpt2": 2, "vit": 2, "resnet": 3}[kind]
    singles = {"bert": 11, "gpt2": 6, "vit": 11, "resnet": 6}[kind]
    assert sum(not each.sequence for each in report.replaced) == singles
    torch.testing.assert_close(answer(), before, rtol=0, atol=0)
    assert "torch.fx could not trace" in str(report)


def test_a_tied_language_model_head_is_reported():
    net, _ = hugging_face("gpt2")
    (replaced,) = swap(net, {nn.Linear: lambda head: nn.Linear(16, 30, bias=False)}).replaced
    assert replaced.notes == ("weight is no longer tied to transformer.wte.weight",)


# --- names and bad input ---


def test_modules_are_read_and_set_by_name():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    assert get_module(net, "") is net
    assert get_module(net, "a.1") is net["a"][1]
    new = nn.Tanh()
    set_module(net, "a.1", new)
    assert net["a"][1] is new


def test_bad_input_is_named():
    net = nn.Sequential(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"got '0\.x'; the modules of 0 are: 0"):
        get_module(net, "0.x")
    with pytest.raises(ValueError, match="name must be that of a module"):
        set_module(net, "7", nn.ReLU())
    with pytest.raises(ValueError, match="must not be empty"):
        set_module(net, "", nn.ReLU())
    with pytest.raises(TypeError, match="must hold types"):
        swap(net, {"ReLU": Twice})
    with pytest.raises(TypeError, match="must hold types"):
        find_sequences(net, (nn.ReLU, int))
    with pytest.raises(ValueError, match="at least one"):
        find_sequences(net, ())
    with pytest.raises(TypeError, match="must be callable"):
        swap(net, {nn.ReLU: None})


def test_the_report_is_a_table():
    net = nn.Sequential(Block(), nn.Linear(4, 4))
    text = str(swap(net, {(nn.BatchNorm2d, nn.ReLU): merge, nn.Linear: lambda _: nn.Linear(4, 2)}))
    assert text.splitlines()[0] == "replaced 2 modules, skipped 1 module"
    assert "BatchNorm2d + ReLU" in text
    assert "20 -> 10" in text
    assert "goes to add" in text
