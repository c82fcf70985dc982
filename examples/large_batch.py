"""A batch whose activations would not fit: towers take 64 rows at a time, the loss all 4096."""

import torch
from torch import nn
from torch.nn import functional as F

from m3bind import GradCache, clip_loss

NUM, BATCH, CHUNK, STEPS = 8192, 4096, 64, 12

torch.manual_seed(0)
# A pair is two views of the same hidden vector.
hidden = torch.randn(NUM, 24)
images = torch.tanh(hidden @ torch.randn(24, 96)) + 0.3 * torch.randn(NUM, 96)
texts = torch.tanh(hidden @ torch.randn(24, 64)) + 0.3 * torch.randn(NUM, 64)

image_tower = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Dropout(0.05), nn.Linear(256, 128))
text_tower = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.05), nn.Linear(256, 128))
log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
parameters = [*image_tower.parameters(), *text_tower.parameters(), log_scale]
optimizer = torch.optim.AdamW(parameters, lr=4e-3)
asked = []  # rows, by each call of the image tower
image_tower.register_forward_pre_hook(lambda tower, given: asked.append(len(given[0])))


def loss_fn(x, y):
    return clip_loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), log_scale.exp())


cache = GradCache([image_tower, text_tower], loss_fn, CHUNK)
for step in range(STEPS):
    rows = torch.randint(NUM, (BATCH,))
    optimizer.zero_grad()
    # In place of a forward pass and loss.backward(). Under DDP: one synchronisation of gradients.
    loss = cache.step(images[rows], texts[rows])
    optimizer.step()
    if step == 0:
        first = loss.item()
print(f"loss {first:.4f} -> {loss.item():.4f}")
print(f"the image tower saw at most {max(asked)} rows at once")

optimizer.zero_grad()
for tower in (image_tower, text_tower):
    tower.eval()  # dropout draws the same numbers for the same chunks, others for one large one
cache.step(images[:BATCH], texts[:BATCH])
chunked = torch.cat([p.grad.flatten() for p in parameters])
optimizer.zero_grad()
loss_fn(image_tower(images[:BATCH]), text_tower(texts[:BATCH])).backward()
whole = torch.cat([p.grad.flatten() for p in parameters])
print(f"difference to the gradients of one graph {(chunked - whole).norm() / whole.norm():.0e}")
