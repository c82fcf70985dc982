"""open_clip's own model and loss factories, with m3bind's losses inside `apply()`."""

import json
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch

from m3bind.integrations.open_clip import apply

CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2,
        },
        "text_cfg": {
            "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2,
        },
    }
}  # fmt: skip
# What open_clip's training script would have parsed from its command line.
ARGS = SimpleNamespace(
    model="tiny", distill=False, siglip=False, local_loss=False, gather_with_grad=False,
    rank=0, world_size=1, horovod=False,
)  # fmt: skip
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (0.5, 0.5, 0.5)}

logging.disable(logging.WARNING)  # open_clip warns that a folder without weights has none
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "open_clip_config.json").write_text(json.dumps(CONFIG))
    model = open_clip.create_model(f"local-dir:{folder}", output_dict=True)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

# Every colour in the upper half above every other one: 12 pairs of an image and its caption.
captions, images = [], []
for above in COLOURS:
    for below in COLOURS:
        if above != below:
            captions.append(f"{above} above {below}")
            halves = torch.tensor((COLOURS[above], COLOURS[below]))
            images.append(halves.T[:, :, None].repeat_interleave(16, 1).expand(3, 32, 32))
images, tokens = torch.stack(images), tokenizer(captions)

print("outside:", type(open_clip.create_loss(ARGS)))
with apply():
    loss_fn = open_clip.create_loss(ARGS)
print("inside: ", type(loss_fn))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(40):
    output = model(images + 0.1 * torch.randn_like(images), tokens)
    losses = loss_fn(**output, output_dict=True)
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0:
        first = loss.item()
        print(f"of open_clip's loss:  {open_clip.ClipLoss()(**output).item():.6f}")
        print(f"of m3bind's:          {first:.6f}")
    if step % 10 == 0:
        print(f"step {step:2d}  loss {loss.item():.4f}")
print(f"loss {first:.4f} -> {loss.item():.4f}")

with torch.no_grad():
    output = model.eval()(images, tokens)
found = (output["image_features"] @ output["text_features"].T).argmax(1)
print(f"{(found == torch.arange(12)).sum().item()} of 12 images find their caption")
