"""Opacus: a table's gradient for each sample, and the norms of these.

Opacus looks the functions that make them up by ``type(module)``. For a class that is not in its
tables it runs torch.func's transforms over the module, which takes many times as long, and fails on
a module that was converted after Opacus put its hooks on it.
"""

from __future__ import annotations

from torch import nn

from embed_ext.modules import Embedding


def register() -> None:
    """Register what is registered for nn.Embedding, once ``opacus.grad_sample`` is imported."""
    from opacus import grad_sample

    hooks = grad_sample.GradSampleModule
    of_gradients = hooks.GRAD_SAMPLERS.get(nn.Embedding)
    if of_gradients is not None:
        grad_sample.register_grad_sampler(Embedding)(of_gradients)
    # Opacus 1.4 and before have no ghost clipping.
    hooks = getattr(grad_sample, "GradSampleModuleFastGradientClipping", None)
    of_norms = getattr(hooks, "NORM_SAMPLERS", {}).get(nn.Embedding)
    if of_norms is not None:
        grad_sample.register_norm_sampler(Embedding)(of_norms)
