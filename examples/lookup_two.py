"""Look up the first 2 of 20 random indices in a table of 10 rows of 100 numbers."""

import torch

from embed_ext import Embedding

torch.manual_seed(0)
embedding = Embedding(num_embeddings=10, embedding_dim=100)
indices = torch.randint(0, 10, (20,))

output = embedding(indices[:2])

print(indices[:2])
print(output.shape)
print(output[:, :4])
