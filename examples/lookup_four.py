"""Look up rows 1 to 4 of a table of 10 rows of 3 numbers, and see the autograd node behind them."""

import torch

from embed_ext import Embedding

torch.manual_seed(0)
embedding = Embedding(num_embeddings=10, embedding_dim=3)

output = embedding(torch.tensor([1, 2, 3, 4]))

print(output)
print(output.grad_fn)
