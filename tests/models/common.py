"""Tiny models of well-known families, with random weights, and a batch for each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import embed_ext
from tests.common import generator

VOCABULARY = 97
BATCH, LENGTH = 2, 8
PAD, EOS = 0, 1
TOKENS = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": EOS}

_ENCODER_AND_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 2,
}

# Class, configuration, options. Dropout stays on where it is: a lookup draws no random number.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": PAD,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "sliding_window": 8,
        },
    ),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "vocab_size": VOCABULARY,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size": 16,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "head_dim": 8,
            "intermediate_size": 32,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "max_position_embeddings": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": 32,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_ENCODER_AND_DECODER,
            "max_position_embeddings": 32,
            "scale_embedding": True,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_ENCODER_AND_DECODER,
            "num_mel_bins": 4,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "clip": ("CLIPModel", "CLIPConfig", {}),
}
MODELS = tuple(CONFIGS)
_CLIP_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}

# What convert() swaps and leaves, by the first name of each module.
SWAPPED = {
    "gpt2": ["transformer.wte", "transformer.wpe"],
    "bert": [
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
    ],
    "llama": ["model.embed_tokens"],
    "t5": [
        "shared",
        "encoder.embed_tokens",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "decoder.embed_tokens",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ],
    "gemma3": ["model.embed_tokens"],
    "gemma3n": ["model.embed_tokens", "model.embed_tokens_per_layer"],
    "opt": ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
    "bart": [
        "model.shared",
        "model.encoder.embed_tokens",
        "model.encoder.embed_positions",
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
    ],
    "whisper": ["model.encoder.embed_positions", "model.decoder.embed_tokens"],
    "clip": [
        "text_model.embeddings.token_embedding",
        "text_model.embeddings.position_embedding",
        "vision_model.embeddings.position_embedding",
    ],
}
LEFT = {"whisper": ["model.decoder.embed_positions"]}


def make_config(transformers: Any, name: str) -> Any:
    """The configuration of a tiny model of that family."""
    _, config_name, options = CONFIGS[name]
    if name == "clip":
        options = {
            "text_config": {**_CLIP_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
            | TOKENS,
            "vision_config": {**_CLIP_TOWER, "image_size": 8, "patch_size": 4},
            "projection_dim": 16,
        }
        return getattr(transformers, config_name)(**options)
    return getattr(transformers, config_name)(**options, **TOKENS)


def make_model(transformers: Any, name: str, seed: int = 0) -> Any:
    """A tiny model of that family, in eval mode."""
    torch.manual_seed(seed)
    return getattr(transformers, CONFIGS[name][0])(make_config(transformers, name)).eval()


def make_pair(transformers: Any, name: str) -> tuple[Any, Any]:
    """A converted model and a stock one of the same weights."""
    theirs = make_model(transformers, name)
    ours = copy.deepcopy(theirs)
    embed_ext.convert(ours)
    return ours, theirs


def make_batch(name: str, seed: int = 1) -> dict[str, Tensor | bool]:
    """What the model of that name is called with: token ids [B, L] and what else it needs."""
    source = generator(seed)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=source)
    if name == "clip":
        tokens[:, -1] = EOS
        pixels = torch.randn(BATCH, 3, 8, 8, generator=source)
        return {"input_ids": tokens, "pixel_values": pixels, "return_loss": True}
    if name == "whisper":
        return {"input_features": torch.randn(BATCH, 4, 16, generator=source), "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def outputs(model: nn.Module, name: str, seed: int = 1) -> Any:
    """One forward pass; the random numbers of dropout are the same for every call."""
    torch.manual_seed(seed)
    return model(**make_batch(name, seed))


def logits(result: Any) -> Tensor:
    """What the model predicts, [B, L, V] or [B, B]."""
    return result.logits_per_text if "logits_per_text" in result else result.logits  # type: ignore[no-any-return]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def lookups() -> Iterator[list[str]]:
    """Notes whose op serves each lookup within: "ours" or "torch's"."""
    served: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> object:
            if func is torch.ops.aten.embedding.default:
                served.append("torch's")
            if func is torch.ops.embed_ext.embedding.default:
                served.append("ours")
            return func(*args, **(kwargs or {}))

    with Log():
        yield served
