"""Models whose training steps are timed: random weights, tables of sizes that are in use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import Case, make_indices
from benchmarks.lookup import needs

Batch = tuple[Tensor, ...]
SEQUENCES, LENGTH = 4, 64
TRIPLES = 1024


@dataclass(frozen=True)
class ModelCase:
    """A model, its batches and its loss, and which training steps are usual for it."""

    name: str
    description: str
    build: Callable[[], nn.Module]
    batches: Callable[[int, int], list[Batch]]  # how many, from which seed
    loss: Callable[[nn.Module, Batch], Tensor]
    steps: tuple[str, ...]  # such as "adamw-clip"
    module: str = "torch"  # what must be importable

    def unavailable(self) -> str | None:
        reason = needs(self.module)()
        if reason is None or self.module == "torch":
            return reason
        return f"{reason}; pip install 'embed_ext[models]' brings it"


def _transformers() -> Any:
    return importlib.import_module("transformers")


def gpt2(vocabulary: int = 50_257, dim: int = 256) -> nn.Module:
    config = _transformers().GPT2Config(
        vocab_size=vocabulary,
        n_positions=LENGTH,
        n_embd=dim,
        n_layer=2,
        n_head=4,
        # Without dropout the variants' losses can be compared.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = _transformers().GPT2LMHeadModel(config)
    return model


def t5(vocabulary: int = 32_128, dim: int = 256) -> nn.Module:
    config = _transformers().T5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=dim // 4,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    model: nn.Module = _transformers().T5ForConditionalGeneration(config)
    return model


def distmult(entities: int, relations: int, dim: int) -> nn.Module:
    kge = importlib.import_module("torch_geometric.nn.kge")
    model: nn.Module = kge.DistMult(entities, relations, hidden_channels=dim)
    # Its own first weights are so small that a wrong gradient would not show in the next losses.
    for table in model.parameters():
        nn.init.normal_(table)
    return model


class TransE(nn.Module):
    """Entities and relations of a knowledge graph: head + relation should be near tail."""

    def __init__(self, entities: int, relations: int, dim: int) -> None:
        super().__init__()
        self.entities = nn.Embedding(entities, dim)
        self.relations = nn.Embedding(relations, dim)

    def forward(self, head: Tensor, relation: Tensor, tail: Tensor, corrupt: Tensor) -> Tensor:
        # Each [triples]; one entity of each triple is replaced. Three uses of one table.
        subject = self.entities(head) + self.relations(relation)
        near = (subject - self.entities(tail)).norm(dim=1)
        far = (subject - self.entities(corrupt)).norm(dim=1)
        return F.relu(1.0 + near - far).mean()


def _sequences(vocabulary: int, kinds: int) -> Callable[[int, int], list[Batch]]:
    """Batches of ``kinds`` tensors [sequences, length], frequent tokens first as in a BPE."""

    def make(count: int, seed: int) -> list[Batch]:
        case = Case(vocabulary, 1, SEQUENCES * LENGTH, "zipf-sorted")
        drawn = make_indices(case, count * kinds, seed)
        shaped = [indices.clone().view(SEQUENCES, LENGTH) for indices in drawn]
        return [tuple(shaped[i * kinds : (i + 1) * kinds]) for i in range(count)]

    return make


def make_triples(entities: int, relations: int) -> Callable[[int, int], list[Batch]]:
    def make(count: int, seed: int) -> list[Batch]:
        heads, corrupt = (
            make_indices(Case(entities, 1, TRIPLES, kind), 2 * count, seed)
            for kind in ("zipf", "uniform")
        )
        names = make_indices(Case(relations, 1, TRIPLES, "zipf"), count, seed)
        return [
            (heads[2 * i].clone(), names[i].clone(), heads[2 * i + 1].clone(), corrupt[i].clone())
            for i in range(count)
        ]

    return make


def _language_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch[0], labels=batch[-1]).loss
    return loss


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(*batch)
    return loss


def distmult_loss(model: nn.Module, batch: Batch) -> Tensor:
    head, relation, tail, drawn = batch
    # The model replaces entities by ones that it draws: the same for each variant.
    torch.manual_seed(int(drawn[0]))
    loss: Tensor = model.loss(head, relation, tail)  # type: ignore[operator]
    return loss


MODELS = {
    model.name: model
    for model in (
        ModelCase(
            "gpt2",
            "GPT-2, 2 layers, vocabulary 50,257 x 256 tied to the output layer, 4 x 64 tokens",
            gpt2,
            _sequences(50_257, 1),
            _language_loss,
            ("adamw-clip", "sgd-clip"),
            "transformers",
        ),
        ModelCase(
            "t5",
            "T5, 2 + 2 layers, vocabulary 32,128 x 256 of encoder, decoder and output layer, "
            "4 x 64 tokens in and out",
            t5,
            _sequences(32_128, 2),
            _language_loss,
            ("adamw-clip", "sgd-clip"),
            "transformers",
        ),
        ModelCase(
            "transe",
            "TransE, 123,182 entities and 37 relations (as YAGO3-10) x 128, 1,024 triples; three "
            "uses of the entities",
            lambda: TransE(123_182, 37, 128),
            make_triples(123_182, 37),
            own_loss,
            ("sgd", "sgd-clip", "adagrad", "adamw"),
        ),
        ModelCase(
            "distmult",
            "PyTorch Geometric's DistMult, 123,182 entities and 37 relations (as YAGO3-10) x 128, "
            "1,024 triples and as many corrupted ones; four uses of the entities, two of the "
            "relations",
            lambda: distmult(123_182, 37, 128),
            make_triples(123_182, 37),
            distmult_loss,
            ("adagrad", "sgd-clip"),
            "torch_geometric",
        ),
    )
}
