"""Pointers through the shared checks, and the span pointer by `swap` into networks that answer questions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conformance import check_compiles, check_layer
from torch import Tensor, nn
from torch.nn import functional

from lathe.core.surgery import swap
from lathe.nn.pointer_networks import PointerAttention, PointerNetwork, SpanPointer, pointer_generator

POINTS = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A pointer attention with its input as both query and memory, for checks that give one input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = PointerAttention(8, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x)


class Forced(nn.Module):
    """A pointer network that is taught one sequence for all samples."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.network = PointerNetwork(hidden_dim=6, **options)

    def forward(self, points: Tensor) -> Tensor:
        targets = torch.tensor([2, 0, 4, 5], device=points.device)
        return self.network(points, targets.expand(len(points), -1))


def test_pointer_attention_does_what_every_layer_does():
    check_layer(Between, HIDDEN, wrong_inputs=[HIDDEN[:, :, :7], HIDDEN[0]])


def test_span_pointers_do_what_every_layer_does():
    check_layer(lambda: SpanPointer(8), HIDDEN, wrong_inputs=[HIDDEN[:, :, :7], HIDDEN[0]])


@pytest.mark.parametrize("options", [{}, {"glimpses": 1, "feed": "memory", "bidirectional": True}])
def test_pointer_networks_do_what_every_layer_does(options):
    wrong = [POINTS[:, :, :1], POINTS[0]]
    check_layer(lambda: Forced(**options), POINTS, wrong_inputs=wrong, gradcheck_input=POINTS[:2])


@pytest.mark.compile
def test_pointers_compile():
    check_compiles(Between, HIDDEN)
    check_compiles(lambda: SpanPointer(8), HIDDEN)


# --- networks not made for it ---


def question_answering(name: str) -> tuple[nn.Module, str]:
    """A Transformer that reads a question and a text, and the name of its span head."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    configs = {
        "bert": lambda: transformers.BertConfig(**small, intermediate_size=32),
        "roberta": lambda: transformers.RobertaConfig(**small, intermediate_size=32, max_position_embeddings=20),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0
        ),
    }
    classes = {"bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2"}
    return getattr(transformers, f"{classes[name]}ForQuestionAnswering")(configs[name]()), "qa_outputs"


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_a_span_pointer_takes_the_place_of_a_span_head(name):
    net, head = question_answering(name)
    report = swap(net, {nn.Linear: SpanPointer.like}, where=lambda name: name == head)
    assert len(report.replaced) == 1
    text = torch.randint(3, 30, (4, 10))
    starts, ends = torch.randint(0, 5, (4,)), torch.randint(5, 10, (4,))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        found = net(text)
        loss = functional.cross_entropy(found.start_logits, starts) + functional.cross_entropy(found.end_logits, ends)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in net.qa_outputs.parameters())


def test_the_worked_examples_of_the_page_run_as_pasted():
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[2] / "docs" / "papers" / "pointer-networks.md").read_text(encoding="utf-8")
    text = page[page.index("### In a text model") : page.index("## When not to use it")]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(block, names)
    assert all(p.grad is not None for name in ("pointer", "gate", "embed") for p in names[name].parameters())


def test_a_copying_decoder_learns_to_say_words_that_it_was_never_taught_to_say():
    """Reverse a sentence: half of the words occur in no sentence of training."""
    torch.manual_seed(0)
    words, width = 40, 32
    place = nn.Embedding(6, width)
    say, gate = nn.Linear(width, words), nn.Linear(width, 1)
    layer = nn.TransformerEncoderLayer(width, 2, 64, dropout=0.0, batch_first=True)
    encoder, pointer = (
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        PointerAttention(width, width, width),
    )
    parts = nn.ModuleList([place, say, gate, encoder, pointer])
    embed = torch.randn(words, width)  # of words known from elsewhere
    optimizer = torch.optim.Adam(parts.parameters(), 1e-2)

    def log_p(source):
        memory = encoder(embed[source] + place.weight)
        query = place.weight.expand(len(source), -1, -1)
        return pointer_generator(say(query), pointer(query, memory), source, gate(query)[..., 0])

    for _ in range(120):
        source = torch.randint(0, words // 2, (64, 6))
        optimizer.zero_grad()
        functional.nll_loss(log_p(source).flatten(0, 1), source.flip(1).flatten()).backward()
        optimizer.step()
    unseen = torch.randint(words // 2, words, (200, 6))
    assert float((log_p(unseen).argmax(2) == unseen.flip(1)).double().mean()) > 0.9
