"""The layer against `nn.MultiheadAttention`, masks and trained weights, and in networks of torch and Hugging Face."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from torch import nn

from lathe.core.surgery import swap
from lathe.nn.tensor_attention import HigherOrderAttention, HuggingFaceAttention, tensor_attention

VARIANTS = [
    {},
    {"bias": False},
    {"batch_first": False},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "vdim": 7, "bias": False},
    {"dtype": torch.float64},
]


def trained(**options):
    """An attention whose biases are not zero, as after training."""
    attention = nn.MultiheadAttention(12, 3, **({"batch_first": True} | options))
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_trained_attention_keeps_its_function_at_any_order(order, options):
    attention = trained(**options)
    layer = HigherOrderAttention.from_trained(attention, order)
    kind = options.get("dtype", torch.float32)
    query, key, value = (
        torch.randn(2, rows, width, dtype=kind)
        for rows, width in ((4, 12), (6, options.get("kdim", 12)), (6, options.get("vdim", 12)))
    )
    generator = torch.Generator().manual_seed(0)
    padding = torch.rand(2, 6, generator=generator) < 0.3
    allowed = torch.rand(4, 6, generator=generator) < 0.7
    numbers = torch.randn(2 * 3, 4, 6, generator=generator).to(kind)
    if not attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    allowed[:, 0] = True
    padding[:, 0] = False
    for masks in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": ~allowed},
        {"attn_mask": numbers},
        {"attn_mask": ~allowed, "key_padding_mask": padding},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, _ = attention(query, key, value, **masks)
        found, weights = layer(query, key, value, **masks)
        assert weights is None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    if attention.batch_first:  # without a batch
        expected, _ = attention(query[0], key[0], value[0], key_padding_mask=padding[0])
        found, _ = layer(query[0], key[0], value[0], key_padding_mask=padding[0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_causal_attention_keeps_its_function_too():
    attention, x = trained(), torch.randn(2, 6, 12)
    later = nn.Transformer.generate_square_subsequent_mask(6)
    expected, _ = attention(x, x, x, attn_mask=later, is_causal=True, need_weights=False)
    layer = HigherOrderAttention.from_trained(attention)
    for options in ({"attn_mask": later}, {"is_causal": True}, {"attn_mask": later, "is_causal": True}):
        torch.testing.assert_close(layer(x, x, x, **options)[0], expected, rtol=1e-5, atol=2e-6)


def test_a_trained_attention_can_leave_its_function_by_training():
    attention, x = trained(), torch.randn(2, 6, 12)
    layer = HigherOrderAttention.from_trained(attention)
    layer(x, x, x)[0].square().sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for name, parameter in layer.named_parameters())


def test_it_is_the_function_on_its_projections():
    layer = HigherOrderAttention(12, 3, order=4, scale=0.7, window=(2, 3, 2), dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        q = (x @ layer.q_proj.weight.T + layer.q_proj.bias)[..., part]
        ks, vs = (
            [(x @ each.weight.T + each.bias)[..., part] for each in some] for some in (layer.k_projs, layer.v_projs)
        )
        expected.append(tensor_attention(q, ks, vs, scale=0.7, window=(2, 3, 2)))
    expected = torch.cat(expected, -1) @ layer.out_proj.weight.T + layer.out_proj.bias
    torch.testing.assert_close(layer(x, x, x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_replacements_have_shapes_dtype_and_mode_of_what_they_replace(options):
    attention = trained(dropout=0.2, **options).eval()
    for order in (2, 3, 4):
        layer = HigherOrderAttention.like(attention, order)
        assert (layer.embed_dim, layer.num_heads, layer.dropout) == (12, 3, 0.2)
        assert (layer.kdim, layer.vdim, layer.batch_first) == (attention.kdim, attention.vdim, attention.batch_first)
        assert {p.dtype for p in layer.parameters()} == {attention.out_proj.weight.dtype}
        assert not layer.training
        assert (layer.q_proj.bias is None) is (options.get("bias") is False)
        assert layer.scale == 1 / 4
        expected = 2 * 12 * 12 + (order - 1) * 12 * (attention.kdim + attention.vdim)
        assert sum(p.numel() for p in layer.parameters() if p.ndim == 2) == expected


def test_a_layer_takes_the_arguments_of_the_one_that_it_replaces_in_their_order():
    ours, theirs = (list(inspect.signature(each).parameters) for each in (HigherOrderAttention, nn.MultiheadAttention))
    theirs = [name for name in theirs if name not in ("add_bias_kv", "add_zero_attn")]
    assert ours[: len(theirs)] == theirs
    ours, theirs = (
        list(inspect.signature(each.forward).parameters) for each in (HigherOrderAttention, nn.MultiheadAttention)
    )
    assert ours == theirs


def test_dropout_acts_in_training_only():
    layer, x = HigherOrderAttention(12, 3, dropout=0.5), torch.randn(2, 6, 12)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_the_polynomial_method_serves_a_layer_with_small_logits():
    exact = HigherOrderAttention(12, 6, scale=0.1).double()
    poly = HigherOrderAttention(12, 6, scale=0.1, method="poly", tol=1e-6).double()
    poly.load_state_dict(exact.state_dict())
    x = 0.5 * torch.randn(2, 20, 12, dtype=torch.float64)
    for options in ({}, {"is_causal": True}, {"key_padding_mask": torch.rand(2, 20) < 0.2}):
        torch.testing.assert_close(poly(x, x, x, **options), exact(x, x, x, **options), rtol=0, atol=1e-5)
    assert "method=poly" in repr(poly)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("make", [HigherOrderAttention.like, HigherOrderAttention.from_trained])
def test_it_stands_in_torchs_own_encoder_and_decoder(make, norm_first):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first), 2, enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first), 1)
    net = nn.ModuleList([encoder, decoder]).eval()
    x, y = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    later = nn.Transformer.generate_square_subsequent_mask(5)

    def run():
        memory = encoder(x, src_key_padding_mask=padding)
        return decoder(y, memory, tgt_mask=later, memory_key_padding_mask=padding)

    before = run()
    report = swap(net, {nn.MultiheadAttention: make})
    assert len(report.replaced) == 4
    with torch.no_grad():  # where torch would bypass its own attention
        after = run()
    assert after.shape == before.shape
    if make == HigherOrderAttention.from_trained:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    net.train()
    run().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_arguments_that_cannot_work_are_refused_before_any_work():
    x = torch.randn(2, 5, 12)
    layer = HigherOrderAttention(12, 3)
    for message, call in [
        ("num_heads must divide embed_dim, got 5 and 12", lambda: HigherOrderAttention(12, 5)),
        ("order must be at least 2, got 1", lambda: HigherOrderAttention(12, 3, order=1)),
        ("dropout must lie in 0 to 1", lambda: HigherOrderAttention(12, 3, dropout=1.5)),
        (r"query must be \(batch, rows, 12\).*\(2, 5, 11\)", lambda: layer(x[..., :11], x, x)),
        (r"value must be .*\(5, 12\)", lambda: layer(x, x, x[0])),
        (r"attn_mask must be \(5, 5\) or \(6, 5, 5\), got \(4, 5\)", lambda: layer(x, x, x, attn_mask=x[0, :4, :5])),
        (r"key_padding_mask must be \(2, 5\), got \(5,\)", lambda: layer(x, x, x, key_padding_mask=x[0, :, 0])),
        ("add_bias_kv", lambda: HigherOrderAttention.like(nn.MultiheadAttention(12, 3, add_bias_kv=True))),
        ("add_zero_attn", lambda: HigherOrderAttention.from_trained(nn.MultiheadAttention(12, 3, add_zero_attn=True))),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"attention must be an nn\.MultiheadAttention, got Linear"):
        HigherOrderAttention.like(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="no argument windows"):
        HigherOrderAttention(12, 3, windows=3)


# --- Hugging Face ---

transformers = pytest.importorskip("transformers")


def vit(**options):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=4,
        **options,
    )
    return transformers.ViTForImageClassification(config).eval()


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config).eval()


def of(net, name):
    return next(type(module) for module in net.modules() if type(module).__name__ == name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_trained_vision_transformer_keeps_its_function(implementation, qkv_bias):
    net, x = vit(attn_implementation=implementation, qkv_bias=qkv_bias), torch.randn(2, 3, 8, 8)
    before = net(x).logits
    report = swap(net, {of(net, "ViTAttention"): HuggingFaceAttention.from_trained})
    assert len(report.replaced) == 2
    torch.testing.assert_close(net(x).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_trained_language_model_keeps_its_function_its_masks_and_its_cache(implementation):
    net = gpt2(attn_implementation=implementation)
    x = torch.randint(1, 24, (2, 6))
    padding = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])

    def answers():
        torch.manual_seed(0)
        plain, padded = net(x).logits, net(x, attention_mask=padding).logits[padding.bool()]
        fed = net(x[:, :4], use_cache=True)
        rest = net(x[:, 4:], past_key_values=fed.past_key_values).logits
        written = net.generate(x, attention_mask=padding, max_new_tokens=5, do_sample=False, pad_token_id=0)
        return plain, padded, rest, written

    before = answers()
    report = swap(net, {of(net, "GPT2Attention"): HuggingFaceAttention.from_trained})
    assert len(report.replaced) == 2
    for found, expected in zip(answers(), before):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [3, 4])
def test_the_cache_of_a_language_model_of_any_order_changes_no_answer(order):
    net = gpt2()
    swap(net, {of(net, "GPT2Attention"): lambda attention: HuggingFaceAttention.like(attention, order)})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randint(1, 24, (2, 6))
    at_once = net(x, use_cache=False).logits
    state, found = None, []
    for part in (x[:, :3], x[:, 3:4], x[:, 4:]):
        result = net(part, past_key_values=state, use_cache=True)
        state = result.past_key_values
        found.append(result.logits)
    torch.testing.assert_close(torch.cat(found, 1), at_once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["OPT", "CLIPVision"])
def test_other_models_of_hugging_face_keep_their_function(name):
    if name == "OPT":
        config = transformers.OPTConfig(
            vocab_size=24, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
            max_position_embeddings=16, word_embed_proj_dim=16, dropout=0.0,
        )  # fmt: skip
        net, x = transformers.OPTModel(config).eval(), torch.randint(1, 24, (2, 6))
    else:
        config = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        net, x = transformers.CLIPVisionModel(config).eval(), torch.randn(2, 3, 8, 8)
    before = net(x).last_hidden_state
    report = swap(
        net, {of(net, "OPTAttention" if name == "OPT" else "CLIPAttention"): HuggingFaceAttention.from_trained}
    )
    assert len(report.replaced) == 2
    torch.testing.assert_close(net(x).last_hidden_state, before, rtol=1e-4, atol=1e-5)


def test_attentions_without_a_counterpart_are_refused():
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    net = transformers.LlamaModel(config)
    swap(net, {of(net, "LlamaAttention"): HuggingFaceAttention.from_trained})
    with pytest.raises(ValueError, match="position_embeddings must be None: rotary"):
        net(torch.randint(0, 24, (1, 3)))
    config.num_key_value_heads = 2
    grouped = transformers.LlamaModel(config)
    with pytest.raises(ValueError, match="must have embed_dim features each"):
        swap(grouped, {of(grouped, "LlamaAttention"): HuggingFaceAttention.from_trained})
    with pytest.raises(TypeError, match=r"attention must have q_proj, .* got Linear"):
        HuggingFaceAttention.from_trained(nn.Linear(3, 3))
    layer = HuggingFaceAttention.like(vit().vit.layers[0].attention)
    assert math.isclose(layer.attention.scale, 1 / 8)
    with pytest.raises(ValueError, match=r"hidden_states must be \(batch, n, 16\), got \(5, 16\)"):
        layer(torch.randn(5, 16))
