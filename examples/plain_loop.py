"""The fused loss in a plain training loop: two towers learn to match simulated images and texts."""

import time

import torch
from torch import nn
from torch.nn import functional as F

from m3bind import clip_loss

NUM, BATCH, STEPS = 8192, 2048, 30

torch.manual_seed(0)
# A pair is two views of the same hidden vector.
hidden = torch.randn(NUM, 24)
images = torch.tanh(hidden @ torch.randn(24, 96)) + 0.3 * torch.randn(NUM, 96)
texts = torch.tanh(hidden @ torch.randn(24, 64)) + 0.3 * torch.randn(NUM, 64)

image_tower = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 128))
text_tower = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128))
log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
parameters = [*image_tower.parameters(), *text_tower.parameters(), log_scale]
optimizer = torch.optim.AdamW(parameters, lr=2e-3)

start = time.perf_counter()
for step in range(STEPS):
    rows = torch.randint(NUM, (BATCH,))
    x = F.normalize(image_tower(images[rows]), dim=-1)
    y = F.normalize(text_tower(texts[rows]), dim=-1)
    # The scale gets its gradient, too. By default these logits would be kept for the backward pass,
    # which saves time.
    loss = clip_loss(x, y, log_scale.exp(), memory_budget=0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0:
        first = loss.item()
    if step % 5 == 0 or step == STEPS - 1:
        print(f"step {step:2d}  loss {loss.item():.4f}  scale {log_scale.exp().item():.2f}")

print(f"loss {first:.4f} -> {loss.item():.4f}")
print(f"{(time.perf_counter() - start) / STEPS * 1e3:.0f} ms a step of {BATCH} pairs")
print(f"the {BATCH} x {BATCH} logits, {BATCH**2 * 4 >> 20} MiB in float32, were never in memory")
