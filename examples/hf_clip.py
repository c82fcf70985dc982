"""A transformers CLIPModel trains without its matrix of logits: by a function, or in `apply()`."""

import torch
from transformers import CLIPConfig, CLIPModel

from m3bind.integrations.transformers import apply, contrastive_loss

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 63, "bos_token_id": 62,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
NUM = 64

torch.manual_seed(0)
model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32))
ids = torch.randint(62, (NUM, 8))
ids[:, -1] = 63
batch = {"input_ids": ids, "pixel_values": torch.randn(NUM, 3, 16, 16)}

own = model(**batch, return_loss=True)
print(f"transformers: loss {own.loss.item():.6f}, logits {tuple(own.logits_per_image.shape)}")
with apply():
    fused = model(**batch, return_loss=True)
print(f"in apply():   loss {fused.loss.item():.6f}, logits {fused.logits_per_image}")

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(40):
    loss = contrastive_loss(model, **batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0:
        first = loss.item()
    if step % 10 == 0:
        print(f"step {step:2d}  loss {loss.item():.4f}")
print(f"loss {first:.4f} -> {loss.item():.4f}")
